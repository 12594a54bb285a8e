"""Which part of an expert lives on which device. Pure; balanced and auto are accelerate's own.

Only the names and sizes of parts count.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory

from ..errors import InvalidRequestError, PlacementError
from .budgets import CONTEXT_BYTES, Budget
from .devices import GIB, gib
from .remedies import slider_remedy

HOST = "cpu"
# Left free on each GPU besides what is planned, where there is room enough.
SLACK_BYTES = GIB // 2
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
        parallel: all devices compute every block, rather than each the blocks that live there.
        fetch_bytes: device index -> how much of ``reserve_bytes`` is room for fetched weights.
    """

    homes: Mapping[str, Home]
    sizes: Mapping[str, int]
    reserve_bytes: Mapping[int, int]
    main_device: int
    budgets: tuple[Budget, ...]
    notes: tuple[str, ...] = field(default=())
    parallel: bool = False
    fetch_bytes: Mapping[int, int] = field(default_factory=dict)

    def weight_bytes(self, home: Home) -> int:
        return sum(self.sizes[name] for name, where in self.homes.items() if where == home)

    def predicted_peak_bytes(self, index: int) -> int:
        """What the allocator is expected to hold on a device at most while this expert works; 0 where it does not compute."""
        weights = self.weight_bytes(index)
        computes = self.parallel or weights or index == self.main_device
        return weights + self.reserve_bytes.get(index, 0) if computes else 0

    @property
    def offloaded(self) -> tuple[str, ...]:
        return tuple(name for name, where in self.homes.items() if where == HOST)


def place_expert(
    sizes: Mapping[str, int],
    budgets: tuple[Budget, ...],
    *,
    device_map: str,
    offload: str,
    activation_bytes: int | Mapping[int, int],
    host_bytes: int,
    largest_block_bytes: int = 0,
    parallel: bool = False,
    remedies: bool = True,
) -> Placement:
    """Share an expert's modules out over the budgets.

    Args:
        sizes: bytes of every part in memory, in the order they compute (see :func:`parts_of`); 0 for those without weights.
        budgets: one per device that takes part.
        device_map: "auto" (fill device after device) or "balanced" (evenly), as in accelerate.
        offload: "auto" (what does not fit waits in host memory), "cpu" (everything waits there), "none".
        activation_bytes: what a run needs on each computing device besides weights; one number for all, or by device index.
        host_bytes: host memory that offloaded weights may take.
        largest_block_bytes: of both experts, whose blocks share the buffers for what is fetched; at least this expert's counts.
        parallel: all devices compute every block; each needs room for fetched blocks then.
        remedies: look for the slider that would do, should it not fit.

    Raises:
        InvalidRequestError: ``device_map`` or ``offload`` is unknown.
        PlacementError: it does not fit; the message says by how much, and which slider at which value would do.
    """
    if device_map not in DEVICE_MAPS:
        raise InvalidRequestError(f"device_map is {device_map!r}; choose one of {', '.join(DEVICE_MAPS)}.")
    if offload not in OFFLOADS:
        raise InvalidRequestError(f"offload is {offload!r}; choose one of {', '.join(OFFLOADS)}.")
    needs = activation_bytes if isinstance(activation_bytes, Mapping) else {b.device.index: activation_bytes for b in budgets}
    wish = _Wish(sizes, device_map, offload, needs, host_bytes, largest_block_bytes, parallel)
    if not budgets[0].device.is_gpu:
        return _all_on_cpu(wish, budgets)
    try:
        return _place(wish, budgets)
    except PlacementError as error:
        if not remedies:
            raise
        raise PlacementError(f"{error} {slider_remedy(budgets, lambda tried: _fits(wish, tried))}") from None


@dataclass(frozen=True)
class _Wish:
    """What is to be placed (part -> bytes, in the order they compute), and how."""

    sizes: Mapping[str, int]
    device_map: str
    offload: str
    activation_bytes: Mapping[int, int]
    host_bytes: int
    largest_block_bytes: int
    parallel: bool

    @property
    def block_sizes(self) -> dict[str, int]:
        return {part: size for part, size in self.sizes.items() if part.startswith("blocks.")}

    @property
    def most_activation_bytes(self) -> int:
        return max(self.activation_bytes.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes.values())

    def fetch_bytes(self, homes: Mapping[str, Home]) -> int:
        """Room for what is fetched from the host: blocks share it, what comes before and after them has its own."""
        waiting = [part for part, home in homes.items() if home == HOST]
        blocks = max((self.sizes[part] for part in waiting if part.startswith("blocks.")), default=0)
        return blocks + sum(self.sizes[part] for part in waiting if not part.startswith("blocks."))


def _fits(wish: _Wish, budgets: tuple[Budget, ...]) -> bool:
    try:
        _place(wish, budgets)
    except PlacementError:
        return False
    return True


