"""The one owner of what is loaded: both experts of one model, on the devices of one plan.

Handles are light and many; weights are heavy and here. Prompts that use the same model reuse it; another model replaces
it; ``release`` lets everything go. All of it runs under one lock: one video at a time, whichever threads ask.
"""

import gc
import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from .. import probe
from ..checkpoints.diffusers_folder import EXPERT_WORDS, HIGH_NOISE
from ..errors import PlacementError
from ..handle import ModelHandle
from ..planning.budgets import Budget, budgets_for
from ..planning.devices import GIB, DeviceInfo, Machine
from ..planning.footprint import VideoShape, transformer_activation_bytes
from ..planning.placement import HOST, Placement, place_expert
from ..planning.remedies import check_host_memory, length_remedy
from .expert import CPU, Expert
from .precision import Precision, resolve_precision

logger = logging.getLogger(__name__)

# Called with (parts done, parts in all, what is being loaded); may raise to cancel.
OnLoad = Callable[[int, int, str], None]
# System memory that parked weights never take.
HOST_RESERVE_BYTES = 2 * GIB
# What moves to the host at a time when a forward runs out of memory.
SHED_BYTES = GIB


@dataclass(frozen=True)
class Plan:
    """Where everything goes for runs up to one size.

    Attributes:
        shape: the largest run it holds for.
        budgets: the limits.
        placements: expert part name ("transformer", "transformer_2") -> its placement.
        precision: how weights are kept.
        fragmentation: of the allocator, as planned for.
        offload: what the user allows, "auto", "cpu" or "none".
        notes: sentences for people.
    """

    shape: VideoShape
    budgets: tuple[Budget, ...]
    placements: Mapping[str, Placement]
    precision: Precision
    fragmentation: float
    offload: str
    notes: tuple[str, ...]

    @property
    def main_device(self) -> torch.device:
        placement = self.placements[HIGH_NOISE]
        return torch.device(next(b.device.torch_device for b in self.budgets if b.device.index == placement.main_device))

    def budget(self, index: int) -> Budget:
        return next(b for b in self.budgets if b.device.index == index)


