"""Reading for GPUs by the C library's threads, and sending what was read: both by one thread of Python's, which hardly lets go of its lock.

Between many threads of Python's, each of which reads for a millisecond, most time goes by in waiting to be let into Python again. Where the
libraries for this are not at hand, as on Windows, such threads read all the same (thread_reads.py).
"""

import ctypes
import errno
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from ..host_memory import host_buffer
from . import pieces
from .driver_copies import Copied, DriverCopies
from .errands import Errand, Errands
from .library_calls import NO_NOTIFICATION, AsynchronousReads, Control, Time, asynchronous_reads, cuda_driver
from .pieces import Piece

# As many as a usual computer's processor has cores; a few more than Python's threads, since none of these waits for Python.
THREADS = min(14, os.cpu_count() or 1)
# What is read into stays in the processor's cache until it is sent, if all buffers together are small; a piece costs Python some microseconds.
PIECE_BYTES = 4 * 1024**2
# Begun for each thread at once, so that none waits for Python.
DEPTH = 2
# What is on its way to GPUs meanwhile, for each thread.
SENT = 1
# Something else may be to be read before what is being read now has come: looked for so often where there is room for it.
LOOK = Time(0, 5_000_000)
# And so often whether copies have arrived, while there is nothing else to wait for.
LOOK_AT_COPIES_S = 0.001
_ERROR, _RESULT = Control.error.offset // 4, Control.result.offset // 8


def available() -> bool:
    """Whether all that this needs is there. To be asked where something goes to GPUs: finding out makes a thread."""
    return cuda_driver() is not None and asynchronous_reads() is not None


class _Buffer:
    """Page-locked memory for one piece, and what reads into it.

    Args:
        memory: uint8, of a piece.
        is_locked: whether it really is page-locked.

    Attributes:
        memory: as given.
        address: of its first byte.
        is_locked: as given.
        control_address: of the control block.
        errand: that it is read for.
        stream: that it is read to be sent in, until it is given back.
    """

    def __init__(self, memory: torch.Tensor, *, is_locked: bool) -> None:
        self.memory, self.is_locked = memory, is_locked
        self.address = memory.data_ptr()
        self._bytes = self.memory.numpy().data
        control = bytearray(ctypes.sizeof(Control))
        self._control = Control.from_buffer(control)
        self._control.memory, self._control.notification = self.address, NO_NOTIFICATION
        self.control_address = ctypes.addressof(self._control)
        self._ints, self._longs = memoryview(control).cast("i"), memoryview(control).cast("q")
        self.errand: Errand | None = None
        self.stream: torch.cuda.Stream | None = None
        self._file: IO[bytes] | None = None
        self._is_begun = False

    @property
    def piece(self) -> Piece:
        assert self.errand is not None
        return self.errand.piece

    def begin(self, errand: Errand, file: IO[bytes], calls: AsynchronousReads) -> None:
        control, piece = self._control, errand.piece
        control.file, control.size_bytes, control.offset = file.fileno(), piece.size_bytes, piece.offset
        self.errand, self._file = errand, file
        self._is_begun = not calls.read(self.control_address)

    def is_over(self) -> bool:
        return not self._is_begun or self._ints[_ERROR] != errno.EINPROGRESS

    def end(self) -> None:
        """See to it that all is there.

        Raises:
            OSError, EOFError: it can't be read.
        """
        file, read, piece = self._file, 0, self.piece
        assert file is not None
        self._file = None
        if self._is_begun:
            if code := self._ints[_ERROR]:
                raise OSError(code, os.strerror(code))
            read = self._longs[_RESULT]
        if read != piece.size_bytes:  # no thread could be had, or the file is shorter than it was
            pieces.read_at(file, self._bytes[read : piece.size_bytes], piece.offset + read)

    def let_go(self) -> None:
        """Give the memory back; nobody is to use this any more, whoever may know it."""
        self._bytes.release()
        del self._bytes, self.memory


