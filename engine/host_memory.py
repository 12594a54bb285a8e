"""System memory that GPUs copy from and to at the link's full speed.

torch's own pinned allocations are rounded up to powers of two, which for a 0.7 GB block wastes a third. Here ordinary memory
is registered with the driver instead, to the byte, and unregistered when its last tensor is gone.

The driver alone would fetch pages that are not there yet one by one, many times slower than several threads do that touch them first, or
read a file into them.
"""

import logging
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import psutil
import torch

from . import memory_errors

THREADS = min(12, os.cpu_count() or 1)
# What one thread does at a time: a block has many of them for each thread, so that all are done at about the same time.
PIECE_BYTES = 8 * 1024**2
# Windows locks about half of all memory, often less, and everything fails beyond. What copies go through comes last, and must be locked.
WINDOWS_SHARE = 0.4
KEPT_FOR_COPIES_BYTES = 1024**3
SMALL_BYTES = 64 * 1024**2
logger = logging.getLogger(__name__)


class PageLocking:
    """How much of this process's system memory is page-locked, and may be.

    Attributes:
        allowed: False where the user wants none.
        others_bytes: what the application around us has locked.
        locked_bytes: by us, now.
    """

    def __init__(self, *, windows: bool = os.name == "nt"):
        self.allowed = True
        self.others_bytes: Callable[[], int] = lambda: 0
        self.locked_bytes = 0
        self._windows = windows
        self._refused = False
        # Memory is made, and goes, in several threads; it may go while this one holds the lock.
        self._counting = threading.RLock()

    def may_lock(self, size_bytes: int) -> bool:
        """Whether to ask for so much: not where it is known to fail."""
        if not self.allowed:
            return False
        if size_bytes <= SMALL_BYTES:
            return True
        if self._windows:
            most = WINDOWS_SHARE * psutil.virtual_memory().total - KEPT_FOR_COPIES_BYTES
            if self.others_bytes() + self.locked_bytes + size_bytes > most:
                return False
        return not self._refused

    def lock(self, memory: np.ndarray[Any, Any]) -> None:
        """Register memory with the driver until it is gone; says so where that is refused, which does no harm."""
        with suppress(RuntimeError):  # GPU memory is short
            memory_errors.spare()
        runtime: Any = torch.cuda.cudart()
        pointer, size = memory.ctypes.data, memory.nbytes
        portable = 1  # for all GPUs
        error = runtime.cudaHostRegister(pointer, size, portable)
        if int(error) == 0:
            self._count(size)
            # Called at the very beginning of the array's end, while the memory still is there.
            weakref.finalize(memory, self._unlock, runtime, pointer, size).atexit = False
        else:
            memory_errors.discard()
            self._refused = True
            logger.warning("%.1f GiB of system memory could not be page-locked (%s); copies from it will be slower.", size / 1024**3, error)

    def _unlock(self, runtime: Any, pointer: int, size_bytes: int) -> None:
        runtime.cudaHostUnregister(pointer)
        self._count(-size_bytes)

    def _count(self, size_bytes: int) -> None:
        with self._counting:
            self.locked_bytes += size_bytes

    def try_again(self) -> None:
        """What was refused may be granted now: memory was given back."""
        self._refused = False


PAGE_LOCKING = PageLocking()


def host_buffer(size_bytes: int) -> torch.Tensor:
    """Uninitialised system memory, uint8 [size_bytes], page-locked where CUDA is in use and allows it.

    A GPU's copy from memory that could not be locked works too, but waits for itself; ``tensor.is_pinned()`` tells.
    """
    memory = np.empty(max(1, size_bytes), dtype=np.uint8)
    if torch.cuda.is_available() and PAGE_LOCKING.may_lock(memory.nbytes):
        _touch(memory)
        PAGE_LOCKING.lock(memory)
    return torch.from_numpy(memory)[:size_bytes]


def unlocked_buffer(size_bytes: int) -> torch.Tensor:
    """As :func:`host_buffer`, but not page-locked: for :func:`lock_filled`, once something has been read into it."""
    memory = np.empty(max(1, size_bytes), dtype=np.uint8)
    tensor = torch.from_numpy(memory)[:size_bytes]
    _UNLOCKED[tensor.data_ptr()] = memory
    return tensor


def lock_filled(buffer: torch.Tensor) -> bool:
    """Page-lock a buffer where CUDA is in use and allows it. Its pages should be there: something was written to all of it.

    Returns:
        Whether this was to be decided: the buffer is from :func:`unlocked_buffer`, and this the first time.
    """
    memory = _UNLOCKED.pop(buffer.data_ptr(), None)
    if memory is not None and torch.cuda.is_available() and PAGE_LOCKING.may_lock(memory.nbytes):
        PAGE_LOCKING.lock(memory)
    return memory is not None


# Address -> what lock_filled is to lock: the array goes with the last tensor in it.
_UNLOCKED: "weakref.WeakValueDictionary[int, np.ndarray[Any, Any]]" = weakref.WeakValueDictionary()


def _touch(memory: np.ndarray[Any, Any]) -> None:
    """Have the system give the memory's pages now, to several threads."""
    pieces = [memory[begin : begin + PIECE_BYTES] for begin in range(0, memory.nbytes, PIECE_BYTES)]
    if len(pieces) > 1:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda piece: piece[:: mmap.PAGESIZE].fill(0), pieces))


def copy_on_host(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy between pieces of system memory, (target, source), uint8 and contiguous, of the same size each: one thread alone is not as fast as
    memory is."""
    pieces = [piece for target, source in pairs for piece in zip(target.split(PIECE_BYTES), source.split(PIECE_BYTES), strict=True)]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda piece: np.copyto(piece[0].numpy(), piece[1].numpy()), pieces))
