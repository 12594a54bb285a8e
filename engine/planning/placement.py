"""Which part of an expert lives on which device. Pure; balanced and auto are accelerate's own.

The model is looked at on the meta device: only names, sizes and dtypes count.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import compute_module_sizes, get_balanced_memory

from ..errors import InvalidRequestError, PlacementError
from .budgets import Budget
from .devices import gib

HOST = "cpu"
DEVICE_MAPS = ("auto", "balanced")
OFFLOADS = ("auto", "cpu", "none")

Home = int | str


@dataclass(frozen=True)
class Placement:
    """Homes of one expert's modules.

    Attributes:
        homes: module or parameter name -> visible device index, or ``"cpu"`` for host memory.
        sizes: the same names -> bytes.
        reserve_bytes: device index -> bytes kept free of weights, for activations and fetched weights.
        main_device: index of the device that holds what comes before the first block, and computes what lives on the host.
        budgets: the limits this was made for.
        notes: sentences for people.
    """

    homes: Mapping[str, Home]
    sizes: Mapping[str, int]
    reserve_bytes: Mapping[int, int]
    main_device: int
    budgets: tuple[Budget, ...]
    notes: tuple[str, ...] = field(default=())

    def weight_bytes(self, home: Home) -> int:
        return sum(self.sizes[name] for name, where in self.homes.items() if where == home)

    def predicted_peak_bytes(self, index: int) -> int:
        """What the allocator is expected to hold on a device at most while this expert works."""
        return self.weight_bytes(index) + self.reserve_bytes.get(index, 0)

    @property
    def offloaded(self) -> tuple[str, ...]:
        return tuple(name for name, where in self.homes.items() if where == HOST)


def place_expert(
    model: torch.nn.Module,
    budgets: tuple[Budget, ...],
    *,
    device_map: str,
    offload: str,
    activation_bytes: int,
    host_bytes: int,
    dtype: torch.dtype,
    special_dtypes: Mapping[str, torch.dtype],
) -> Placement:
    """Share an expert's modules out over the budgets.

    Args:
        model: a ``WanTransformer3DModel`` on the meta device.
        budgets: one per device that takes part.
        device_map: "auto" (fill device after device) or "balanced" (evenly), as in accelerate.
        offload: "auto" (what does not fit waits in host memory), "cpu" (everything waits there), "none".
        activation_bytes: what a run needs on each computing device besides weights.
        host_bytes: host memory that offloaded weights may take.
        dtype: of the weights in memory; ``special_dtypes`` overrides it by parameter name.

    Raises:
        InvalidRequestError: ``device_map`` or ``offload`` is unknown.
        PlacementError: it does not fit; the message says by how much and which slider to move.
    """
    if device_map not in DEVICE_MAPS:
        raise InvalidRequestError(f"device_map is {device_map!r}; choose one of {', '.join(DEVICE_MAPS)}.")
    if offload not in OFFLOADS:
        raise InvalidRequestError(f"offload is {offload!r}; choose one of {', '.join(OFFLOADS)}.")
    sizing = {"dtype": dtype, "special_dtypes": dict(special_dtypes)}
    module_sizes = compute_module_sizes(model, **sizing)
    no_split = list(getattr(model, "_no_split_modules", None) or ())
    block_bytes = max((size for name, size in module_sizes.items() if _is_block(name)), default=0)
    if not budgets[0].device.is_gpu:
        return _all_on_cpu(model, module_sizes, budgets, activation_bytes)

    reserve = {b.device.index: activation_bytes for b in budgets}
    room = {index: max(0, b.usable_bytes - reserve[index]) for index, b in ((b.device.index, b) for b in budgets)}
    if offload == "cpu":
        homes, notes = _map(model, {index: 0 for index in room}, host_bytes, "auto", no_split, sizing), []
    else:
        homes, notes = _mapped(model, room, host_bytes, device_map, no_split, sizing)
    spilled = HOST in homes.values()
    main = next((where for where in homes.values() if isinstance(where, int)), _roomiest(room))
    if spilled and offload != "none":
        # Whatever computes the spilled blocks also needs room for one of them while it is fetched.
        reserve[main] += block_bytes
        room[main] = max(0, room[main] - block_bytes)
        if offload == "auto":
            homes, notes = _mapped(model, room, host_bytes, device_map, no_split, sizing)
            main = next((where for where in homes.values() if isinstance(where, int)), main)
    # Parts without weights (rotary tables, the last norm) are needed where the inputs are.
    homes = {name: where if any(True for _ in _weights(model, name)) else main for name, where in homes.items()}
    placement = Placement(homes, {name: module_sizes[name] for name in homes}, reserve, main, budgets, tuple(notes))
    _check(placement, module_sizes[""], offload, host_bytes, activation_bytes, block_bytes)
    return placement


def _is_block(name: str) -> bool:
    head, _, tail = name.partition(".")
    return head == "blocks" and tail.isdigit()


def _weights(model: torch.nn.Module, name: str):
    return [model._parameters[name]] if name in model._parameters else model.get_submodule(name).parameters()


def _roomiest(room: Mapping[int, int]) -> int:
    return max(room, key=lambda index: room[index])


def _mapped(model, room, host_bytes, device_map, no_split, sizing) -> tuple[dict[str, Home], list[str]]:
    """The asked map, or accelerate's "auto" where "balanced" would leave more on the host than need be."""
    homes = _map(model, room, host_bytes, device_map, no_split, sizing)
    if device_map == "balanced" and HOST in homes.values():
        filled = _map(model, room, host_bytes, "auto", no_split, sizing)
        on_host = sum(where == HOST for where in homes.values())
        if sum(where == HOST for where in filled.values()) < on_host:
            return filled, [f"An even split would have left {on_host} parts in system memory, so the GPUs are filled one after another."]
    return homes, []