class Buffers:
    """What pieces are read into: made where it is needed, and kept for whoever reads next, since page-locking takes longer than reading.

    For one :class:`LibraryReads` at a time.
    """

    def __init__(self) -> None:
        # Used again last in, first out: what was just sent is still in the processor's cache.
        self._free: list[_Buffer] = []
        self._most = self._unmade = (DEPTH + SENT) * THREADS

    def __bool__(self) -> bool:
        """Whether there is one to be taken."""
        return bool(self._free or self._unmade)

    def __iter__(self) -> Iterator[_Buffer]:
        """Those that wait to be taken."""
        return iter(self._free)

    def take(self, wanted: int) -> _Buffer:
        """One of them.

        Args:
            wanted: how many will be taken soon: so many are made and page-locked as one, if any must be. Together they are touched by several
                threads first, which takes a third of the time.
        """
        if not self._free:
            self.make(wanted)
        return self._free.pop()

    def make(self, wanted: int) -> bool:
        """Make so many, no more than one for each thread, as far as they may still be made: whether there are more to be."""
        if count := min(THREADS, self._unmade, wanted):
            memory = host_buffer(count * PIECE_BYTES)
            is_locked = memory.is_pinned()
            self.give([_Buffer(part, is_locked=is_locked) for part in memory.split(PIECE_BYTES)])
            self._unmade -= count
        return bool(self._unmade)

    def give(self, buffers: Iterable[_Buffer]) -> None:
        """Have these taken next."""
        self._free += buffers

    def settle(self) -> None:
        """When nothing is under way: have those made anew that could not be page-locked, which may go well next time, or that did not come
        back after an error."""
        self._free = [buffer for buffer in self._free if buffer.is_locked]
        self._unmade = self._most - len(self._free)

    def let_go(self) -> None:
        """Give the memory of all that wait back, now: an error that is being handled may know this, and some of them."""
        while self._free:
            self._free.pop().let_go()


class _Lane:
    """What is read one behind the other: the library reads from each open file in one thread, so each lane has its own.

    Attributes:
        reading: in their order.
    """

    def __init__(self) -> None:
        self.reading: deque[_Buffer] = deque()
        self._files: dict[tuple[Path, int], IO[bytes]] = {}

    def file(self, path: Path, modified_ns: int) -> IO[bytes]:
        if (path, modified_ns) not in self._files:
            file = path.open("rb", buffering=0)
            self._files[path, modified_ns] = file
            try:
                pieces.check_unchanged(path, os.fstat(file.fileno()), modified_ns)
            except BaseException:
                self._files.pop((path, modified_ns)).close()
                raise
        return self._files[path, modified_ns]

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()