class LoadedModel:
    """Both experts of one model in memory. Made and kept by :class:`ModelOwner` only."""

    def __init__(self, handle: ModelHandle, precision: Precision):
        self.experts = {part: Expert(EXPERT_WORDS[part], files, precision) for part, files in handle.folder.experts.items()}
        self.precision = precision
        self.plan: Plan | None = None
        self.learned_reserve_bytes = 0
        # The most the allocator should hold on each device during the current run; the hooks read it before every block.
        self.ceilings: dict[torch.device, int] = {}
        self._dispatched: dict[str, Placement] = {}
        self._check_cancelled: Callable[[], None] = lambda: None

    def set_plan(self, plan: Plan) -> None:
        """Follow a new plan from the next activation on."""
        if self.plan is not None and {b.device.torch_device for b in self.plan.budgets} - {b.device.torch_device for b in plan.budgets}:
            self.release()
        self.plan = plan
        self.ceilings.update({torch.device(b.device.torch_device): b.usable_bytes for b in plan.budgets})
        for part, expert in self.experts.items():
            if part in self._dispatched and self._dispatched[part].homes == plan.placements[part].homes:
                self._dispatched[part] = plan.placements[part]  # already so
            else:
                self._dispatched.pop(part, None)
                expert.undispatch()

    def activate(self, part: str, check_cancelled: Callable[[], None], on_load: OnLoad) -> Expert:
        """Have one expert's weights at their homes, moving the other's out of the way part by part.

        Raises:
            CheckpointError: a file can't be read any more.
        """
        plan, expert = self._planned(), self.experts[part]
        self._check_cancelled = check_cancelled
        placement = plan.placements[part]
        if self._dispatched.get(part) is placement:
            return expert
        expert.undispatch()
        self.clear_fetch_rooms()
        stage = plan.main_device
        parts = list(placement.homes)
        # Parts that leave a GPU go first, so that what arrives finds their room.
        parts.sort(key=lambda name: placement.homes[name] != HOST)
        for done, name in enumerate(parts):
            check_cancelled()
            home = self._device(placement.homes[name])
            if expert.location(name) != home:
                on_load(done, len(parts), expert.name)
                self._make_room_for_part(placement, part, name)
                expert.bring(name, home, stage)
                for device, ceiling in self.ceilings.items():
                    probe.trim(str(device), ceiling)
        on_load(len(parts), len(parts), expert.name)
        self._synchronize()
        # Leftovers of conversions would stand in the way of activations.
        probe.release_cached([b.device.torch_device for b in plan.budgets])
        # Hooks outlive the run that made them: they must ask the run that computes, not that one.
        devices = {b.device.index: torch.device(b.device.torch_device) for b in plan.budgets}
        expert.dispatch(placement, devices, lambda: self._check_cancelled(), self.ceilings)
        self._dispatched[part] = placement
        return expert

    def _make_room_for_part(self, placement: Placement, part: str, name: str) -> None:
        home = placement.homes[name]
        if home == HOST:
            self._make_room_on_host(part, name)
            return
        index = int(home)
        budget = self._planned().budget(index)
        self.make_room(index, placement.reserve_bytes.get(index, 0) + self.experts[part].part_bytes(name), budget.usable_bytes, keep=part)

    def _make_room_on_host(self, part: str, name: str) -> None:
        """Where system memory is short, the other expert's parts there are dropped; its files have them."""
        expert = self.experts[part]
        if expert.is_cheap_to_read(name):
            return
        for other, waiting in self.experts.items():
            for parked in waiting.parts_on(CPU) if other != part else ():
                if psutil.virtual_memory().available - HOST_RESERVE_BYTES >= expert.part_bytes(name):
                    return
                if self._dispatched.pop(other, None) is not None:
                    waiting.undispatch()
                waiting.drop(parked)

    def clear_fetch_rooms(self) -> None:
        """Give back what fetched weights stood in, on all devices."""
        for expert in self.experts.values():
            expert.clear_fetch_room()

    def make_room(self, index: int, needed_bytes: int, limit_bytes: int, keep: str | None = None) -> None:
        """Park weights from one device until ``needed_bytes`` more fit under the limit there.

        Args:
            index: the device.
            needed_bytes: what is about to be allocated.
            limit_bytes: the most that may be allocated there in all.
            keep: an expert whose parts that are at home stay ("transformer", "transformer_2").
        """
        device = self._device(index)
        if device == CPU:
            return
        for part, expert in self.experts.items():
            for name in expert.parts_on(device):
                if self.resident_bytes(device) + needed_bytes <= limit_bytes:
                    return
                if part != keep or self._planned().placements[part].homes[name] != index:
                    self._park(part, name)

    def _park(self, part: str, name: str) -> None:
        expert = self.experts[part]
        if self._dispatched.pop(part, None) is not None:
            expert.undispatch()
        room = psutil.virtual_memory().available - HOST_RESERVE_BYTES
        if expert.is_cheap_to_read(name) or expert.part_bytes(name) > room:
            expert.drop(name)
        else:
            expert.bring(name, CPU, CPU)

    def failed_device(self, message: str) -> DeviceInfo:
        """The device that an out-of-memory message names, or else the one with the least room left."""
        plan = self._planned()
        named = re.search(r"GPU (\d+)|device (\d+)", message)
        for budget in plan.budgets:
            if named and budget.device.torch_device == f"cuda:{named[1] or named[2]}":
                return budget.device
        return min(plan.budgets, key=lambda b: b.usable_bytes - self.resident_bytes(torch.device(b.device.torch_device))).device

    def may_shed(self, index: int) -> bool:
        """Whether blocks may leave a device for the host: some are there, and the user has not forbidden it."""
        plan = self._planned()
        return plan.offload != "none" and any(
            home == index and name.startswith("blocks.") for name, home in plan.placements[HIGH_NOISE].homes.items()
        )

    def shed(self, index: int) -> int:
        """After a forward ran out of memory: give blocks that live on a device a home on the host, for both experts.

        Args:
            index: the device that ran out.

        Returns:
            How many blocks. They move at the next activation.
        """
        plan = self._planned()
        first = plan.placements[HIGH_NOISE]
        blocks = [name for name, home in first.homes.items() if home == index and name.startswith("blocks.")]
        count = -(-SHED_BYTES // max(1, first.sizes["blocks.0"]))
        if index == first.main_device and not any(name.startswith("blocks.") for name in first.offloaded):
            count += 1  # the first block on the host brings a buffer of its size for fetching
        gone = set(blocks[-count:])
        placements = {
            part: replace(placement, homes={name: HOST if name in gone else home for name, home in placement.homes.items()})
            for part, placement in plan.placements.items()
        }
        self.learned_reserve_bytes += sum(first.sizes[name] for name in gone)
        self.set_plan(replace(plan, placements=placements))
        probe.release_cached([b.device.torch_device for b in plan.budgets])
        return len(gone)

    def resident_bytes(self, device: torch.device) -> int:
        """Bytes of weights on a device, both experts."""
        return sum(expert.resident_bytes(device) for expert in self.experts.values())

    def release(self) -> None:
        """Let all weights go."""
        self._dispatched.clear()
        for expert in self.experts.values():
            expert.undispatch()
            for name in expert.parts:
                expert.drop(name)

    def _planned(self) -> Plan:
        if self.plan is None:
            raise RuntimeError("a plan comes first")
        return self.plan

    def _device(self, home: int | str) -> torch.device:
        if home == HOST:
            return CPU
        return torch.device(self._planned().budget(int(home)).device.torch_device)

    def _synchronize(self) -> None:
        for budget in self._planned().budgets:
            probe.synchronize(budget.device.torch_device)


class ModelOwner:
    """Holds at most one loaded model; the only mutable state of the pack."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._key: tuple[Any, ...] | None = None
        self._handle: ModelHandle | None = None
        self._loaded: LoadedModel | None = None

    @property
    def loaded(self) -> LoadedModel | None:
        return self._loaded

    def obtain(self, handle: ModelHandle, machine: Machine, shape: VideoShape, *, reserved_bytes: int = 0) -> LoadedModel:
        """The loaded model of a handle with a plan for a size; weights arrive with ``activate``.

        The plan in force is kept when it holds for this run too, so that nothing moves needlessly.

        Args:
            handle: the model and how to spread it.
            machine: the devices as they are now.
            shape: the run's size.
            reserved_bytes: what the application wants left alone on each GPU.

        Raises:
            CheckpointError, PlacementError, UnsupportedError: see there; what was loaded before stays.
        """
        key, loaded, plan = self._prepare(handle, machine, shape, reserved_bytes)
        if loaded is not self._loaded:
            self.release()
            self._loaded, self._key = loaded, key
        if loaded.plan is not None and self._handle == handle and _still_holds(loaded.plan, plan):
            kept = {part: replace(plan.placements[part], homes=loaded.plan.placements[part].homes) for part in plan.placements}
            plan = replace(plan, placements=kept)
        loaded.set_plan(plan)
        self._handle = handle
        return loaded

    def dry_plan(self, handle: ModelHandle, machine: Machine, shape: VideoShape, *, reserved_bytes: int = 0) -> Plan:
        """The plan :meth:`obtain` would make; loads and changes nothing. Arguments and errors as there."""
        return self._prepare(handle, machine, shape, reserved_bytes)[2]

    def _prepare(
        self, handle: ModelHandle, machine: Machine, shape: VideoShape, reserved_bytes: int
    ) -> tuple[tuple[Any, ...], LoadedModel, Plan]:
        """The identity of what a handle needs loaded, that model (ours if it is the same, else one without weights), a plan."""
        on_gpu = machine.devices[0].is_gpu
        precision, notes = resolve_precision(handle.weight_dtype, handle.folder.experts[HIGH_NOISE].stored_dtype, on_gpu=on_gpu)
        key = (str(handle.folder.path), handle.folder.fingerprint, precision)
        loaded = self._loaded if self._key == key and self._loaded is not None else LoadedModel(handle, precision)
        # What another model holds now is let go before this one arrives, so it counts as free.
        plan = make_plan(handle, loaded, machine, shape, notes, in_memory=self._loaded or loaded, reserved_bytes=reserved_bytes)
        return key, loaded, plan

    def held_bytes(self) -> dict[str, int]:
        """Bytes of weights on each device, by torch's device name."""
        if self._loaded is None or self._loaded.plan is None:
            return {}
        devices = [b.device.torch_device for b in self._loaded.plan.budgets]
        return {device: self._loaded.resident_bytes(torch.device(device)) for device in devices}

    def release(self) -> None:
        """Let everything go; the next prompt loads again."""
        with self.lock:
            loaded, self._loaded, self._key = self._loaded, None, None
            if loaded is None:
                return
            devices = [b.device.torch_device for b in loaded.plan.budgets] if loaded.plan else []
            loaded.release()
            del loaded
            gc.collect()
            probe.release_cached(devices)


def _still_holds(old: Plan, new: Plan) -> bool:
    """Whether the homes in force also suit a new plan's limits and size, so that nothing needs to move."""
    if [b.device.torch_device for b in old.budgets] != [b.device.torch_device for b in new.budgets]:
        return False
    for part, wanted in new.placements.items():
        current = old.placements[part]
        if current.main_device != wanted.main_device or len(current.offloaded) > len(wanted.offloaded):
            return False
        for budget in new.budgets:
            index = budget.device.index
            if current.weight_bytes(index) + wanted.reserve_bytes[index] > budget.usable_bytes:
                return False
    return True


def make_plan(
    handle: ModelHandle,
    loaded: LoadedModel,
    machine: Machine,
    shape: VideoShape,
    notes: tuple[str, ...] = (),
    *,
    in_memory: LoadedModel,
    reserved_bytes: int = 0,
) -> Plan:
    """Homes for both experts for a run of a size. Moves nothing.

    Args:
        handle: how to spread it.
        loaded: the model to place.
        machine: the devices as they are now.
        shape: the run's size.
        notes: to be repeated in the plan.
        in_memory: whose weights are on the devices now; they count as free.
        reserved_bytes: what the application wants left alone on each GPU.

    Raises:
        PlacementError: it does not fit; the message names the slider and the value, and the length that would fit.
    """
    held = {d.index: in_memory.resident_bytes(torch.device(d.torch_device)) for d in machine.devices}
    budgets, budget_notes = budgets_for(machine, handle.max_memory_gib, held_bytes=held, reserved_bytes=reserved_bytes)
    host_bytes = max(0, machine.host_available_bytes - HOST_RESERVE_BYTES + in_memory.resident_bytes(CPU))

    def place(size: VideoShape, *, remedies: bool = True) -> dict[str, Placement]:
        check_host_memory(size, machine.host_available_bytes, vae_on_host=not budgets[0].device.is_gpu)
        placements = {}
        for part, expert in loaded.experts.items():
            config: Any = expert.model.config
            width = config.num_attention_heads * config.attention_head_dim
            placements[part] = place_expert(
                expert.model,
                budgets,
                device_map=handle.device_map,
                offload=handle.offload,
                activation_bytes=transformer_activation_bytes(
                    size, width, loaded.precision.dtype.itemsize, machine.fragmentation, expert.widened_bytes
                )
                + loaded.learned_reserve_bytes,
                host_bytes=host_bytes,
                dtype=loaded.precision.dtype,
                special_dtypes=expert.dtypes,
                remedies=remedies,
            )
        return placements

    try:
        placements = place(shape)
    except PlacementError as error:
        raise PlacementError(f"{error}{length_remedy(shape, lambda size: place(size, remedies=False))}") from None
    placement_notes = placements[HIGH_NOISE].notes
    return Plan(
        shape,
        budgets,
        placements,
        loaded.precision,
        machine.fragmentation,
        handle.offload,
        (*machine.warnings, *notes, *budget_notes, *placement_notes),
    )
