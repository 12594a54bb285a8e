"""Who computes a model's blocks by its plan: the workers, how much each works on at a time, and what was measured of them."""

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

import torch

from .checkpoints.stored import HIGH_NOISE
from .parallel.crew import Crew, Share
from .parallel.forward import ParallelForward
from .parallel.functions import BlockFunctions
from .parallel.state import Timing
from .parallel.workers import Worker
from .planning.footprint import affordable_range_tokens, wider_ranges_bytes
from .planning.placement import Placement
from .plans import Plan
from .transformer.self_attention import choices
from .weights.expert import Expert
from .weights.precision import Precision


class Computing:
    """The workers for the plans of one model. Kept, with what was measured of them, while devices and size stay.

    Args:
        experts: of the model.
        precision: in which they compute.
        ceilings: the most the allocator should hold on each device during the current run; read anew before every block.
        learned_reserve_bytes: device index -> what was given up there after running out of memory.
    """

    def __init__(
        self,
        experts: Mapping[str, Expert],
        precision: Precision,
        ceilings: Mapping[torch.device, int],
        learned_reserve_bytes: Mapping[int, int],
    ):
        self._experts, self._precision, self._ceilings, self._learned = experts, precision, ceilings, learned_reserve_bytes
        self.functions = BlockFunctions(experts[HIGH_NOISE].math, compilable=all(expert.compilable for expert in experts.values()))
        # Of the current run; decides whether compiling pays.
        self.forwards_left = 0
        self.crew: Crew | None = None
        self._key: tuple[Any, ...] = ()

    def forward(self, expert: Expert, plan: Plan, check_cancelled: Callable[[], None], on_stage: Callable[[str], None]) -> ParallelForward:
        """What calls like the expert's model, once its parts are at home.

        Args:
            expert: one of the two.
            plan: whose devices all compute.
            check_cancelled, on_stage: as for :class:`ParallelForward`.
        """
        crew = self._crew_of(plan)
        return ParallelForward(
            expert, crew, self.functions, check_cancelled=check_cancelled, forwards_left=lambda: self.forwards_left, on_stage=on_stage
        )

    def _crew_of(self, plan: Plan) -> Crew:
        placement = plan.placements[HIGH_NOISE]
        key = (tuple(b.device.torch_device for b in plan.budgets), placement.main_device, plan.shape)
        if self.crew is None or self._key != key:
            indices, measured = [b.device.index for b in plan.budgets], self.block_speeds
            speeds = measured if all(index in measured for index in indices) else plan.shares  # which are of other units
            shares = [Share(Worker(b.device.index, torch.device(b.device.torch_device)), speeds[b.device.index]) for b in plan.budgets]
            main = next(share.worker for share in shares if share.worker.index == placement.main_device)
            self.crew, self._key = Crew(shares, main, ceilings=self._ceilings), key
        self.crew.slot_bytes = max(expert.largest_block_bytes for expert in self._experts.values())
        for share in self.crew.shares:
            index = share.worker.index
            share.most = plan.most_share(index)
            share.range_tokens, _ = self._ranges(plan, index)
        return self.crew

    @property
    def block_speeds(self) -> dict[int, float]:
        """Device index -> its speed at blocks, as measured so far, in proportion to the others'; of another size, a guess for this one. Nothing
        where none was."""
        if self.crew is None or not all(worker.is_timed for worker in self.crew.workers):
            return {}
        return {share.worker.index: share.speed for share in self.crew.shares}

    def _ranges(self, plan: Plan, index: int) -> tuple[int, int]:
        """How many tokens a device works on at a time, and the bytes that takes over what is planned for."""
        own = ceil(plan.most_share(index) * plan.shape.tokens)
        # As planned where memory is short, or has been.
        spare = 0 if self._learned.get(index) else plan.spare_bytes(index)
        sizing = (plan.shape.batch_size, self._experts[HIGH_NOISE].width, self._precision.dtype.itemsize)
        tokens = affordable_range_tokens(own, spare, *sizing)
        return tokens, wider_ranges_bytes(own, tokens, *sizing)

    def forward_bytes(self, plan: Plan, placement: Placement, index: int) -> int:
        """What a forward takes on a device besides weights, with an expert placed so. What waits there must leave it free."""
        return placement.reserve_bytes.get(index, 0) + (self._ranges(plan, index)[1] if placement.parallel else 0)

    def few_bits_notes(self, plan: Plan) -> list[str]:
        """Which GPUs rounded more than the weights, in a sentence."""
        names = [expert.name for expert in self._experts.values()]
        # One at a time, a GPU always widens them.
        shares = (
            []
            if self.crew is None or not plan.parallel
            else [share for share in self.crew.shares if any(map(share.multiplies_few_bits, names))]
        )
        gpus = " and ".join(plan.budget(share.worker.index).device.label for share in shares)
        return (
            [f"{gpus} multiplied the weights in few bits as they are: measured to be faster, and near enough to widening them."]
            if shares
            else []
        )

    def attention_notes(self, plan: Plan) -> list[str]:
        """Which GPUs computed attention otherwise than torch does, and which could not, in sentences."""
        made = choices((torch.device(budget.device.torch_device) for budget in plan.budgets), self._precision.dtype)
        by = [(budget.device.label, made.get(torch.device(budget.device.torch_device))) for budget in plan.budgets]
        flash = " and ".join(label for label, choice in by if choice and choice.flash)
        notes = [f"{flash} computed attention by FlashAttention 3: measured to be faster than torch's own."] if flash else []
        refused = [(label, choice) for label, choice in by if choice and choice.refused]
        return notes + [
            f"FlashAttention 3 failed on {label}, and torch's own attention went on: {choice.refused}."
            if choice.gave_up
            else f"FlashAttention 3 is installed and was not used on {label}: {choice.refused}."
            for label, choice in refused
        ]

    def settle(self) -> None:
        """Wait until no device works any more."""
        if self.crew is not None:
            self.crew.settle()

    def give_back_buffers(self) -> None:
        """Give back what the workers exchange and fetch into. Nothing may be under way, and no forward made before be called again."""
        if self.crew is not None:
            self.crew.settle()
            self.crew.give_back_buffers()


def timings_of(calls: Mapping[str, Callable[..., Any]]) -> dict[int, Timing]:
    """Device index -> what the latest forward took of it, where all devices compute at once."""
    found: dict[int, Timing] = {}
    for call in calls.values():
        if isinstance(call, ParallelForward):
            found.update(call.latest_timings())
    return found