class LibraryReads:
    """Does errands for GPUs, several at a time: in :data:`THREADS` threads of the C library's, or as many as it has.

    Args:
        buffers: to read into.

    Raises:
        RuntimeError: there is no thread to be had.
    """

    def __init__(self, buffers: Buffers) -> None:
        calls = asynchronous_reads()
        assert calls is not None
        self._calls, self._copies = calls, DriverCopies(cuda_driver())
        self._errands = Errands()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="wan-sharded-reader")
        self._thread.submit(lambda: None)  # a thread that can't be had is said here
        self._lanes = [_Lane() for _ in range(THREADS)]
        self._waiting = (ctypes.c_void_p * THREADS)()
        self._buffers = buffers
        # How many buffers are filled, or sent, for each stream.
        self._in_use: Counter[torch.cuda.Stream | None] = Counter()
        # By stream: a GPU may be busy for long, while another one is not.
        self._sent: dict[torch.cuda.Stream, deque[tuple[list[_Buffer], Copied]]] = {}
        self._more = threading.Event()
        self._at_work = self._closing = False

    def close(self) -> None:
        """Give files and the thread back, when nothing is left to be done. All buffers may be let go then."""
        self._closing = True
        self._thread.shutdown()  # which ends when all copies have arrived
        for lane in self._lanes:
            lane.close()
        for buffer in self._buffers:  # the library may just be leaving its control block
            self._calls.error(buffer.control_address)
        self._buffers.settle()

    def prepare(self) -> None:
        """Have the buffers made before there is anything to be read, until there is."""
        self._thread.submit(self._make_buffers)

    def _make_buffers(self) -> None:
        # An error is for whoever reads and meets it again.
        while not self._is_wanted() and self._buffers.make(THREADS):
            if not all(buffer.is_locked for buffer in self._buffers):
                break
        self._buffers.settle()  # what could not be locked now may be when it is needed

    def _is_wanted(self) -> bool:
        """Whether the thread has something else to do."""
        with self._errands.lock:
            return self._closing or bool(self._errands)

    def begin(self, wanted: Sequence[Errand], *, urgent: bool) -> None:
        """Have errands done; where that can't be, none of them is still to be done.

        Raises:
            RuntimeError: Python is about to end.
        """
        with self._errands.lock:
            self._errands.add(wanted, urgent=urgent)
            self._more.set()
            if self._at_work:
                return
            self._at_work = True
        try:
            self._thread.submit(self._work)
        except BaseException:
            with self._errands.lock:
                self._at_work = False
                self._errands.leave_out(wanted)
            raise

    def _work(self) -> None:
        """Go on while there is something to be done."""
        try:
            self._go_on()
        except BaseException as error:  # nobody else would end what was begun
            self._fail(error)

    def _go_on(self) -> None:
        while True:
            self._more.clear()
            self._take_back()
            has_room = self._begin_reads()
            if over := [lane for lane in self._lanes if lane.reading and lane.reading[0].is_over()]:
                self._end_reads(over)
            elif any(lane.reading for lane in self._lanes):
                self._wait_for_reads(ctypes.byref(LOOK) if has_room else None)
            elif any(self._sent.values()):
                self._more.wait(LOOK_AT_COPIES_S)
            else:
                with self._errands.lock:
                    if not self._errands:
                        self._at_work = False
                        return

    def _wait_for_reads(self, limit: Any) -> None:
        for number, lane in enumerate(self._lanes):
            self._waiting[number] = lane.reading[0].control_address if lane.reading else None
        self._calls.wait(self._waiting, len(self._lanes), limit)

    def _fail(self, error: BaseException) -> None:
        """End what was begun, and what was to be."""
        for lane in self._lanes:
            while lane.reading:
                if lane.reading[0].is_over():
                    buffer = lane.reading.popleft()
                    if buffer.errand is not None:
                        buffer.errand.reading.done(error)
                    self._give_back([buffer])
                else:  # without asking anything that may be what went wrong
                    time.sleep(LOOK_AT_COPIES_S)
        try:
            for stream, sent in self._sent.items():
                with suppress(RuntimeError):  # the GPU failed, which whoever uses it next is told too
                    stream.synchronize()
                while sent:
                    self._give_back(sent.popleft()[0])
        finally:
            with self._errands.lock:
                self._at_work = False
                while (errand := self._errands.take()) is not None:
                    errand.reading.done(error)

    def _begin_reads(self) -> bool:
        """As many as there is room for: whether there is more."""
        for depth in range(1, DEPTH + 1):  # nobody is to have two while another one has none
            for lane in self._lanes:
                while len(lane.reading) < depth:
                    with self._errands.lock:
                        self._errands.leave_out_stopped()
                        if not self._errands:
                            return True
                        if not self._buffers:
                            return False
                        errand, more = self._errands.take(self._in_use), len(self._errands)
                    assert errand is not None
                    self._begin_read(lane, errand, more)
        return False

    def _begin_read(self, lane: _Lane, errand: Errand, more: int) -> None:
        """One, where there are so many more to be read."""
        piece, buffer = errand.piece, None
        try:
            buffer = self._buffers.take(1 + more)
            buffer.stream = errand.stream
            self._in_use[errand.stream] += 1
            with pieces.named(piece.path):
                file = lane.file(piece.path, piece.modified_ns)
            lane.reading.append(buffer)  # before it is begun: from then on nobody else may have it
            buffer.begin(errand, file, self._calls)
        except BaseException as error:
            if buffer is not None:
                if buffer in lane.reading:
                    lane.reading.remove(buffer)
                self._give_back([buffer])
            errand.reading.done(error)

    def _end_reads(self, lanes: Sequence[_Lane]) -> None:
        """Send what is there in these lanes, and say so."""
        filled: dict[torch.cuda.Stream, list[_Buffer]] = {}
        for lane in lanes:
            buffer = lane.reading.popleft()
            errand = buffer.errand
            assert errand is not None and errand.stream is not None
            try:
                with pieces.named(errand.piece.path):
                    buffer.end()
                filled.setdefault(errand.stream, []).append(buffer)
            except BaseException as error:
                self._give_back([buffer])
                errand.reading.done(error)
        for stream, buffers in filled.items():
            self._send(stream, buffers)

    def _send(self, stream: "torch.cuda.Stream", buffers: list[_Buffer]) -> None:
        readings = [buffer.errand.reading for buffer in buffers if buffer.errand is not None]
        error = None
        try:
            copied = self._copies.queue(stream, buffers)
            self._sent.setdefault(stream, deque()).append((buffers, copied))
        except BaseException as failed:
            error = failed
            with suppress(RuntimeError):  # some copies may be under way
                stream.synchronize()
            self._give_back(buffers)
        for buffer in buffers:
            buffer.errand = None  # which knows the memory that is filled
        for reading in readings:
            reading.done(error)
        del error  # which knows this frame, and so all that is in it

    def _take_back(self) -> None:
        """What was sent and has arrived."""
        for sent in self._sent.values():
            while sent and self._copies.are_over(sent[0][1]):
                buffers, copied = sent.popleft()
                self._copies.give_back(copied)
                self._give_back(buffers)

    def _give_back(self, buffers: Sequence[_Buffer]) -> None:
        for buffer in buffers:
            self._in_use[buffer.stream] -= 1
            buffer.errand = buffer.stream = None
        self._buffers.give(buffers)
