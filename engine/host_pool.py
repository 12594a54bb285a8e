"""System memory for parts that GPUs fetch, kept for the next ones, made ahead of what is to come, and page-locked behind what is read into it."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

import torch

from . import host_memory

logger = logging.getLogger(__name__)


def _make(size_bytes: int, made: "Future[torch.Tensor]") -> None:
    try:
        made.set_result(host_memory.host_buffer(size_bytes))
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
        """A buffer as from :func:`host_memory.host_buffer`; its contents are anything.

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
                if locked and host_memory.lock_filled(buffer):  # it came back before it was
                    self._count_unlocked(buffer)
                elif locked and torch.cuda.is_available() and not buffer.is_pinned():
                    self.finish()  # it may be about to be
                return buffer
        made = self._made_ahead(size_bytes)
        if made is None and not locked:
            return host_memory.unlocked_buffer(size_bytes)
        buffer = host_memory.host_buffer(size_bytes) if made is None else made
        self._count_unlocked(buffer)
        return buffer

    def _count_unlocked(self, buffer: torch.Tensor) -> None:
        if torch.cuda.is_available() and host_memory.PAGE_LOCKING.allowed and not buffer.is_pinned():
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
                if filled() and host_memory.lock_filled(buffer):
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
            host_memory.PAGE_LOCKING.try_again()
