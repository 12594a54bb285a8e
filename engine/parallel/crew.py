"""The workers of a plan, the links between them, and the memory that both experts' forwards share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .. import probe
from ..planning.shares import MeasuredSeconds
from ..run_ahead import RunAhead
from .fetching import BUFFERS, Slot
from .groups import attention_rounds, head_groups
from .links import Link, make_link
from .workers import Worker


@dataclass
class Exchange:
    """One worker's copy of everybody's keys and values.

    Attributes:
        keys, values: a tensor [B, L, heads of the group, head width] per group of heads.
        both: what these are views of, [B, L, 2, heads of the group, head width] per group, so that some tokens' keys and values are one
            copy; nothing where nobody else reads them.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    both: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def to_be_read(cls, both: list[torch.Tensor]) -> "Exchange":
        """Keys and values in memory that others read."""
        return cls([group[:, :, 0] for group in both], [group[:, :, 1] for group in both], both)


@dataclass
class Share:
    """A worker and how it is to be loaded.

    Attributes:
        worker: who.
        speed: in any unit, relative to the others'.
        most: the largest fraction of the tokens its memory was planned for.
        range_tokens: how many tokens it works on at a time; 0 = as the memory plan has it.
        multiply_few_bits: whether it multiplies int8 or float8 weights as they are, rounding activations too; ``None`` = decided by
            measuring, for each expert.
        measured_few_bits: an expert's name -> what was decided.
    """

    worker: Worker
    speed: float
    most: float = 1.0
    range_tokens: int = 0
    multiply_few_bits: bool | None = None
    measured_few_bits: dict[str, bool] = field(default_factory=dict)

    def multiplies_few_bits(self, expert: str) -> bool:
        """Whether it multiplies this expert's weights of few bits as they are."""
        return self.measured_few_bits.get(expert, False) if self.multiply_few_bits is None else self.multiply_few_bits


@dataclass
class Crew:
    """Who computes, and with what.

    Attributes:
        shares: one per worker, the main worker among them.
        main: the worker that holds what comes before and after the blocks.
        staged: whether copies between GPUs go through system memory; ``None`` = where they must.
        ceilings: torch device -> the most the allocator should hold there.
        slot_bytes: the least that buffers for fetched blocks have room for: several experts share them.
    """

    shares: list[Share]
    main: Worker
    staged: bool | None = None
    ceilings: Mapping[torch.device, int] = field(default_factory=dict)
    slot_bytes: int = 0

    def __post_init__(self) -> None:
        self.measured = MeasuredSeconds()
        # Both experts' blocks take as long.
        self.run_ahead = RunAhead()
        self._links: dict[tuple[object, ...], Link] = {}
        self._exchanges: dict[int, Exchange] = {}
        self._exchange_key: tuple[object, ...] = ()
        self._slots: dict[int, list[Slot]] = {}

    @property
    def workers(self) -> list[Worker]:
        return [share.worker for share in self.shares]

    def slow_links(self) -> bool:
        """Whether what the workers exchange goes through system memory."""
        if self.staged is not None:
            return self.staged
        devices = [worker.device for worker in self.workers]
        return any(not probe.reach_each_other(a, b) for a in devices for b in devices)

    def head_groups(self, heads: int, queries: int) -> list[int]:
        """Heads per group, for so many queries of all workers: by what each would have, so that groups stay when shares change."""
        each, multiprocessors = -(-queries // len(self.shares)), [probe.multiprocessors(str(worker.device)) for worker in self.workers]
        return head_groups(heads, slow_links=self.slow_links(), rounds=lambda groups: attention_rounds(groups, each, multiprocessors))

    def link(self, purpose: str, source: torch.device, reader: Worker, writer: Worker | None = None) -> Link:
        """The link over which a worker reads; one per purpose, so that weights don't wait for keys and values."""
        key = (purpose, source, id(reader), id(writer))
        if key not in self._links:
            self._links[key] = make_link(source, reader.device, staged=self.staged)
        return self._links[key]

    def exchanges(self, batch: int, tokens: int, heads: Sequence[int], head_width: int, dtype: torch.dtype) -> list[Exchange]:
        """Every worker's keys and values for a size; made anew when the size changes."""
        key = (batch, tokens, tuple(heads), head_width, dtype, tuple(id(w) for w in self.workers))
        if key != self._exchange_key:
            self._exchanges.clear()
            self._exchange_key = key
        for number, worker in enumerate(self.workers):
            if number not in self._exchanges:
                with worker.computing():
                    rooms = [torch.empty(batch, tokens, 2, count, head_width, dtype=dtype, device=worker.device) for count in heads]
                self._exchanges[number] = Exchange.to_be_read(rooms)
        return [self._exchanges[number] for number in range(len(self.workers))]

    def slots(self, worker: Worker, size_bytes: int) -> list[Slot]:
        """A worker's buffers for fetched blocks, of ``size_bytes`` or :attr:`slot_bytes`, whichever is more."""
        size_bytes = max(size_bytes, self.slot_bytes)
        number = self.workers.index(worker)
        slots = self._slots.get(number, [])
        if any(slot.flat.numel() < size_bytes for slot in slots) or not slots:
            with worker.computing():
                rooms = [torch.empty(size_bytes, dtype=torch.uint8, device=worker.device) for _ in range(BUFFERS)]
            slots = [Slot(room, worker.mark()) for room in rooms]
            self._slots[number] = slots
        return slots

    def settle(self) -> None:
        """Wait until no device works for this crew any more."""
        for device in {str(worker.device) for worker in self.workers}:
            probe.synchronize(device)

    def give_back_buffers(self) -> None:
        """Give back what keys, values, fetched blocks and staged copies stood in.

        Nothing may be under way, and no forward made before be called again.
        """
        self._links.clear()
        self._exchanges.clear()
        self._exchange_key = ()
        self._slots.clear()
