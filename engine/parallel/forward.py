"""One expert computed by a crew: a drop-in for calling a ``WanTransformer3DModel``.

Every worker computes every block on its share of the tokens; weights come from wherever they live, one block ahead. This file joins the
pieces, and keeps the shares right: some blocks of the first forward are timed before it begins, later forwards are corrected by the ones
before them.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from .. import probe
from ..planning.shares import SMALL_GAIN, better_speeds
from ..transformer.self_attention import self_attention
from ..weights.expert import Expert
from .blocks import BlockLoop
from .crew import Crew, Share
from .ends import Ends
from .fetching import Fetcher, Source
from .functions import BlockFunctions, pays_off
from .state import State, Timing, busy_seconds
from .workers import Mark, Worker

logger = logging.getLogger(__name__)

# Blocks whose work is timed: the first ones to share the tokens out, later every so many to keep the shares right.
CALIBRATION_BLOCKS = 2
TIMED_EVERY = 5
# Where blocks are short, more of them, for so long: while some are compiled for and allocate, the others wait, and one block says too little.
CALIBRATION_SECONDS = 1.0
# So much of the time must be saved by other shares, by these; by the first ones alone, where others follow, so much as two GPUs that are a
# fifth apart do. Equal GPUs have been 5 % apart in them, and were not afterwards.
CALIBRATED_GAIN = 0.05
# How far from widening a weight its product in few bits may be, relative to what the blocks add: about as far as rounding the weights to
# that type moves the output (benchmarks/precision.py).
FEW_BITS_ERROR = {torch.float8_e4m3fn: 0.05, torch.int8: 0.02}
# And how much faster it must be.
FASTER_BY = 0.97


class BlockWatcher(Protocol):
    """Wants to know how far a forward is."""

    def block_done(self, number: int, marks: Sequence[Mark]) -> None:
        """All work of a block is queued, up to these points."""
        ...


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
        functions.devices = {worker.device for worker in crew.workers}
        self._forwards_left, self._on_stage = forwards_left, on_stage
        blocks: Any = expert.model.blocks
        self._block_count = len(blocks)
        self._fetchers = [self._fetcher(worker) for worker in crew.workers]
        self._ends = Ends(expert, crew, self._fetchers)
        self._blocks = BlockLoop(crew, functions, check_cancelled)
        # For the next call only.
        self.watcher: BlockWatcher | None = None
        self.timings: list[Timing] = []
        self._timed: list[Worker] = []
        self._last: list[State] = []
        self._few_bits_settled = False

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
        fetcher = Fetcher(worker, local, remote, layouts, slots, lambda source: crew.link("weights", source, worker))
        fetcher.multiply_few_bits(any(share.multiplies_few_bits(expert.name) for share in crew.shares if share.worker is worker))
        return fetcher

    def forget(self, block: int) -> None:
        """Drop what refers to a block's weights. This expert must be activated anew before its next forward."""
        for fetcher in self._fetchers:
            fetcher.forget(block)

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
        self._find_attention()
        if not any(share.worker.is_timed for share in self._crew.shares):
            self._calibrate(given)
        else:
            self._consider_compiling()  # the run before this one may have been too short for it
        self._consider_few_bits(given)
        states = self._ends.hand_out(given)
        watcher, self.watcher = self.watcher, None
        timed = range(1, self._block_count, TIMED_EVERY)
        self._blocks.run(states, range(self._block_count), timed, *([watcher.block_done] if watcher is not None else []))
        out = self._ends.gather(states, latents)
        self._last = states
        for state in states:
            state.forget_tensors()
        return out

    def _find_attention(self) -> None:
        """Before blocks are timed, and while a forward's memory is free yet."""
        config: Any = self._expert.model.config
        for worker in self._crew.workers:
            with worker.computing():
                self_attention(worker.device, self._expert.precision.dtype, config.attention_head_dim)

    # ---- sharing out

    def _calibrate(self, given: list[torch.Tensor | None]) -> None:
        """Time the first blocks and share the tokens out by that; once more if they are compiled now."""
        try:
            self._time_blocks(given)
            if self._consider_compiling() or self._functions.compiled:
                self._time_blocks(given)
            self._time_more_blocks(given)
        except BaseException:
            for worker in self._crew.workers:  # the next forward begins with it again
                worker.is_timed = False
            raise

    def _consider_compiling(self) -> bool:
        """Compile from here on if that pays by what was timed; whether it is so now."""
        functions = self._functions
        if not self.timings or not functions.may_compile:
            return False
        if not self._pays_to_compile():
            return False
        self._on_stage("Compiling the blocks")
        functions.compile()
        return functions.compiled

    def _pays_to_compile(self) -> bool:
        seconds = max(timing.seconds for timing in self.timings) * self._block_count
        return pays_off(seconds, self._forwards_left(), len({worker.device for worker in self._crew.workers}))

    def _time_blocks(self, given: list[torch.Tensor | None]) -> None:
        """Compute the first blocks for nothing but the last one's times."""
        self._crew.measured.forget()
        states, _ = self._first_blocks(given)
        others_follow = _affordable_blocks(busy_seconds(state.timed) for state in states) > CALIBRATION_BLOCKS
        self._learn(states, SMALL_GAIN if others_follow else CALIBRATED_GAIN)

    def _time_more_blocks(self, given: list[torch.Tensor | None]) -> None:
        """The same for as many blocks as a second allows, where they are short and say how to share out."""
        affordable = _affordable_blocks(timing.seconds for timing in self.timings)
        if len(self.timings) == len(self._crew.shares) > 1 and affordable > CALIBRATION_BLOCKS:
            self._crew.measured.forget()
            self._learn(self._first_blocks(given, affordable)[0], CALIBRATED_GAIN)

    def _first_blocks(self, given: list[torch.Tensor | None], most: int = CALIBRATION_BLOCKS) -> tuple[list[State], list[torch.Tensor]]:
        """Compute the first blocks; the states, with times of the later half, and what the blocks added to some of each worker's tokens."""
        count = min(most, self._block_count)
        states = self._ends.hand_out(given)
        before = [_some_tokens(state) for state in states]
        self._blocks.run(states, _while_time_lasts(range(count)), timed=range(count))
        added = [_some_tokens(state) - entered for state, entered in zip(states, before, strict=True)]
        self._crew.settle()
        for state in states:
            state.timed = state.timed[len(state.timed) // 2 :]
            state.forget_tensors()
        return states, added

    # ---- weights in few bits

    def _consider_few_bits(self, given: list[torch.Tensor | None]) -> None:
        """Decide for this expert, once it has been timed.

        Not compiled, rounding the activations takes longer than it saves, and memory that is not planned for.
        """
        if self._few_bits_settled or not self.timings or not self._functions.compiled:
            return
        able = [share for share in self._crew.shares if self._may_multiply_few_bits(share)]
        # Where the other expert has been measured, what is compiled serves this one too.
        if able and not any(share.measured_few_bits for share in able) and not self._pays_to_compile():
            return
        self._few_bits_settled = True
        if able:
            try:
                self._decide_on_few_bits(able, given)
            except BaseException:  # cancelled, or out of memory: nothing is decided
                self._forget_few_bits(able)
                raise

    def _may_multiply_few_bits(self, share: Share) -> bool:
        decided = share.multiply_few_bits is not None or self._expert.name in share.measured_few_bits
        if decided or self._expert.precision.dtype != torch.bfloat16:
            return False
        if not self._functions.compiled_on(share.worker.device):
            return False
        dtypes = {tensor.dtype for name, tensor in self._expert.block_weights("blocks.0").items() if name.endswith(".weight")}
        return any(dtype in FEW_BITS_ERROR and probe.multiplies_few_bits(share.worker.device, dtype) for dtype in dtypes)

    def _decide_on_few_bits(self, able: list[Share], given: list[torch.Tensor | None]) -> None:
        """Let a worker multiply weights of few bits as they are where that is faster, and as near to widening them as it must be.

        Measured on the first blocks of this run, with its own activations: what rounding them costs depends on the model.
        """
        weights = self._expert.block_weights("blocks.0")
        allowed = max(FEW_BITS_ERROR[t.dtype] for name, t in weights.items() if name.endswith(".weight") and t.dtype in FEW_BITS_ERROR)
        self._set_few_bits(able, True)
        self._first_blocks(given)  # compiled anew for this, maybe
        failed = [share for share in able if not self._functions.compiled_on(share.worker.device)]
        if failed:
            self._forget_few_bits(failed)  # eagerly it is not considered
            able = [share for share in able if not any(share is one for one in failed)]
            if not able:
                return
            self._few_bits_settled = True
        quick_states, quick = self._first_blocks(given)
        self._set_few_bits(able, False)
        self._first_blocks(given)
        plain_states, plain = self._first_blocks(given)
        better: list[Share] = []
        for one, other, added, expected in zip(quick_states, plain_states, quick, plain, strict=True):
            error = float((added - expected).norm() / expected.norm())
            faster = busy_seconds(one.timed) < busy_seconds(other.timed) * FASTER_BY
            logger.info(
                "GPU %d: products of few bits take %.1f ms a block instead of %.1f, error %.1e",
                one.worker.index, busy_seconds(one.timed) * 1e3, busy_seconds(other.timed) * 1e3, error,
            )  # fmt: skip
            if any(one.share is share for share in able) and faster and error <= allowed:
                better.append(one.share)
        self._set_few_bits(better, True)
        self._time_blocks(given)
        self._time_more_blocks(given)

    def _forget_few_bits(self, shares: Sequence[Share]) -> None:
        self._set_few_bits(shares, False)
        for share in shares:
            share.measured_few_bits.pop(self._expert.name)
        self._few_bits_settled = False

    def _set_few_bits(self, shares: Sequence[Share], wanted: bool) -> None:
        for share, fetcher in zip(self._crew.shares, self._fetchers, strict=True):
            if any(share is one for one in shares):
                share.measured_few_bits[self._expert.name] = wanted
                fetcher.multiply_few_bits(wanted)

    def _learn_from_last(self) -> None:
        """What the last forward took; only now, so that its end was not waited for."""
        states, self._last = self._last, []
        if states:
            self._learn(states)

    def _learn(self, states: list[State], gain: float | None = None) -> None:
        """Correct the speeds from what was timed, if that gains so much, or enough after so many forwards; the next one shares out by them."""
        self.timings = [Timing(state.count, busy_seconds(state.timed)) for state in states]
        self._timed = [state.worker for state in states]
        for state in states:
            state.worker.is_timed = True
            state.timed.clear()
        shares = [state.share for state in states]
        if len(shares) < len(self._crew.shares):
            return
        measured, tokens = self._crew.measured, [timing.tokens for timing in self.timings]
        measured.add(tokens, [timing.seconds for timing in self.timings])
        all_from = 0.0
        if gain is None:
            gain, all_from = measured.worthwhile_gain(max(measured.usual, default=0.0) * self._block_count), measured.all_from
        speeds = better_speeds(tokens, measured.usual, [share.most for share in shares], gain, all_from)
        for share, speed in zip(shares, speeds or (), strict=False):
            share.speed = speed


def _affordable_blocks(seconds: Iterable[float]) -> int:
    """How many blocks may be timed together that take each worker so long."""
    return int(CALIBRATION_SECONDS / max(1e-9, *seconds))


def _while_time_lasts(blocks: Sequence[int]) -> Iterator[int]:
    """The first few, and more until their second is over: beside what is computed, weights and keys may take long to come."""
    ends = time.perf_counter() + CALIBRATION_SECONDS
    for number, block in enumerate(blocks):
        if number >= CALIBRATION_BLOCKS and time.perf_counter() > ends:
            return
        yield block


def _some_tokens(state: State) -> torch.Tensor:
    """A thousand of a worker's tokens, spread evenly, on the host: float32 [B, some, D]."""
    with state.worker.computing():
        return state.x[:, :: max(1, state.count // 1024)].float().cpu()