def _place(wish: _Wish, budgets: tuple[Budget, ...]) -> Placement:
    placement = _place_parallel(wish, budgets) if wish.parallel else _place_sequential(wish, budgets)
    _check(placement, wish)
    return placement


def _place_parallel(wish: _Wish, budgets: tuple[Budget, ...]) -> Placement:
    """Blocks by the asked map; what comes before and after them to the first device with room, which hands the tokens out."""
    room = {b.device.index: b.usable_bytes - wish.activation_bytes[b.device.index] for b in budgets}
    others = wish.total_bytes - sum(wish.block_sizes.values())
    # One buffer is computed from while the other is filled. Several devices need them always, since each block lives on one of them.
    fetched = 2 * max(wish.largest_block_bytes, *wish.block_sizes.values())
    # The first, not the roomiest: what is free changes a little from run to run, and weights must not wander for that.
    main = next((i for i, size in room.items() if size >= others + fetched), max(room, key=lambda index: room[index]))
    blocks = replace(wish, sizes=wish.block_sizes)
    fetch_bytes = fetched if len(budgets) > 1 else 0
    homes, notes = _homes(blocks, _room_for_blocks(room, fetch_bytes, main, others))
    if not fetch_bytes and _on_host(homes):
        fetch_bytes = fetched
        homes, notes = _homes(blocks, _room_for_blocks(room, fetch_bytes, main, others))
    reserve = {index: size + fetch_bytes for index, size in wish.activation_bytes.items()}
    every = {part: homes.get(part, main) for part in wish.sizes}
    return Placement(every, wish.sizes, reserve, main, budgets, notes, parallel=True, fetch_bytes=dict.fromkeys(reserve, fetch_bytes))


def _room_for_blocks(room: Mapping[int, int], fetch_bytes: int, main: int, others_bytes: int) -> dict[int, int]:
    return {index: max(0, size - fetch_bytes - (others_bytes if index == main else 0)) for index, size in room.items()}


def _place_sequential(wish: _Wish, budgets: tuple[Budget, ...]) -> Placement:
    usable = {b.device.index: b.usable_bytes for b in budgets}
    fetch_bytes = dict.fromkeys(usable, 0)
    while True:
        room = {index: max(0, usable[index] - wish.activation_bytes[index] - fetch_bytes[index]) for index in usable}
        homes, notes = _homes(wish, room)
        main = _main_device(wish, homes, room)
        needed = wish.fetch_bytes(homes)
        if fetch_bytes[main] >= needed:
            break
        # Whatever computes what is on the host also needs room to fetch it. Reserving that may move more to the host, or
        # make another device the main one, which then has to reserve it too.
        fetch_bytes[main] = needed
    fetched = {index: size if index == main else 0 for index, size in fetch_bytes.items()}
    reserve = {index: wish.activation_bytes[index] + fetched[index] for index in usable}
    # Parts without weights (rotary tables, the last norm) are needed where the inputs are.
    homes = {part: home if wish.sizes[part] else main for part, home in homes.items()}
    return Placement(homes, wish.sizes, reserve, main, budgets, notes, fetch_bytes=fetched)


def _homes(wish: _Wish, room: Mapping[int, int]) -> tuple[dict[str, Home], tuple[str, ...]]:
    """The asked map. A GPU filled to the brim is the first to run out of memory, so some room is left where all fits with it."""
    if wish.offload == "cpu":
        return _map(wish, dict.fromkeys(room, 0)), ()
    share_out = _balanced if wish.device_map == "balanced" else _filled
    eased = share_out(wish, {index: max(0, size - SLACK_BYTES) for index, size in room.items()})
    return eased if _on_host(eased[0]) == 0 else share_out(wish, room)


def _on_host(homes: Mapping[str, Home]) -> int:
    """Parts without a device; accelerate says "disk" where system memory has no room for them either."""
    return sum(not isinstance(home, int) for home in homes.values())


def _filled(wish: _Wish, room: Mapping[int, int]) -> tuple[dict[str, Home], tuple[str, ...]]:
    return _map(wish, room), ()


def _balanced(wish: _Wish, room: Mapping[int, int]) -> tuple[dict[str, Home], tuple[str, ...]]:
    """accelerate's even split; where a GPU can't hold its share and parts would be left over, the others take more, block by block."""
    if sum(size > 0 for size in room.values()) < 2:
        return _filled(wish, room)
    limits: Any = get_balanced_memory(_skeleton(wish.sizes), {**room, HOST: wish.host_bytes}, no_split_module_classes=[_Part.__name__])
    best = _map(wish, {index: limits[index] for index in room})
    more, notes = 0, ()
    while _on_host(best) and any(limits[index] + more < size for index, size in room.items()):
        more += max(1, *wish.sizes.values())
        homes = _map(wish, {index: min(size, limits[index] + more) for index, size in room.items()})
        if _on_host(homes) < _on_host(best):
            best, notes = homes, ("Not every GPU can hold an even share, so the larger ones hold more.",)
    return best, notes


