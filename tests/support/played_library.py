"""The C library's asynchronous reads, played where they have to fail or to wait, and a file that is wanted in pieces."""

import ctypes
import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from played_streams import PlayedStream
from read_files import PIECE, parts_of_one_file
from wan_sharded.engine.weights import library_reads
from wan_sharded.engine.weights.errands import Errand, Reading
from wan_sharded.engine.weights.library_calls import Control
from wan_sharded.engine.weights.library_reads import LibraryReads
from wan_sharded.engine.weights.pieces import Piece, Stretch


class PlayedCalls:
    """In the place of the C library: reads when it is told to.

    Attributes:
        asked: addresses of control blocks whose reads have not ended.
        waits: how long it was waited each time, in seconds; None where there was no limit.
        refuses: no thread can be had.
        asked_how: addresses of control blocks whose errors were asked for.
    """

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.waits: list[float | None] = []
        self.refuses = False
        self.asked_how: list[int] = []
        self.ended: set[int] = set()
        self._changed = threading.Condition()

    def read(self, address: int) -> int:
        if self.refuses:
            return -1
        with self._changed:
            Control.from_address(address).error = errno.EINPROGRESS
            self.asked.append(address)
            self._changed.notify_all()
        return 0

    def error(self, address: int) -> int:
        self.asked_how.append(address)
        return Control.from_address(address).error

    def wait(self, addresses: Any, count: int, limit: Any) -> int:
        seconds = None if limit is None else limit._obj.nanoseconds / 1e9
        with self._changed:
            assert {address for address in addresses if address} <= set(self.asked) | self.ended and any(addresses)
            self.waits.append(seconds)
            self._changed.wait(seconds or 0.05)
        return 0

    def asked_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.asked) >= count, timeout=20)

    def end(self, *, code: int = 0, bytes_missing: int = 0) -> None:
        """The read that was asked for first."""
        with self._changed:
            control = Control.from_address(self.asked.pop(0))
            wanted = control.size_bytes - bytes_missing
            content = os.pread(control.file, wanted, control.offset)
            ctypes.memmove(control.memory, content, len(content))
            assert control.notification == 1
            self.ended.add(ctypes.addressof(control))
            control.result, control.error = (-1 if code else len(content)), code
            self._changed.notify_all()


class Wanted:
    """A file in pieces, and where they go.

    Attributes:
        stream: in which they are sent.
        memory: of the target.
    """

    def __init__(self, path: Path, count: int, stream: Any = None, modified_ns: int = 0):
        _, _, self.content = parts_of_one_file(path, -(-count // 4))
        self.content = self.content[: count * PIECE]
        self.path, self.stream, self.reading = path, stream or PlayedStream(), Reading()
        self.memory = np.zeros(count * PIECE, dtype=np.uint8)
        self.target = torch.from_numpy(self.memory)
        parts = self.target.split(PIECE)
        self.errands = [
            Errand(Piece(path, modified_ns, number * PIECE, PIECE, ((0, Stretch.of(part)),)), self.reading, self.stream)
            for number, part in enumerate(parts)
        ]

    def begin(self, reads: LibraryReads, *, urgent: bool = False) -> None:
        self.reading.add(len(self.errands), self.target.numel())
        reads.begin(self.errands, urgent=urgent)

    def arrived(self) -> bool:
        self.reading.wait()
        self.stream.synchronize()
        return torch.equal(self.target, self.content)


def all_buffers_are_back(reads: LibraryReads) -> bool:
    end = time.monotonic() + 20
    while reads._at_work and time.monotonic() < end:
        time.sleep(0.001)
    assert not any(reads._sent.values())
    made = (library_reads.DEPTH + library_reads.SENT) * library_reads.THREADS - reads._buffers._unmade
    free = list(reads._buffers)
    assert not any(reads._in_use.values())
    return len(free) == len(set(map(id, free))) == made and all(buffer.errand is buffer.stream is None for buffer in free)
