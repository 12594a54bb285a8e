"""One expert computed by a crew: a drop-in for calling a ``WanTransformer3DModel``.

Every worker computes every block on its share of the tokens; weights come from wherever they live, one block ahead. This file joins the
pieces, and keeps the shares right: the first blocks of the first forward are timed before it begins, later forwards are corrected by
the ones before them.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from ..planning.shares import better_speeds
from ..weights.expert import Expert
from .blocks import BlockLoop
from .crew import Crew
from .ends import Ends
from .fetching import Fetcher, Source
from .functions import BlockFunctions, pays_off
from .state import State, Timing, busy_seconds
from .workers import Worker

# Blocks whose work is timed: the first ones to share the tokens out, later every so many to keep the shares right.
CALIBRATION_BLOCKS = 2
TIMED_EVERY = 5


class ParallelForward:
    """Calls like the expert's model.

    Args:
        expert: whose parts are at their homes.
        crew: who computes.
        functions: the block's halves; shared by both experts.
        check_cancelled: raises when the run should stop; asked before every block.
        forwards_left: how many forwards are still to come, for deciding whether compiling pays.
        on_stage: told in a sentence what takes a while.
    """

    def __init__(
        self,
        expert: Expert,
        crew: Crew,
        functions: BlockFunctions,
        *,
        check_cancelled: Callable[[], None] = lambda: None,
        forwards_left: Callable[[], int] = lambda: 0,
        on_stage: Callable[[str], None] = lambda words: None,
    ):
        self._expert, self._crew, self._functions = expert, crew, functions
        self._forwards_left, self._on_stage = forwards_left, on_stage
        blocks: Any = expert.model.blocks
        self._block_count = len(blocks)
        self._ends = Ends(expert, crew, [self._fetcher(worker) for worker in crew.workers])
        self._blocks = BlockLoop(crew, functions, check_cancelled)
        self.timings: list[Timing] = []
        self._timed: list[Worker] = []
        self._last: list[State] = []

    def _fetcher(self, worker: Worker) -> Fetcher:
        expert, crew = self._expert, self._crew
        local, remote, layouts = {}, {}, {}
        for number in range(self._block_count):
            part = f"blocks.{number}"
            if expert.location(part) == worker.device:
                local[number] = expert.block_weights(part)
            else:
                packed = expert.packed(part)
                remote[number] = Source(packed.flat, {}) if packed else Source(None, expert.block_weights(part))
                layouts[number] = expert.layout(part)
        largest = max((layout.total_bytes for layout in layouts.values()), default=0)
        slots = crew.slots(worker, largest) if remote else []
        share = next(share for share in crew.shares if share.worker is worker)
        return Fetcher(
            worker,
            local,
            remote,
            layouts,
            slots,
            lambda source: crew.link("weights", source, worker),
            multiply_few_bits=share.multiply_few_bits,
        )

    def latest_timings(self) -> dict[int, Timing]:
        """Device index -> what was timed of it in the latest forward."""
        self._learn_from_last()
        return dict(zip((worker.index for worker in self._timed), self.timings, strict=True))

    # ---- the call

    def __call__(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """As ``WanTransformer3DModel.forward``; the output is on the device of ``hidden_states``, [B, C, F, H, W].

        Raises:
            torch.OutOfMemoryError: on any device; nothing is under way any more, and calling again works.
        """
        asked_from = hidden_states.device
        try:
            self._crew.main.take_over()
            with torch.no_grad():
                output = self._forward(hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image)
        except BaseException:
            self._crew.settle()
            raise
        self._crew.main.hand_over(output)
        output = output.to(asked_from)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _forward(self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        main = self._crew.main
        self._learn_from_last()
        given = [None if tensor is None else tensor.to(main.device) for tensor in (latents, timestep, text, image)]
        if not any(share.worker.is_timed for share in self._crew.shares):
            self._calibrate(given)
        else:
            self._consider_compiling()  # the run before this one may have been too short for it
        states = self._ends.hand_out(given)
        self._blocks.run(states, range(self._block_count), timed=range(1, self._block_count, TIMED_EVERY))
        out = self._ends.gather(states, latents)
        self._last = states
        for state in states:
            state.forget_tensors()
        return out

    # ---- sharing out

    def _calibrate(self, given: list[torch.Tensor | None]) -> None:
        """Time the first blocks and share the tokens out by that; once more if they are compiled now."""
        self._time_blocks(given)
        if self._consider_compiling() or self._functions.compiled:
            self._time_blocks(given)

    def _consider_compiling(self) -> bool:
        """Compile from here on if that pays by what was timed; whether it is so now."""
        functions = self._functions
        if not self.timings or not functions.may_compile:
            return False
        seconds = max(timing.seconds for timing in self.timings) * self._block_count
        if not pays_off(seconds, self._forwards_left(), len({worker.device for worker in self._crew.workers})):
            return False
        self._on_stage("Compiling the blocks")
        functions.compile()
        return functions.compiled

    def _time_blocks(self, given: list[torch.Tensor | None]) -> None:
        """Compute the first blocks for nothing but the last one's times."""
        blocks = range(min(CALIBRATION_BLOCKS, self._block_count))
        states = self._ends.hand_out(given)
        self._blocks.run(states, blocks, timed=blocks[-1:])
        self._crew.settle()
        self._learn(states)

    def _learn_from_last(self) -> None:
        """What the last forward took; only now, so that its end was not waited for."""
        states, self._last = self._last, []
        if states:
            self._learn(states)

    def _learn(self, states: list[State]) -> None:
        """Correct the speeds from what was timed; the next forward shares out by them."""
        self.timings = [Timing(state.count, busy_seconds(state.timed)) for state in states]
        self._timed = [state.worker for state in states]
        for state in states:
            state.worker.is_timed = True
            state.timed.clear()
        shares = [state.share for state in states]
        if len(shares) < len(self._crew.shares):
            return
        speeds = better_speeds([t.tokens for t in self.timings], [t.seconds for t in self.timings], [s.most for s in shares])
        for share, speed in zip(shares, speeds or (), strict=False):
            share.speed = speed
