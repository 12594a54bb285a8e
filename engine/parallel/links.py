"""Copies from one device to another that run beside the computing, in streams of their own.

A copy between two GPUs that torch queues runs on the source's current stream and waits for the current streams of both. So each pair
of devices has a stream on either side that nothing else uses: readers of one source don't wait for each other, nor for what it
computes.
"""

from collections.abc import Iterable
from typing import Protocol

import torch

from .. import probe
from ..host_memory import host_buffer
from .workers import Mark, mark, new_stream, wait

# Small copies go in chunks of so many bytes, large ones in more bytes a chunk: what queues them, and what they are queued in, has limits.
CHUNK_BYTES = 16 * 1024**2
LARGEST_CHUNK_BYTES = 32 * 1024**2
CHUNKS_OF_A_COPY = 12
# Buffers on the way of a staged copy.
RING = 3


class Link(Protocol):
    """Copies from one device to another, in the order they are asked for."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Iterable[Mark]) -> Mark:
        """Queue a copy of a contiguous tensor.

        Args:
            target: contiguous, same shape and dtype, on the link's target device. The caller keeps it, and the source, until
                what waits for the returned mark has been queued.
            after: the copy starts after these.

        Returns:
            The point at which the target is filled and the source no longer needed.
        """
        ...


def make_link(source: torch.device, target: torch.device, *, staged: bool | None = None) -> Link:
    """The way from one device to another.

    Args:
        source, target: devices; the host is the CPU device.
        staged: through page-locked system memory; by default where two GPUs can't reach each other's memory.
    """
    both_gpus = probe.is_cuda(str(source)) and probe.is_cuda(str(target))
    if staged is None:
        staged = not probe.reach_each_other(source, target)
    return StagedLink(source, target) if staged and both_gpus else DirectLink(source, target)


class DirectLink:
    """A plain copy: within a device, between the host and a GPU, or between GPUs that reach each other's memory.

    From the host it goes in chunks: keys and values that use the same PCIe lanes slip in between two of them, where they would
    wait for a whole block's weights.
    """

    def __init__(self, source: torch.device, target: torch.device):
        self._source = new_stream(source)
        self._target = new_stream(target)
        self._chunked = probe.is_cuda(str(source)) != probe.is_cuda(str(target))

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Iterable[Mark]) -> Mark:
        stream = self._target if self._target is not None else self._source
        if stream is None:
            target.copy_(source)
            return None
        wait(stream, after)
        # Both sides' current streams are made ours, the target's last; torch makes the copy wait for both of them.
        with torch.cuda.stream(self._source), torch.cuda.stream(stream):
            if self._chunked:
                for part_of_target, part_of_source in zip(_chunks(target), _chunks(source), strict=True):
                    part_of_target.copy_(part_of_source, non_blocking=True)
            else:
                target.copy_(source, non_blocking=True)
        return mark(stream)


class StagedLink:
    """Through a ring of page-locked buffers, a chunk on its way in while the one before it is on its way out.

    For GPUs that can't reach each other's memory, as no two GeForce cards can. The driver would stage such a copy too, at about half
    the speed.
    """

    def __init__(self, source: torch.device, target: torch.device):
        self._source = new_stream(source)
        self._target = new_stream(target)
        self._ring: list[torch.Tensor] = []
        self._emptied: list[Mark] = [None] * RING
        self._next = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Iterable[Mark]) -> Mark:
        after = tuple(after)
        wait(self._source, after)
        wait(self._target, after)
        pieces = list(zip(_chunks(target), _chunks(source), strict=True))
        self._have_room(max(into.numel() for into, _ in pieces))
        for into, out_of in pieces:
            slot = self._next
            self._next = (slot + 1) % RING
            chunk = self._ring[slot][: out_of.numel()]
            wait(self._source, [self._emptied[slot]])
            with torch.cuda.stream(self._source):
                chunk.copy_(out_of, non_blocking=True)
            wait(self._target, [mark(self._source)])
            with torch.cuda.stream(self._target):
                into.copy_(chunk, non_blocking=True)
            self._emptied[slot] = mark(self._target)
        return mark(self._target)

    def _have_room(self, chunk_bytes: int) -> None:
        """Buffers for chunks of this size; larger ones are made when a larger copy comes, after what uses the smaller ones."""
        if self._ring and self._ring[0].numel() >= chunk_bytes:
            return
        for stream in (self._source, self._target):
            if stream is not None:
                stream.synchronize()
        size = CHUNK_BYTES if chunk_bytes <= CHUNK_BYTES else LARGEST_CHUNK_BYTES
        self._ring = [host_buffer(size) for _ in range(RING)]


def _chunks(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The bytes of a contiguous tensor, in views of about the same size."""
    flat = tensor.view(-1).view(torch.uint8)
    size = flat.numel()
    count = max(1, -(-size // LARGEST_CHUNK_BYTES), min(CHUNKS_OF_A_COPY, -(-size // CHUNK_BYTES)))
    return flat.split(-(-size // count)) if size else (flat,)
