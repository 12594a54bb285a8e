"""The blocks of one forward, computed by all workers.

For each block every worker projects its tokens: first to keys and values, which it writes into its copy of everybody's, then to queries. It
pulls the others' slices, head group by head group, beside its computing; attends; and finishes the block for its tokens. What must wait for
what is told to the devices; the host only waits so as not to queue too far ahead.
"""

from collections.abc import Callable, Container, Iterable, Sequence

import torch

from .. import probe
from ..transformer.lean_block import modulation_of
from ..transformer.self_attention import self_attention
from .crew import Crew, Exchange
from .functions import BlockFunctions
from .state import State, placed
from .workers import Mark


class BlockLoop:
    """Runs blocks over the workers' states.

    Args:
        crew: who computes.
        functions: the block's halves.
        check_cancelled: raises when the run should stop; asked before every block.
    """

    def __init__(self, crew: Crew, functions: BlockFunctions, check_cancelled: Callable[[], None]):
        self._crew, self._functions, self._check_cancelled = crew, functions, check_cancelled

    def run(
        self,
        states: list[State],
        blocks: Iterable[int],
        timed: Container[int],
        block_done: Callable[[int, Sequence[Mark]], None] = lambda block, marks: None,
    ) -> None:
        """Compute some blocks, in order.

        Args:
            states: the workers with tokens; their ``x`` changes.
            blocks: from the first one on.
            timed: those of them whose work is timed.
            block_done: told when all work of a block is queued, and up to which points.
        """
        for state in states:
            state.fetcher.begin()
        ahead = self._crew.run_ahead
        ahead.begin()
        for block in blocks:
            ahead.wait()
            self._check_cancelled()
            self._trim(states)
            self._run_block(states, block, timed=block in timed)
            marks = [state.worker.mark() for state in states]
            ahead.queued(marks)
            block_done(block, marks)

    def _trim(self, states: list[State]) -> None:
        for state in states:
            ceiling = self._crew.ceilings.get(state.worker.device)
            if ceiling is not None:
                probe.trim(str(state.worker.device), ceiling)

    def _run_block(self, states: list[State], block: int, *, timed: bool) -> None:
        for state in states:
            with state.worker.computing():
                self._project(state, block, timed=timed)
        exchanged = self._exchange(states)
        for state in states:
            state.fetcher.go_on(exchanged)
        for state in states:
            with state.worker.computing():
                attended = self._attend(state, timed=timed)
                self._finish(state, attended)
                if timed:
                    state.lap()
            state.fetcher.done(block)
            state.weights = state.text_keys = None

    def _project(self, state: State, block: int, *, timed: bool) -> None:
        state.weights = state.fetcher.weights(block)
        # Its own slice is overwritten now, so the others must have read what it held.
        state.worker.wait(*state.pulled)
        state.pulled.clear()
        if timed:
            state.timed.append([])
            state.lap()
        if state.exchange is None:
            self._project_alone(state)
        else:
            self._project_for_all(state)
        # Beside the exchange.
        state.text_keys = self._functions.math.text_keys(state.weights, state.inputs.text)
        if timed:
            state.lap()

    def _project_alone(self, state: State) -> None:
        inputs = state.inputs
        query = keys = values = None
        for span in state.ranges():
            temb, cos, sin = modulation_of(inputs.temb, span), inputs.cos[:, span], inputs.sin[:, span]
            q, k, v = self._functions.project(state.weights, state.x[:, span], temb, cos, sin)
            query, keys, values = (placed(whole, piece, span, state.count) for whole, piece in ((query, q), (keys, k), (values, v)))
        assert keys is not None and values is not None
        state.query, state.exchange = query, Exchange([keys], [values])

    def _project_for_all(self, state: State) -> None:
        """Keys and values before the queries: the others pull them while the last range's are made."""
        inputs, functions, first = state.inputs, self._functions, state.tokens.start
        assert state.exchange is not None
        spans = state.ranges()
        query = None
        for span in spans:
            own = slice(first + span.start, first + span.stop)
            rooms = tuple(both[:, own] for both in state.exchange.both)
            temb, cos, sin = modulation_of(inputs.temb, span), inputs.cos[:, span], inputs.sin[:, span]
            modulated = functions.keys_into(state.weights, state.x[:, span], temb, cos, sin, rooms)
            if span is spans[-1]:
                state.projected = state.worker.mark()
            query = placed(query, functions.query(state.weights, modulated, cos, sin), span, state.count)
            del modulated
        state.query = query

    def _exchange(self, states: list[State]) -> list[Mark]:
        """Every worker pulls the others' keys and values into its copy, group by group; the points at which all have arrived."""
        if len(states) == 1:
            return []
        for reader in states:
            assert reader.exchange is not None
            reader.arrived = [[] for _ in reader.exchange.both]
        for number in range(len(states[0].exchange.both)):  # type: ignore[union-attr]
            for reader in states:
                for writer in states:
                    if writer is not reader:
                        self._pull(reader, writer, number)
        return [arrived for reader in states for arrived in reader.arrived[-1]]

    def _pull(self, reader: State, writer: State, group: int) -> None:
        link = self._crew.link("keys", writer.worker.device, reader.worker, writer.worker)
        assert reader.exchange is not None and writer.exchange is not None
        # The reader's copy is free once its attention over the last block is done.
        after = (writer.projected, reader.attended)
        arrived: Mark = None
        # One copy for each video of a batch, whose slices are contiguous.
        for target, source in zip(reader.exchange.both[group], writer.exchange.both[group], strict=True):
            arrived = link.copy(target[writer.tokens], source[writer.tokens], after)
        reader.arrived[group].append(arrived)
        writer.pulled.append(arrived)

    def _attend(self, state: State, *, timed: bool) -> torch.Tensor:
        """Attention of a worker's queries over all keys: [B, l, N, head width]."""
        assert state.exchange is not None and state.query is not None
        query = state.query
        attention = self_attention(query.device, query.dtype, query.shape[-1])
        parts, first = [], 0
        for number, (keys, values) in enumerate(zip(state.exchange.keys, state.exchange.values, strict=True)):
            if state.arrived:
                if timed and number > 0:
                    state.lap()
                state.worker.wait(*state.arrived[number])
            if timed and (state.arrived or number == 0):
                state.lap()
            last = first + keys.shape[2]
            parts.append(attention(query[:, :, first:last], keys, values))
            first = last
        state.attended = state.worker.mark()
        state.query = query = None
        if not state.arrived:
            state.exchange = None  # alone, keys and values are this block's only
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _finish(self, state: State, attended: torch.Tensor) -> None:
        inputs = state.inputs
        spans = state.ranges()
        for span in spans:
            x = self._functions.finish(
                state.weights, state.x[:, span], attended[:, span], modulation_of(inputs.temb, span), state.text_keys
            )
            if len(spans) == 1:
                state.x = x
            else:
                state.x[:, span] = x