def _main_device(wish: _Wish, homes: Mapping[str, Home], room: Mapping[int, int]) -> int:
    """The device of the first part that has weights and a device, or the roomiest one."""
    first = next((home for part, home in homes.items() if isinstance(home, int) and wish.sizes[part]), None)
    return max(room, key=lambda index: room[index]) if first is None else first


def _map(wish: _Wish, room: Mapping[int, int]) -> dict[str, Home]:
    """accelerate's map of the parts. On the first device it leaves the largest part's size free for what it fetches; where room for that is
    planned for already, it gets that size more, and its answer is checked."""
    if wish.parallel and room:
        first = next(iter(room))
        homes = _inferred(wish, {**room, first: room[first] + max(wish.sizes.values())})
        if all(sum(wish.sizes[part] for part, home in homes.items() if home == index) <= size for index, size in room.items()):
            return homes
    return _inferred(wish, room)


def _inferred(wish: _Wish, room: Mapping[int, int]) -> dict[str, Home]:
    """As accelerate has it. It sees one parameter per part: its time grows with their square, and it must split none."""
    max_memory: Any = {**room, HOST: wish.host_bytes}
    skeleton, no_split = _skeleton(wish.sizes), [_Part.__name__]
    mapped: Any = infer_auto_device_map(skeleton, max_memory=max_memory, no_split_module_classes=no_split, clean_result=False)
    # accelerate may name the list of blocks as a whole.
    return {part: mapped[part] if part in mapped else mapped["blocks"] for part in wish.sizes}


class _Part(torch.nn.Module):
    """As many bytes as a part has, on the meta device."""

    def __init__(self, size_bytes: int):
        super().__init__()
        if size_bytes:
            self.weight = torch.nn.Parameter(torch.empty(size_bytes, dtype=torch.int8, device="meta"), requires_grad=False)


def _skeleton(sizes: Mapping[str, int]) -> torch.nn.Module:
    root: Any = torch.nn.Module()
    for part, size in sizes.items():
        if part.startswith("blocks."):
            if not hasattr(root, "blocks"):
                root.blocks = torch.nn.ModuleList()
            root.blocks.append(_Part(size))
        else:
            root.add_module(part, _Part(size))
    return root


def parts_of(model: torch.nn.Module) -> list[str]:
    """The units that have a home: top-level parameters and modules, and each block, in the order they compute."""
    names = [name for name, _ in model.named_parameters(recurse=False)]
    children: Any = model.named_children()
    for child, module in children:
        names += [f"blocks.{i}" for i in range(len(module))] if child == "blocks" else [child]
    return names


def _all_on_cpu(wish: _Wish, budgets: tuple[Budget, ...]) -> Placement:
    """Without a GPU there is one device and nothing to share out; weights are mapped from their files."""
    budget = budgets[0]
    needed = wish.most_activation_bytes
    if needed > budget.usable_bytes:
        raise PlacementError(
            f"This video size needs {gib(needed)} of system memory for activations, and {gib(budget.usable_bytes)} are free. "
            "Make the video smaller or shorter, or close other programs."
        )
    index = budget.device.index
    return Placement(dict.fromkeys(wish.sizes, index), wish.sizes, {index: needed}, index, budgets, parallel=wish.parallel)


def _check(placement: Placement, wish: _Wish) -> None:
    limits = ", ".join(f"{b.device.label}: {gib(b.limit_bytes)}" for b in placement.budgets)
    on_host = placement.weight_bytes(HOST)
    if "disk" in placement.homes.values():
        raise PlacementError(
            f"The expert's weights ({gib(wish.total_bytes)}) fit neither the GPUs ({limits}) nor the {gib(wish.host_bytes)} of free system "
            "memory. Choose weight_dtype fp8_e4m3fn or int8, or close other programs."
        )
    if on_host and wish.offload == "none":
        raise PlacementError(
            f"{gib(on_host)} of the expert's {gib(wish.total_bytes)} do not fit on the GPUs ({limits}; {gib(wish.most_activation_bytes)} of each "
            "are needed for activations), and offload is 'none'. Set offload to 'auto', or choose a smaller weight_dtype."
        )
    for budget in placement.budgets:
        index = budget.device.index
        if placement.predicted_peak_bytes(index) > budget.usable_bytes:
            needed = CONTEXT_BYTES + placement.reserve_bytes[index]
            raise PlacementError(
                f"{budget.device.label} may use {gib(budget.limit_bytes)}, but this video size needs {gib(needed)} there for activations "
                "and the block being fetched, before any weights stay there. Make the video smaller or shorter."
            )