def _map(model, room: Mapping[int, int], host_bytes: int, device_map: str, no_split, sizing) -> dict[str, Home]:
    max_memory: dict[int | str, int] = {**room, HOST: host_bytes}
    if device_map == "balanced" and sum(value > 0 for value in room.values()) > 1:
        max_memory = get_balanced_memory(model, dict(max_memory), no_split_module_classes=no_split, **sizing)
    mapped = infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=no_split, clean_result=False, **sizing)
    return {part: _home(part, mapped) for part in parts_of(model)}


def parts_of(model: torch.nn.Module) -> list[str]:
    """The units that have a home: top-level parameters and modules, and each block, in the order they compute."""
    names = [name for name, _ in model.named_parameters(recurse=False)]
    for child, module in model.named_children():
        names += [f"blocks.{i}" for i in range(len(module))] if child == "blocks" else [child]
    return names


def _home(part: str, mapped: Mapping[str, Home]) -> Home:
    """accelerate may name a parent of a part, or split a part that is no block; then it lives where all of it can."""
    whole = next((where for name, where in mapped.items() if name in ("", part) or part.startswith(f"{name}.")), None)
    if whole is not None:
        return whole
    pieces = [where for name, where in mapped.items() if name.startswith(f"{part}.")]
    return next((where for where in pieces if isinstance(where, str)), pieces[0])


def _all_on_cpu(model, module_sizes, budgets, activation_bytes) -> Placement:
    """Without a GPU there is one device and nothing to share out."""
    index = budgets[0].device.index
    homes: dict[str, Home] = {name: index for name in parts_of(model)}
    return Placement(homes, {name: module_sizes.get(name, 0) for name in homes}, {index: activation_bytes}, index, budgets)


def _check(placement: Placement, total: int, offload: str, host_bytes: int, activation_bytes: int, block_bytes: int) -> None:
    limits = ", ".join(f"{b.device.label}: {gib(b.limit_bytes)}" for b in placement.budgets)
    on_host = placement.weight_bytes(HOST)
    if "disk" in placement.homes.values():
        raise PlacementError(
            f"The expert's weights ({gib(total)}) fit neither the GPUs ({limits}) nor the {gib(host_bytes)} of free system memory. "
            "Choose weight_dtype fp8_e4m3fn or int8, raise a slider, or close other programs."
        )
    if on_host and offload == "none":
        raise PlacementError(
            f"{gib(on_host)} of the expert's {gib(total)} do not fit on the GPUs ({limits}; {gib(activation_bytes)} of each are needed "
            "for activations), and offload is 'none'. Raise a slider, choose a smaller weight_dtype, or set offload to 'auto'."
        )
    main = next(b for b in placement.budgets if b.device.index == placement.main_device)
    for budget in placement.budgets:
        index = budget.device.index
        if placement.predicted_peak_bytes(index) > budget.usable_bytes and (placement.weight_bytes(index) or budget is main):
            needed = activation_bytes + (block_bytes if on_host else 0)
            raise PlacementError(
                f"The memory slider of {budget.device.label} allows {gib(budget.limit_bytes)}, but this video size needs "
                f"{gib(needed)} there for activations and one block, before any weights. Raise the slider, set it to -1 to leave "
                "this GPU out, or make the video smaller or shorter."
            )
