"""Both experts of one model in memory: where their parts are, who computes, and what makes room for what.

Made and kept by the owner of loaded models; the pipeline asks it for an expert, or for room on a device. Knows no files and no pictures.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from . import probe
from .checkpoints.lora import LoraChoice
from .checkpoints.stored import EXPERT_WORDS
from .computing import Computing, timings_of
from .handle import ModelHandle
from .handover import Handover, can_hand_over
from .host_pool import HostPool
from .parallel.forward import ParallelForward
from .parallel.state import Timing
from .planning.budgets import Budget
from .planning.devices import gib
from .planning.placement import HOST, Placement
from .plans import Plan
from .system_memory import system_memory
from .weights.expert import CPU, NOWHERE, Expert
from .weights.precision import Precision
from .weights.reading import TensorReader

# Called with (parts done, parts in all, what is being loaded); may raise to cancel.
OnLoad = Callable[[int, int, str], None]


class LoadedModel:
    """Both experts of one model in memory. Made and kept by :class:`ModelOwner` only.

    Args:
        handle: of the model.
        precision: how weights are kept.
        reader: of its files.
    """

    def __init__(self, handle: ModelHandle, precision: Precision, reader: TensorReader):
        self._host_pool = HostPool()
        self.experts: Mapping[str, Expert] = {
            part: Expert(EXPERT_WORDS[part], files, precision, self._host_pool, reader) for part, files in handle.model.experts.items()
        }
        self.precision = precision
        self.plan: Plan | None = None
        # Device index -> what was given up there after running out of memory; later plans keep it free.
        self.learned_reserve_bytes: dict[int, int] = {}
        # The most the allocator should hold on each device during the current run; read anew before every block.
        self.ceilings: dict[torch.device, int] = {}
        self.computing = Computing(self.experts, precision, self.ceilings, self.learned_reserve_bytes)
        self._calls: dict[str, Callable[..., Any]] = {}
        self._dispatched: dict[str, Placement] = {}
        # Under way behind a forward; whatever moves or looks at parts waits for it first.
        self._handover: Handover | None = None
        self._handing_over = ""
        self._check_cancelled: Callable[[], None] = lambda: None
        self._on_stage: Callable[[str], None] = lambda words: None

    def use_loras(self, loras: Mapping[str, Sequence[LoraChoice]]) -> None:
        """Have these LoRAs, by expert, from the next activation on."""
        self.finish_handover(wait=False)
        changed = [part for part, expert in self.experts.items() if expert.use_loras(loras.get(part, ()))]
        if changed:
            self.clear_fetch_rooms()  # a block may take more now
        for part in changed:
            self._undispatch(part)

    def set_plan(self, plan: Plan) -> None:
        """Follow a new plan from the next activation on."""
        self.finish_handover(wait=False)
        if self.plan is not None and {b.device.torch_device for b in self.plan.budgets} - {b.device.torch_device for b in plan.budgets}:
            self.release()
        self.plan = plan
        self.ceilings.update({torch.device(b.device.torch_device): b.usable_bytes for b in plan.budgets})
        for part in self.experts:
            if part in self._dispatched and self._same_dispatch(self._dispatched[part], plan.placements[part]):
                self._dispatched[part] = plan.placements[part]  # already so
            else:
                self._undispatch(part)

    @staticmethod
    def _same_dispatch(old: Placement, new: Placement) -> bool:
        # All at once, a forward's workers and buffers are of one size and plan.
        return old.homes == new.homes and not old.parallel and not new.parallel

    def _undispatch(self, part: str) -> None:
        self._dispatched.pop(part, None)
        if self._calls.pop(part, None) is not None:
            self.computing.settle()
        self.experts[part].undispatch()

    def activate(
        self, part: str, check_cancelled: Callable[[], None], on_load: OnLoad, on_stage: Callable[[str], None] = lambda words: None
    ) -> Callable[..., Any]:
        """Have one expert's weights at their homes, moving the other's out of the way part by part.

        Returns:
            What calls like the expert's ``WanTransformer3DModel``.

        Raises:
            CheckpointError: a file can't be read any more, or was written to while weights are mapped from it.
        """
        self.finish_handover()
        plan, expert = self.planned(), self.experts[part]
        expert.check_mapped()
        self._check_cancelled, self._on_stage = check_cancelled, on_stage
        placement = plan.placements[part]
        if self._dispatched.get(part) is placement:
            return self._call(part)
        self._undispatch(part)
        self.clear_fetch_rooms()
        try:
            self._bring_home(part, placement, on_load)
        except BaseException:
            with suppress(RuntimeError):  # what was made on a GPU is on its way to memory that may be let go
                self._synchronize()
            expert.drop_arriving()
            raise
        finally:
            self._host_pool.forget_prepared()
        # Hooks outlive the run that made them: they must ask the run that computes, not that one.
        if placement.parallel:
            self._calls[part] = self.computing.forward(
                expert, plan, lambda: self._check_cancelled(), on_stage=lambda words: self._on_stage(words)
            )
        else:
            devices = {b.device.index: torch.device(b.device.torch_device) for b in plan.budgets}
            expert.dispatch(placement, devices, lambda: self._check_cancelled(), self.ceilings)
        self._dispatched[part] = placement
        return self._call(part)

    # ---- the switch between experts

    def hand_over_behind(self, part: str, successor: str) -> None:
        """Have the next forward of an active expert be its last: behind it, the other expert's blocks take the place of its own.

        Does nothing where one device works at a time, where both experts stay, and where the other's blocks are not held ready.
        """
        plan, forward = self.planned(), self._calls.get(part)
        homes = plan.placements[part], plan.placements[successor]
        if not isinstance(forward, ParallelForward) or not homes[1].parallel:
            return
        old, new = self.experts[part], self.experts[successor]
        devices: dict[int, torch.device] = {}
        for budget in plan.budgets:
            device = torch.device(budget.device.torch_device)
            must_leave = self._bytes_to_leave(new, homes[1], budget)
            for name in old.parts_on(device):
                if must_leave > 0 and name.startswith("blocks.") and can_hand_over(old, new, name, homes, device):
                    devices[int(name.removeprefix("blocks."))] = device
                    must_leave -= old.part_bytes(name)
        if devices:
            self._undispatch(successor)
            self._handover = forward.watcher = Handover(old, new, devices, lambda name: self._worth_keeping(part, name), forward.forget)
            self._handing_over = part

    def _bytes_to_leave(self, arriving: Expert, placement: Placement, budget: Budget) -> int:
        """What must leave a device so that an expert's parts, and its forwards, fit there; negative where there is room."""
        index, device = budget.device.index, torch.device(budget.device.torch_device)
        coming = sum(arriving.part_bytes(n) for n, home in placement.homes.items() if home == index and arriving.location(n) != device)
        return self.resident_bytes(device) + coming + self._forward_bytes(placement, index) - budget.usable_bytes

    def finish_handover(self, *, wait: bool = True) -> None:
        """Let blocks that are being handed over arrive.

        Args:
            wait: for those that are still to be moved, too; else only for the one under way.
        """
        handover, self._handover = self._handover, None
        if handover is not None:
            handover.finish(wait=wait)
            self.experts[self._handing_over].close_files()
            self._undispatch(self._handing_over)

    def _worth_keeping(self, part: str, name: str) -> bool:
        """Whether a part that leaves a device waits in system memory, instead of being read from its file again."""
        expert = self.experts[part]
        return not expert.is_cheap_to_read(name) and self._host_has_room(expert.part_bytes(name))

    def _call(self, part: str) -> Callable[..., Any]:
        return self._calls[part] if part in self._calls else self.experts[part].model

    def _bring_home(self, part: str, placement: Placement, on_load: OnLoad) -> None:
        plan, expert = self.planned(), self.experts[part]
        if placement.parallel:
            # Also where none of this expert's parts come to a device, it computes there.
            for budget in plan.budgets:
                index = budget.device.index
                self.make_room(index, self._forward_bytes(placement, index), budget.usable_bytes, keep=part)
        parts = self._in_turn(expert, placement)
        # What GPUs fetch waits in one piece, page-locked; where system memory is short, in its mapped file.
        fetched = [n for n in parts if plan.budgets[0].device.is_gpu and placement.homes[n] == HOST and n.startswith("blocks.")]
        for done, name in enumerate(parts):
            self._check_cancelled()
            home = self._device(placement.homes[name])
            if expert.location(name) != home or not expert.is_current(name):
                self._make_room_for_part(placement, part, name)
            packed = (
                True if name in fetched and (self._stands(expert, name, home) or self._host_has_room(expert.part_bytes(name))) else None
            )
            if name in fetched and not packed and expert.packed(name):
                expert.drop(name)  # it leaves a GPU, and its file has it
            following = [n for n in parts[done + 1 : done + 2] if n in fetched and packed]
            self._host_pool.prepare(self._host_bytes_after(expert, name, following))
            if expert.location(name) != home or (packed and expert.packed(name) is None) or not expert.is_current(name):
                on_load(done, len(parts), expert.name)
                expert.bring(name, home, plan.main_device, packed=packed, later=True)
                for device, ceiling in self.ceilings.items():
                    probe.trim(str(device), ceiling)
        expert.arrived()
        on_load(len(parts), len(parts), expert.name)
        self._synchronize()
        expert.close_files()
        # Leftovers of conversions would stand in the way of activations.
        probe.release_cached([b.device.torch_device for b in plan.budgets])

    def _in_turn(self, expert: Expert, placement: Placement) -> list[str]:
        """The parts in the order in which they are brought home: those that leave a GPU first, so that what arrives finds their room; then
        what else comes to GPUs, to all of them at once, so that all links are busy until the end.
        """
        homes = placement.homes
        coming = {
            name: 0 if expert.location(name) == self._device(home) and expert.is_current(name) else expert.part_bytes(name)
            for name, home in homes.items()
        }
        of_each, before, turns = Counter[int | str](), Counter[int | str](), dict[str, tuple[bool, bool, float]]()
        for name, home in homes.items():
            of_each[home] += coming[name]
        for name, home in homes.items():
            leaves = expert.location(name) not in (CPU, NOWHERE, self._device(home))
            turns[name] = (home != HOST, not leaves, 0.0 if home == HOST else before[home] / max(1, of_each[home]))
            before[home] += coming[name]
        return sorted(homes, key=turns.__getitem__)

    @staticmethod
    def _stands(expert: Expert, name: str, home: torch.device) -> bool:
        """Whether a part stands in one piece at home, or must wherever it goes."""
        return expert.packed(name) is not None and (expert.location(name) == home or not expert.is_cheap_to_read(name))

    def _host_bytes_after(self, expert: Expert, name: str, following: Sequence[str]) -> int:
        """What to make for the part that follows on the host, if there is room for it beside this one."""
        to_make = sum(expert.host_bytes_to_make(part) for part in following)
        has_room = to_make and self._host_has_room(sum(expert.part_bytes(part) for part in (name, *following)))
        return to_make if has_room else 0

    def _host_has_room(self, part_bytes: int) -> bool:
        plan, pool = self.planned(), self._host_pool

        def room() -> int:
            return system_memory().available + pool.prepared_bytes - pool.unfilled_bytes - plan.reserve.host_bytes - plan.frames_bytes

        if room() < part_bytes:
            pool.finish()  # what is being filled has part of its memory already
        if room() < part_bytes:
            pool.give_back_unused()
        return room() >= part_bytes

    # ---- what a run says of itself

    @property
    def block_speeds(self) -> dict[int, float]:
        """Device index -> its measured speed at blocks, in proportion to the others'; nothing where none was measured."""
        return self.computing.block_speeds

    def timings(self) -> dict[int, Timing]:
        """Device index -> what the latest forward took of it, where all devices compute at once."""
        return timings_of(self._calls)

    def notes(self) -> list[str]:
        """How the run computed where that is not as one would think, and what made it slower than this machine allows, in sentences."""
        plan = self.planned()
        notes = self.computing.few_bits_notes(plan) + self.computing.attention_notes(plan)
        functions = self.computing.functions
        if functions.failure and functions.compiled:
            without = [b.device.label for b in plan.budgets if torch.device(b.device.torch_device) in functions.without]
            notes.append(f"The blocks could not be compiled for {' and '.join(without)}, which costs some speed there: {functions.failure}")
        elif functions.failure:
            notes.append(f"The blocks could not be compiled, which costs some speed: {functions.failure}")
        if self._host_pool.unlocked_bytes:
            notes.append(
                f"{gib(self._host_pool.unlocked_bytes)} of system memory could not be page-locked, so blocks there arrive slower. Close other "
                "programs, or choose a smaller weight_dtype."
            )
        return notes

    # ---- making room

    def after_forward(self, part: str) -> None:
        """Let go of what a forward, or one that raised, was using."""
        self.experts[part].release_fetched()

    def _forward_bytes(self, placement: Placement, index: int) -> int:
        return self.computing.forward_bytes(self.planned(), placement, index)

    def _make_room_for_part(self, placement: Placement, part: str, name: str) -> None:
        home = placement.homes[name]
        if home == HOST:
            self._make_room_on_host(part, name)
            return
        index = int(home)
        budget = self.planned().budget(index)
        needed = self._forward_bytes(placement, index) + self.experts[part].part_bytes(name)
        self._park_until(index, needed, budget.usable_bytes, keep=part)

    def _make_room_on_host(self, part: str, name: str) -> None:
        """Where system memory is short, the other expert's parts there are dropped; its files have them."""
        expert = self.experts[part]
        if expert.is_cheap_to_read(name):
            return
        for other, waiting in self.experts.items():
            for parked in waiting.parts_on(CPU) if other != part else ():
                if self._host_has_room(expert.part_bytes(name)):
                    return
                self._undispatch(other)
                waiting.drop(parked)
                self._host_pool.clear()

    def make_room_for_frames(self) -> None:
        """Have system memory for the run's frames: what waits there unused is let go, and then weights, which are read from their files again
        when needed."""
        plan = self.planned()

        def is_short() -> bool:
            return system_memory().available < plan.frames_bytes + plan.reserve.host_bytes // 2

        if is_short():
            self._host_pool.clear()
            for expert in self.experts.values():
                expert.give_back_buffers()
        for part, expert in self.experts.items():
            for name in expert.parts_on(CPU):
                if not is_short():
                    return
                if expert.takes_host_memory(name):
                    self._undispatch(part)
                    expert.drop(name)
                    self._host_pool.clear()

    def close_files(self) -> None:
        """Let go of what reading takes: a run that ends before anything was read still has it."""
        for expert in self.experts.values():
            expert.close_files()

    def clear_fetch_rooms(self) -> None:
        """Give back what fetched weights, and what the workers exchange, stood in, on all devices."""
        self.finish_handover(wait=False)
        for expert in self.experts.values():
            expert.clear_fetch_room()
        for part in [part for part, placement in self._dispatched.items() if placement.parallel]:
            self._undispatch(part)
        self.computing.give_back_buffers()

    def make_room(self, index: int, needed_bytes: int, limit_bytes: int, keep: str | None = None) -> None:
        """Park weights from one device until ``needed_bytes`` more fit under the limit there.

        Args:
            index: the device.
            needed_bytes: what is about to be allocated.
            limit_bytes: the most that may be allocated there in all.
            keep: an expert whose parts that are at home stay ("transformer", "transformer_2").
        """
        if self._device(index) != CPU:
            self.clear_fetch_rooms()
            self._park_until(index, needed_bytes, limit_bytes, keep)

    def _park_until(self, index: int, needed_bytes: int, limit_bytes: int, keep: str | None) -> None:
        """As :meth:`make_room`, of weights alone: waits for nothing that is on its way."""
        device = self._device(index)
        for part, expert in self.experts.items():
            for name in expert.parts_on(device) if device != CPU else ():
                if self.resident_bytes(device) + needed_bytes <= limit_bytes:
                    return
                if part != keep or self.planned().placements[part].homes[name] != index:
                    self.park(part, name)

    def park(self, part: str, name: str) -> None:
        """Have a part of an expert leave its device: for system memory, or for its file, where that is as good or the only place."""
        self._undispatch(part)
        if self._worth_keeping(part, name):
            self.experts[part].park(name)
        else:
            self.experts[part].drop(name)

    def resident_bytes(self, device: torch.device) -> int:
        """Bytes of weights on a device, both experts."""
        return sum(expert.resident_bytes(device) for expert in self.experts.values())

    def host_memory_bytes(self) -> int:
        """What weights take of system memory, pages of mapped files left out."""
        found = ((expert, name) for expert in self.experts.values() for name in expert.parts_on(CPU))
        return sum(expert.part_bytes(name) for expert, name in found if expert.takes_host_memory(name))

    def release(self) -> None:
        """Let all weights go."""
        self.clear_fetch_rooms()
        for part, expert in self.experts.items():
            self._undispatch(part)
            for name in expert.parts:
                expert.drop(name)
            expert.close_files()
            expert.give_back_buffers()
        self._host_pool.clear()

    def planned(self) -> Plan:
        """The plan in force; there is one from the first :meth:`set_plan` on."""
        if self.plan is None:
            raise RuntimeError("a plan comes first")
        return self.plan

    def _device(self, home: int | str) -> torch.device:
        if home == HOST:
            return CPU
        return torch.device(self.planned().budget(int(home)).device.torch_device)

    def _synchronize(self) -> None:
        for budget in self.planned().budgets:
            probe.synchronize(budget.device.torch_device)
