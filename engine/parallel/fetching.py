"""A block's weights on the worker that is about to compute it, brought there one block ahead.

Each worker has two buffers of a block's size. While it computes from one, the next block that does not live there is on its way into
the other. Where workers exchange keys and values, which somebody waits for, only the first part of a block sets out before they have
arrived: on the same wires whole blocks would hold them up.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..weights.packing import Layout
from .links import Link
from .workers import Mark, Worker

BUFFERS = 2
# What of a block sets out while the keys and values of the block before are computed: one part in so many, about what that takes.
AHEAD_SHARE = 4


@dataclass
class Slot:
    """A buffer for one block's weights, and the point at which its last reader is done with it."""

    flat: torch.Tensor
    free: Mark = None


@dataclass(frozen=True)
class Source:
    """Where a block lives when it is not on the worker: in one piece, or (mapped from its file) as single tensors."""

    flat: torch.Tensor | None
    tensors: Mapping[str, torch.Tensor]

    @property
    def device(self) -> torch.device:
        return self.flat.device if self.flat is not None else next(iter(self.tensors.values())).device


class Fetcher:
    """Hands one worker the weights of one expert's blocks, in the order of the blocks.

    Args:
        worker: who computes.
        local: block number -> weights that live on the worker's device.
        remote: block number -> where the others live.
        layouts: of every remote block in a buffer.
        slots: the buffers; shared with the other expert's fetcher, never at the same time.
        link_from: the link from a device to this worker.
    """

    def __init__(
        self,
        worker: Worker,
        local: Mapping[int, Mapping[str, Any]],
        remote: Mapping[int, Source],
        layouts: Mapping[int, Layout],
        slots: list[Slot],
        link_from: Callable[[torch.device], Link],
    ):
        self._worker, self._remote, self._layouts, self._slots = worker, dict(remote), layouts, slots
        self._local: dict[int, dict[str, Any]] = {number: dict(weights) for number, weights in local.items()}
        self._links = {source.device: link_from(source.device) for source in remote.values()}
        # Blocks that lie alike share the views.
        self._bound = [{layout: layout.bind(slot.flat[: layout.total_bytes]) for layout in set(layouts.values())} for slot in slots]
        self._order = sorted(remote)
        self._started = 0
        self._arriving: dict[int, tuple[int, Mark]] = {}
        # Blocks whose first bytes have set out, and how many.
        self._held_back: dict[int, int] = {}
        self._in_use: dict[int, int] = {}

    def multiply_few_bits(self, wanted: bool) -> None:
        """Have the worker multiply int8 or float8 weights as they are, or widen them first (wan_block.py)."""
        for weights in (*self._local.values(), *(bound for slot in self._bound for bound in slot.values())):
            weights.pop("multiply_few_bits", None)
            if wanted:
                weights["multiply_few_bits"] = True

    def begin(self) -> None:
        """Start a forward: the first blocks set out."""
        self._started = 0
        self._arriving.clear()
        self._held_back.clear()
        self._in_use.clear()
        for number in range(min(len(self._slots), len(self._order))):
            self._start(number)
            if number == 0:
                self.go_on(())

    def _start(self, slot_number: int) -> None:
        if self._started == len(self._order):
            return
        block = self._order[self._started]
        self._started += 1
        slot, source, layout = self._slots[slot_number], self._remote[block], self._layouts[block]
        link = self._links[source.device]
        if source.flat is not None:
            first = self._held_back[block] = layout.total_bytes // AHEAD_SHARE
            arrived = link.copy(slot.flat[:first], source.flat[:first], [slot.free])
        else:
            # Not page-locked, so each copy waits for itself; the weights of a block that system memory had no room for.
            self._worker.wait(slot.free)
            with self._worker.computing():
                layout.fill(slot.flat[: layout.total_bytes], source.tensors)
            arrived = self._worker.mark()
        self._arriving[block] = (slot_number, arrived)

    def go_on(self, after: Sequence[Mark]) -> None:
        """Let the rest of the blocks that are on their way follow, after these points."""
        for block, first in self._held_back.items():
            slot_number, _ = self._arriving[block]
            source, size = self._remote[block].flat, self._layouts[block].total_bytes
            assert source is not None
            link = self._links[source.device]
            self._arriving[block] = (slot_number, link.copy(self._slots[slot_number].flat[first:size], source[first:size], after))
        self._held_back.clear()

    def weights(self, block: int) -> Mapping[str, Any]:
        """The block's weights, all of which are on their way; the worker's later work waits until they are there."""
        if block in self._local:
            return self._local[block]
        slot_number, arrived = self._arriving.pop(block)
        self._worker.wait(arrived)
        self._in_use[block] = slot_number
        return self._bound[slot_number][self._layouts[block]]

    def forget(self, block: int) -> None:
        """Drop what refers to a block's memory; it is not asked for any more."""
        self._local.pop(block, None)
        self._remote.pop(block, None)

    def done(self, block: int) -> None:
        """All work with a block's weights is queued: its buffer may be filled with the next block after that."""
        slot_number = self._in_use.pop(block, None)
        if slot_number is not None:
            self._slots[slot_number].free = self._worker.mark()
            self._start(slot_number)
