"""One expert computed by a crew: a drop-in for calling a ``WanTransformer3DModel``.

Every worker computes every block on its share of the tokens. Self-attention needs everybody's keys and values: each worker writes
its own into its copy of them and pulls the others' slices beside its computing. Weights come from wherever they live, one block ahead.

Shapes: B batch, L tokens, l a worker's tokens, D width. Source: WanTransformer3DModel.forward in diffusers 0.42.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from .. import probe
from ..planning.shares import better_speeds, share_tokens, token_ranges
from ..transformer.lean_block import modulation_of
from ..transformer.lean_block import token_ranges as ranges_of
from ..transformer.wan_block import attend, rotary_tables
from ..weights.expert import Expert
from .crew import Crew, Exchange, Share, head_groups
from .fetching import Fetcher, Source
from .functions import BlockFunctions, can_compile, pays_off
from .workers import Mark, Moment, Worker

# So many blocks may be queued on the devices before the host waits: enough to keep them busy, few enough to stop within a moment.
RUN_AHEAD_BLOCKS = 2
# Blocks whose work is timed: the first ones to share the tokens out, later every so many to keep the shares right.
CALIBRATION_BLOCKS = 2
TIMED_EVERY = 5


@dataclass
class _Inputs:
    """What one worker needs of a forward's inputs, on its device."""

    temb: torch.Tensor
    text: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    out_shift: torch.Tensor
    out_scale: torch.Tensor
    out_weight: torch.Tensor
    out_bias: torch.Tensor


@dataclass
class _State:
    """One worker in one forward."""

    share: Share
    tokens: slice
    x: torch.Tensor
    inputs: _Inputs
    fetcher: Fetcher
    exchange: Exchange | None = None
    query: torch.Tensor | None = None
    weights: Any = None
    text_keys: Any = None
    projected: Mark = None
    attended: Mark = None
    pulled: list[Mark] = field(default_factory=list)
    arrived: list[list[Mark]] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    out: torch.Tensor | None = None

    @property
    def worker(self) -> Worker:
        return self.share.worker

    @property
    def count(self) -> int:
        return self.tokens.stop - self.tokens.start

    def forget_tensors(self) -> None:
        """Keep what was timed only."""
        del self.x, self.inputs, self.fetcher
        self.exchange = self.out = None


