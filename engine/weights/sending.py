"""Pieces of files that were read into page-locked memory, on their way to GPUs.

One thread sends what others have read: many that talk to a GPU are in each other's way. Called by the reader of tensors (reading.py).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock

import torch

from ..host_memory import host_buffer
from . import pieces
from .pieces import Piece


class Buffer:
    """Page-locked memory for one piece, made when it is first used.

    Attributes:
        memory: uint8.
        bytes: the same, for reading into.
    """

    def __init__(self) -> None:
        self.memory: torch.Tensor | None = None
        self.bytes = memoryview(b"")

    def room(self, size_bytes: int) -> memoryview:
        """So much of it, no more than a piece."""
        if self.memory is None:
            self.memory = host_buffer(pieces.PIECE_BYTES)
            self.bytes = self.memory.numpy().data
        return self.bytes[:size_bytes]


@dataclass(frozen=True, eq=False)
class Sending:
    """What was read of a piece, on its way to a GPU.

    Attributes:
        buffer: where it was read to.
        piece: what it is, and where its parts go.
        stream: of the GPU, in which it is sent.
        done: to be called once it is queued there, or with the error why it can't be.
    """

    buffer: Buffer
    piece: Piece
    stream: "torch.cuda.Stream"
    done: Callable[[BaseException | None], None]


class Sender:
    """Sends pieces in a thread of its own, and has their buffers back.

    Args:
        buffers: how many there are.
    """

    def __init__(self, buffers: int):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="wan-sharded-sender")
        self._pool.submit(lambda: None)  # a thread that can't be had is said here
        self._free: SimpleQueue[Buffer] = SimpleQueue()
        for _ in range(buffers):
            self._free.put(Buffer())
        self._outbox: SimpleQueue[Sending] = SimpleQueue()
        self._asked = False
        self._sending = Lock()
        # Buffers whose copies are queued and may be under way.
        self._sent: list[tuple[torch.cuda.Event, list[Buffer]]] = []

    def close(self) -> None:
        """Wait for what is under way, and give thread and buffers back."""
        self._pool.shutdown()
        while not self._free.empty():
            self._free.get()

    def buffer(self) -> Buffer:
        """One that nothing uses, once there is one. It is to come back with :meth:`send`, or with :meth:`give`."""
        return self._free.get()

    def give(self, buffer: Buffer) -> None:
        """Take a buffer back that holds nothing."""
        self._free.put(buffer)

    def send(self, sending: Sending) -> None:
        """Have a piece sent soon."""
        self._outbox.put(sending)
        if not self._asked:
            self._asked = True
            try:
                self._pool.submit(self._send)
            except RuntimeError:  # Python is about to end
                self._send()

    def _send(self) -> None:
        """Send all that waits for it. Python lets other threads in at each of torch's calls, and waits to be let in again: so, few of them."""
        with self._sending:
            self._asked = False  # before looking: what comes later asks anew
            waiting: list[Sending] = []
            while not self._outbox.empty():
                waiting.append(self._outbox.get())
            for stream in dict.fromkeys(one.stream for one in waiting):
                self._send_together(stream, [one for one in waiting if one.stream == stream])
            # Copies that something else was queued behind keep the link busy meanwhile.
            while len(self._sent) > 1 or (self._sent and self._outbox.empty()):
                event, buffers = self._sent.pop(0)
                with suppress(RuntimeError):  # the GPU failed, which whoever uses it next is told too
                    event.synchronize()
                for buffer in buffers:
                    self._free.put(buffer)

    def _send_together(self, stream: "torch.cuda.Stream", sendings: Sequence[Sending]) -> None:
        error = None
        try:
            self._sent.append((_queue_copies(stream, sendings), [one.buffer for one in sendings]))
        except BaseException as failed:
            error = failed
            with suppress(RuntimeError):  # some copies may be under way
                stream.synchronize()
            for one in sendings:
                self._free.put(one.buffer)
        for one in sendings:
            one.done(error)
        del error  # which knows this frame, and so all that is in it


def _queue_copies(stream: "torch.cuda.Stream", sendings: Sequence[Sending]) -> "torch.cuda.Event":
    """From buffers to where the parts of what is in them go; the event is when all are there."""
    targets, sources = [], []
    for one in sendings:
        assert one.buffer.memory is not None
        whole = one.buffer.memory
        for place, target in one.piece.targets:
            targets.append(target.view())
            sources.append(whole if target.size_bytes == whole.numel() else whole[place : place + target.size_bytes])
    copied = torch.cuda.Event()
    # Inference mode is a thread's own, and what was made in it may be written to only there.
    with torch.inference_mode(), torch.cuda.stream(stream):
        torch._foreach_copy_(targets, sources, non_blocking=True)
        copied.record(stream)
    return copied
