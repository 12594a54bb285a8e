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
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
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


def _make(size_bytes: int, made: "Future[torch.Tensor]") -> None:
    try:
        made.set_result(host_buffer(size_bytes))
    except BaseException as error:
        made.set_exception(error)


class _Behind:
    """Does things one after the other in another thread, behind whoever asks for them."""

    def __init__(self) -> None:
        # What each is about, in bytes, and the thing itself; the first one may be under way.
        self._jobs: deque[tuple[int, Callable[[], None]]] = deque()
        self._changing = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def waiting_bytes(self) -> int:
        """Of all that is not done."""
        with self._changing:
            return sum(size for size, _ in self._jobs)

    def add(self, size_bytes: int, job: Callable[[], None]) -> None:
        with self._changing:
            self._jobs.append((size_bytes, job))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="wan-sharded-locking", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # the system has no more threads; whoever finishes does it
                    self._thread = None

    def finish(self) -> None:
        """Wait until all are done."""
        thread = self._thread
        if thread is not None and thread.ident is not None:  # else it was interrupted before it began
            thread.join()
        self._work()

    def _work(self) -> None:
        while True:
            with self._changing:
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs[0][1]
            try:
                job()
            finally:
                with self._changing:
                    self._jobs.popleft()
                del job  # it may be all that holds a buffer


class HostPool:
    """Buffers of parts that have left system memory, kept for the next ones: making one costs more than filling it.

    Args:
        keep_bytes: the most that may wait unused.
    """

    def __init__(self, keep_bytes: int = 2 * 1024**3):
        self._keep_bytes = keep_bytes
        # Of all buffers made, those that could not be page-locked.
        self.unlocked_bytes = 0
        self._locking = _Behind()
        self._counting = threading.Lock()
        self._free: list[torch.Tensor] = []
        self._following = 0
        self._ahead: tuple[int, Future[torch.Tensor]] | None = None

    @property
    def unused_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._free)

    @property
    def unfilled_bytes(self) -> int:
        """What buffers that are to be locked behind may not have of the system's memory yet."""
        return self._locking.waiting_bytes

    def take(self, size_bytes: int, *, locked: bool = True) -> torch.Tensor:
        """A buffer as from :func:`host_buffer`; its contents are anything.

        Args:
            size_bytes: of it.
            locked: whether it must be now, where it can be; else :meth:`lock_behind` is to be called.
        """
        buffer = self._taken(size_bytes, locked=locked)
        following, self._following = self._following, 0
        if following and self._ahead is None and not any(buffer.numel() == following for buffer in self._free):
            made: Future[torch.Tensor] = Future()
            with suppress(RuntimeError):  # the system has no more threads; then it is made when it is needed
                threading.Thread(target=_make, args=(following, made), name="wan-sharded-memory", daemon=True).start()
                self._ahead = (following, made)
        return buffer

    def _taken(self, size_bytes: int, *, locked: bool) -> torch.Tensor:
        for buffer in self._free:
            if buffer.numel() == size_bytes:
                self._free = [other for other in self._free if other is not buffer]
                if locked and lock_filled(buffer):  # it came back before it was
                    self._count_unlocked(buffer)
                elif locked and torch.cuda.is_available() and not buffer.is_pinned():
                    self.finish()  # it may be about to be
                return buffer
        made = self._made_ahead(size_bytes)
        if made is None and not locked:
            return unlocked_buffer(size_bytes)
        buffer = host_buffer(size_bytes) if made is None else made
        self._count_unlocked(buffer)
        return buffer

    def _count_unlocked(self, buffer: torch.Tensor) -> None:
        if torch.cuda.is_available() and PAGE_LOCKING.allowed and not buffer.is_pinned():
            with self._counting:
                self.unlocked_bytes += buffer.numel()

    def lock_behind(self, buffer: torch.Tensor, filled: Callable[[], bool]) -> None:
        """Have a buffer page-locked once it is filled, behind whoever calls this; :meth:`finish` waits for it.

        Args:
            buffer: from :meth:`take`.
            filled: waits until nothing more is read into the buffer, and says whether it was filled. Called by another thread.
        """

        def lock() -> None:
            try:
                if filled() and lock_filled(buffer):
                    self._count_unlocked(buffer)
            except Exception as error:  # then it is not locked, which does no harm
                logger.warning("System memory could not be page-locked (%s); copies from it will be slower.", repr(error))
                with self._counting:
                    self.unlocked_bytes += buffer.numel()

        self._locking.add(buffer.numel(), lock)

    def finish(self) -> None:
        """Wait until nothing is read into buffers that are to be locked, and all that can be is locked."""
        self._locking.finish()

    @property
    def prepared_bytes(self) -> int:
        """What is held for the buffer that is taken next; waits until it is made."""
        if self._ahead is None or self._ahead[1].exception() is not None:
            return 0
        return self._ahead[0]

    def prepare(self, size_bytes: int) -> None:
        """After the buffer that is taken next, begin to make another one, for the time after that: it is there when something has been read.

        Args:
            size_bytes: of it; 0 = none.
        """
        self._following = size_bytes

    def forget_prepared(self) -> None:
        """Let go of what was prepared and is not needed after all."""
        self._following = 0
        self._made_ahead(0)

    def _made_ahead(self, size_bytes: int) -> torch.Tensor | None:
        """What was begun, once it is there; nothing if it was another size, or there was no memory for it."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        size, made = ahead
        failed = made.exception()  # waits: two at once would take the memory of two
        return made.result() if size == size_bytes and failed is None else None

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back that nothing uses any more, copies under way included."""
        if self.unused_bytes + buffer.numel() <= self._keep_bytes:
            self._free.append(buffer)

    def give_back_unused(self) -> None:
        """Give what waits unused back to the system."""
        self._free.clear()

    def clear(self) -> None:
        """Give all unused memory back to the system, and what is prepared."""
        try:
            self.finish()
        finally:
            self.give_back_unused()
            self.forget_prepared()
            PAGE_LOCKING.try_again()