@dataclass(frozen=True)
class Timing:
    """What a forward took of one worker: its tokens, and the seconds it was busy with one block."""

    tokens: int
    seconds: float


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
        self._check_cancelled, self._forwards_left, self._on_stage = check_cancelled, forwards_left, on_stage
        blocks: Any = expert.model.blocks
        self._block_count = len(blocks)
        self._fetchers = [self._fetcher(worker) for worker in crew.workers]
        self.timings: list[Timing] = []
        self._timed: list[Worker] = []
        self._last: list[_State] = []

    def _fetcher(self, worker: Worker) -> Fetcher:
        expert, crew = self._expert, self._crew
        local, remote = {}, {}
        for number in range(self._block_count):
            part = f"blocks.{number}"
            if expert.location(part) == worker.device:
                local[number] = expert.block_weights(part)
            else:
                packed = expert.packed(part)
                remote[number] = Source(packed.flat, {}) if packed else Source(None, expert.block_weights(part))
        layout = expert.block_layout("blocks.0")
        slots = crew.slots(worker, layout.total_bytes) if remote else []
        return Fetcher(worker, local, remote, layout, slots, lambda source: crew.link("weights", source, worker))

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
        states = self._distribute(given)
        self._run_blocks(states, range(self._block_count), timed=range(1, self._block_count, TIMED_EVERY))
        out = self._gather(states)
        self._last = states
        for state in states:
            state.forget_tensors()
        return self._unpatch(out, latents)

    # ---- before the blocks

    def _embed(self, latents: Any, timestep: Any, text: Any, image: Any) -> Any:
        """All tokens [B, L, D], what every worker needs whole, and the rotary tables; on the main worker."""
        model: Any = self._expert.model
        cos, sin = rotary_tables(*model.rope(latents))
        tokens = model.patch_embedding(latents).flatten(2).transpose(1, 2)
        per_token = timestep.shape[1] if timestep.ndim == 2 else None
        temb, projected, text, image = model.condition_embedder(timestep.flatten(), text, image, timestep_seq_len=per_token)
        projected = projected.unflatten(-1, (6, -1))
        if image is not None:
            text = torch.cat([image, text], dim=1)
        if per_token is not None:
            out = model.scale_shift_table.unsqueeze(0) + temb.unsqueeze(2)  # [B, L, 2, D]
        else:
            out = model.scale_shift_table + temb.unsqueeze(1)  # [B, 2, D]
        return tokens, (projected, text, out, model.proj_out.weight.data, model.proj_out.bias.data), (cos, sin)

    def _distribute(self, given: list[torch.Tensor | None]) -> list[_State]:
        """Every worker's tokens and inputs to its device.

        Args:
            given: latents, timestep, text and image embeddings on the main worker's device.
        """
        crew = self._crew
        with crew.main.computing():
            tokens, shared, rotary = self._embed(*given)
        counts = share_tokens(tokens.shape[1], [s.speed for s in crew.shares], [s.most for s in crew.shares])
        states: list[_State] = []
        kept: list[torch.Tensor] = []
        marks: list[Mark] = []
        for share, span, fetcher in zip(crew.shares, token_ranges(counts), self._fetchers, strict=True):
            if span.stop == span.start:
                continue
            worker = share.worker
            with crew.main.computing():
                own = tokens[:, span].clone(memory_format=torch.contiguous_format)  # it is written to
            sent = self._sent_to(worker, [own, *self._inputs_for(span, shared, rotary)], kept, marks)
            states.append(_State(share, span, sent[0], _Inputs(*sent[1:]), fetcher, attended=worker.mark()))
        # What was sent from may go once the main worker knows it has arrived.
        crew.main.wait(*marks)
        kept.clear()
        self._prepare_exchange(states, tokens)
        return states

    @staticmethod
    def _inputs_for(span: slice, shared: Any, rotary: Any) -> list[torch.Tensor]:
        projected, text, out, weight, bias = shared
        shift, scale = (part.squeeze(-2) if out.ndim == 4 else part for part in modulation_of(out, span).chunk(2, dim=-2))
        return [modulation_of(projected, span), text, rotary[0][:, span], rotary[1][:, span], shift, scale, weight, bias]

    def _sent_to(self, worker: Worker, tensors: Sequence[torch.Tensor], kept: list[torch.Tensor], marks: list[Mark]) -> list[torch.Tensor]:
        """Contiguous copies on a worker's device; its own are the tensors themselves where they can be."""
        main = self._crew.main
        with main.computing():
            tensors = [tensor.contiguous() for tensor in tensors]
        if worker is main:
            return tensors
        ready = main.mark()
        link = self._crew.link("inputs", main.device, worker, main)
        with worker.computing():
            targets = [torch.empty_like(tensor, device=worker.device) for tensor in tensors]
        allocated = worker.mark()
        arrived = [link.copy(target, tensor, (ready, allocated)) for target, tensor in zip(targets, tensors, strict=True)]
        worker.wait(arrived[-1])
        kept.extend(tensors)
        marks.append(arrived[-1])
        return targets

    def _prepare_exchange(self, states: list[_State], tokens: torch.Tensor) -> None:
        if len(states) == 1:
            return
        math = self._functions.math
        groups = head_groups(math.heads, slow_links=self._crew.slow_links())
        width = tokens.shape[2] // math.heads
        rooms = self._crew.exchanges(tokens.shape[0], tokens.shape[1], groups, width, tokens.dtype)
        numbers = {id(share): number for number, share in enumerate(self._crew.shares)}
        for state in states:
            state.exchange = rooms[numbers[id(state.share)]]

    # ---- the blocks

    def _run_blocks(self, states: list[_State], blocks: range, timed: Sequence[int]) -> None:
        for state in states:
            state.fetcher.begin()
        queued: deque[list[Mark]] = deque()
        for block in blocks:
            self._check_cancelled()
            if len(queued) > RUN_AHEAD_BLOCKS:
                for event in queued.popleft():
                    if event is not None:
                        event.synchronize()
            self._trim(states)
            self._run_block(states, block, timed=block in timed)
            queued.append([state.worker.mark() for state in states])

    def _trim(self, states: list[_State]) -> None:
        for state in states:
            ceiling = self._crew.ceilings.get(state.worker.device)
            if ceiling is not None:
                probe.trim(str(state.worker.device), ceiling)

    def _run_block(self, states: list[_State], block: int, *, timed: bool) -> None:
        for state in states:
            with state.worker.computing():
                self._project(state, block, timed=timed)
        self._exchange(states)
        for state in states:
            with state.worker.computing():
                attended = self._attend(state, timed=timed)
                self._finish(state, attended)
                if timed:
                    state.moments.append(state.worker.now())
            state.fetcher.done(block)
            state.weights = state.text_keys = None

    def _ranges(self, state: _State) -> list[slice]:
        return list(ranges_of(state.count, state.share.range_tokens or None))

    def _project(self, state: _State, block: int, *, timed: bool) -> None:
        state.weights = state.fetcher.weights(block)
        # Its own slice is overwritten now, so the others must have read what it held.
        state.worker.wait(*state.pulled)
        state.pulled.clear()
        if timed:
            state.moments.append(state.worker.now())
        inputs, functions = state.inputs, self._functions
        query = keys = values = None
        spans = self._ranges(state)
        for span in spans:
            given = (state.weights, state.x[:, span], modulation_of(inputs.temb, span), inputs.cos[:, span], inputs.sin[:, span])
            if state.exchange is not None:
                first = state.tokens.start
                own = slice(first + span.start, first + span.stop)
                into = [tuple(room[:, own] for room in rooms) for rooms in (state.exchange.keys, state.exchange.values)]
                query = _placed(query, functions.project_into(*given, *into), span, state.count)
            else:
                q, k, v = functions.project(*given)
                query, keys, values = (_placed(whole, piece, span, state.count) for whole, piece in ((query, q), (keys, k), (values, v)))
        state.query = query
        if keys is not None and values is not None:
            state.exchange = Exchange([keys], [values])
        state.text_keys = functions.math.text_keys(state.weights, inputs.text)
        state.projected = state.worker.mark()
        if timed:
            state.moments.append(state.worker.now())

    def _exchange(self, states: list[_State]) -> None:
        """Every worker pulls the others' keys and values into its copy, group by group."""
        if len(states) == 1:
            return
        for reader in states:
            assert reader.exchange is not None
            reader.arrived = [[] for _ in reader.exchange.keys]
        for number in range(len(states[0].exchange.keys)):  # type: ignore[union-attr]
            for reader in states:
                for writer in states:
                    if writer is not reader:
                        self._pull(reader, writer, number)

    def _pull(self, reader: _State, writer: _State, group: int) -> None:
        link = self._crew.link("keys", writer.worker.device, reader.worker, writer.worker)
        assert reader.exchange is not None and writer.exchange is not None
        # The reader's copy is free once its attention over the last block is done.
        after = (writer.projected, reader.attended)
        arrived: Mark = None
        for target, source in (
            (reader.exchange.keys[group], writer.exchange.keys[group]),
            (reader.exchange.values[group], writer.exchange.values[group]),
        ):
            for one in range(target.shape[0]):  # a video's slice is contiguous, a batch's is not
                arrived = link.copy(target[one, writer.tokens], source[one, writer.tokens], after)
        reader.arrived[group].append(arrived)
        writer.pulled.append(arrived)

    def _attend(self, state: _State, *, timed: bool) -> torch.Tensor:
        """Attention of a worker's queries over all keys: [B, l, N, head width]."""
        assert state.exchange is not None and state.query is not None
        parts, first = [], 0
        for number, (keys, values) in enumerate(zip(state.exchange.keys, state.exchange.values, strict=True)):
            if state.arrived:
                state.worker.wait(*state.arrived[number])
            if timed and number == 0:
                state.moments.append(state.worker.now())
            last = first + keys.shape[2]
            parts.append(attend(state.query[:, :, first:last], keys, values))
            first = last
        state.attended = state.worker.mark()
        state.query = None
        if not state.arrived:
            state.exchange = None  # alone, keys and values are this block's only
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _finish(self, state: _State, attended: torch.Tensor) -> None:
        inputs = state.inputs
        spans = self._ranges(state)
        for span in spans:
            x = self._functions.finish(
                state.weights, state.x[:, span], attended[:, span], modulation_of(inputs.temb, span), state.text_keys
            )
            if len(spans) == 1:
                state.x = x
            else:
                state.x[:, span] = x

    # ---- after the blocks

    def _gather(self, states: list[_State]) -> torch.Tensor:
        """The output projection where the tokens are, its result on the main worker: [B, L, patch values]."""
        main, model = self._crew.main, self._expert.model
        config: Any = model.config
        for state in states:
            inputs = state.inputs
            with state.worker.computing():
                pieces = []
                for span in self._ranges(state):
                    x, shift, scale = state.x[:, span], inputs.out_shift, inputs.out_scale
                    if shift.shape[1] > 1:
                        shift, scale = shift[:, span], scale[:, span]
                    normed = F.layer_norm(x.float(), (x.shape[-1],), eps=config.eps)
                    normed = normed.mul_(1 + scale).add_(shift).type_as(x)
                    pieces.append(F.linear(normed, inputs.out_weight, inputs.out_bias))
                state.out = _joined(pieces)
        gathered = []
        for state in states:
            assert state.out is not None
            if state.worker is main:
                gathered.append(state.out)
                continue
            link = self._crew.link("outputs", state.worker.device, main, state.worker)
            with main.computing():
                target = torch.empty_like(state.out, device=main.device)
            arrived = link.copy(target, state.out, (state.worker.mark(), main.mark()))
            main.wait(arrived)
            state.worker.wait(arrived)
            gathered.append(target)
        with main.computing():
            return _joined(gathered)

    def _unpatch(self, out: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """[B, L, patch values] -> [B, C, F, H, W]."""
        config: Any = self._expert.model.config
        batch, _, frames, height, width = latents.shape
        t, h, w = config.patch_size
        with self._crew.main.computing():
            out = out.reshape(batch, frames // t, height // h, width // w, t, h, w, -1)
            return out.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    # ---- sharing out

    def _calibrate(self, given: list[torch.Tensor | None]) -> None:
        """Time the first blocks, share the tokens out by that, and compile if that pays."""
        seconds = self._time_blocks(given)
        functions = self._functions
        wanted = not functions.compiled and functions.failure is None and can_compile()
        devices = len({worker.device for worker in self._crew.workers})
        if wanted and pays_off(seconds * self._block_count, self._forwards_left(), devices):
            self._on_stage("Compiling the blocks")
            functions.compile()
        if functions.compiled:
            try:
                self._time_blocks(given)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers raise many kinds; the plain functions are what is certain
                self._crew.settle()
                words = str(error).strip() or "no reason given"
                functions.give_up(f"{type(error).__name__}: {words.splitlines()[0]}")
                self._time_blocks(given)

    def _time_blocks(self, given: list[torch.Tensor | None]) -> float:
        """Compute the first blocks for nothing but their times; returns the seconds the slowest worker is busy with one."""
        blocks = range(min(CALIBRATION_BLOCKS, self._block_count))
        states = self._distribute(given)
        self._run_blocks(states, blocks, timed=blocks[-1:])
        self._crew.settle()
        self._learn(states)
        return max(timing.seconds for timing in self.timings)

    def _learn_from_last(self) -> None:
        """What the last forward took; only now, so that its end was not waited for."""
        states, self._last = self._last, []
        if states:
            self._learn(states)

    def _learn(self, states: list[_State]) -> None:
        """Correct the speeds from what was timed; the next forward shares out by them."""
        self.timings = [Timing(state.count, _busy_seconds(state.moments)) for state in states]
        self._timed = [state.worker for state in states]
        for state in states:
            state.worker.is_timed = True
            state.moments.clear()
        shares = [state.share for state in states]
        if len(shares) < len(self._crew.shares):
            return
        speeds = better_speeds([t.tokens for t in self.timings], [t.seconds for t in self.timings], [s.most for s in shares])
        for share, speed in zip(shares, speeds or (), strict=False):
            share.speed = speed


def _placed(whole: torch.Tensor | None, piece: torch.Tensor, span: slice, count: int) -> torch.Tensor:
    """A range's result in the tensor of all ranges, which the first of several makes."""
    if piece.shape[1] == count:
        return piece
    if whole is None:
        whole = piece.new_empty(piece.shape[0], count, *piece.shape[2:])
    whole[:, span] = piece
    return whole


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=1)


def _busy_seconds(moments: list[Moment]) -> float:
    """Median over timed blocks of the time a worker computed: before and after it waited for the others."""
    totals = []
    for i in range(0, len(moments) - 3, 4):
        begin, projected, attending, end = moments[i : i + 4]
        totals.append(begin.seconds_until(projected) + attending.seconds_until(end))
    return sorted(totals)[len(totals) // 2] if totals else 0.0
