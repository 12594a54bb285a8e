"""Tensors from checkpoint files to where they are wanted, each once, as the files have them.

Several threads read, piece by piece, while whoever asked goes on to what is wanted next. To a GPU the pieces go through small page-locked
buffers, so that reading and copying overlap; into host memory they are read in place. Nothing is mapped that a GPU waits for: a mapped
page that must be fetched costs more than reading.
"""

import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ..checkpoints.stored import StoredTensor
from . import pieces
from .mapping import MappedFiles
from .pieces import Piece
from .precision import stored_dtype
from .sending import Sender, Sending

CPU = torch.device("cpu")
# One thread saturates neither a fast disk nor memory, and some wait for Python while others read (benchmarks/loading.py).
THREADS = min(12, os.cpu_count() or 1)
# Each thread reads into one while another one is sent.
BUFFERS = 2 * THREADS
# Of what was begun, so much may still be on its way when something else is begun: a few blocks, so that threads find something to read while
# the next one is prepared.
AHEAD_BYTES = 2 * 1024**3


class Reading:
    """Tensors that were asked for together, while threads read them.

    Attributes:
        stopped: what has not begun is to be left out.
        incomplete: something of it was left out, or failed.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left = 0
        self._size_bytes = 0
        self._error: BaseException | None = None
        self.stopped = False
        self.incomplete = False

    def add(self, pieces: int, size_bytes: int) -> None:
        """What is to be read for it."""
        with self._changed:
            self._left += pieces
            self._size_bytes += size_bytes

    def done(self, error: BaseException | None = None, *, left_out: bool = False) -> None:
        """One of those things is done, was left out, or failed."""
        with self._changed:
            self._left -= 1
            self._error = self._error or error
            self.incomplete = self.incomplete or left_out or error is not None
            if self.incomplete or not self._left:
                self._changed.notify_all()

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes of it; :meth:`wait` says at once how it went."""
        return not self._left

    @property
    def unfinished_bytes(self) -> int:
        """All of it, until it is there."""
        return self._size_bytes if self._left or self.incomplete else 0

    def wait(self) -> None:
        """Until all of it is there: in memory, or queued in the order of the GPU's stream.

        Raises:
            CheckpointError: a file can't be read any more, or has become shorter. Nothing is written for this reading after that.
        """
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._left or self.incomplete)
        except BaseException:
            self.stop()
            raise
        if self.incomplete:
            error = self._error or RuntimeError("what was to be read was let go")
            self.stop()
            try:
                raise error
            finally:
                del error

    def ended(self) -> bool:
        """Wait until no thread reads for it any more, from whatever thread: whether all of it is there."""
        with self._changed:
            self._changed.wait_for(lambda: not self._left)
        return not self.incomplete

    def stop(self) -> None:
        """Leave out what has not begun, and wait for the rest: no thread may write into memory that is let go."""
        self.stopped = True
        with self._changed:
            self._changed.wait_for(lambda: not self._left)
            self._error = None  # which knows this reading, and so the memory it was to fill


@dataclass(frozen=True, eq=False)
class _Errand:
    """A piece that is to be read for somebody, and the GPU's stream it is to be sent in."""

    piece: Piece
    reading: Reading
    stream: "torch.cuda.Stream | None"


class TensorReader:
    """Reads tensors of one model's files. Not to be used by two threads at once.

    Raises (all methods but :meth:`close` and :meth:`stop`): :class:`CheckpointError` where a file can't be read any more, or has become
    shorter.
    """

    def __init__(self) -> None:
        self._threads: tuple[ThreadPoolExecutor, Sender] | None = None
        # A thread takes what is urgent first, and goes on while there is something.
        self._urgent: deque[_Errand] = deque()
        self._errands: deque[_Errand] = deque()
        self._taking = threading.Lock()
        self._at_work: set[object] = set()
        self._under_way: list[Reading] = []
        self._mapped = MappedFiles()
        # Each thread's own, until the thread ends.
        self._files = threading.local()
        self._opened: list[IO[bytes]] = []

    def close(self) -> None:
        """Give files, buffers and threads back; they are made again when needed."""
        self.stop()
        if self._threads is not None:
            readers, sender = self._threads
            readers.shutdown()
            sender.close()
            self._threads = None
        self._at_work.clear()
        while self._opened:
            self._opened.pop().close()

    # ---- what is wanted

    def mapped(self, stored: StoredTensor) -> torch.Tensor:
        """A tensor on the CPU whose memory is the file's own pages, fetched when touched. Writing to it does not change the file."""
        return self.all_mapped([stored])[stored]

    def all_mapped(self, wanted: Sequence[StoredTensor]) -> dict[StoredTensor, torch.Tensor]:
        """As :meth:`mapped`, of several tensors."""
        return self._mapped.tensors(wanted)

    def check_mapped(self) -> None:
        """Check that no file whose pages are in use was written to."""
        self._mapped.check()

    def read(self, stored: StoredTensor) -> torch.Tensor:
        """A tensor on the CPU, in memory of its own."""
        memory = torch.empty(stored.size_bytes, dtype=torch.uint8)
        self.read_into([(stored, memory)])
        return memory.view(stored_dtype(stored)).view(pieces.raw_shape(stored))

    def read_into(self, wanted: Sequence[tuple[StoredTensor, torch.Tensor]]) -> None:
        """Tensors' bytes into memory, each uint8 [size_bytes], on one or several devices.

        On the CPU they are there when this returns. On a GPU they arrive in the order of its current stream.
        """
        try:
            self.begin(wanted).wait()
        except BaseException:
            self.stop()
            raise

    def begin(self, wanted: Sequence[tuple[StoredTensor, torch.Tensor]], *, urgent: bool = False) -> Reading:
        """As :meth:`read_into`, but what is wanted may still be on its way when this returns.

        It is read in the order of these calls, what is urgent before all that has not begun. No more than ``AHEAD_BYTES`` of it all is still
        on its way then, but for what is begun here. All memory must stay until it was waited for, with :meth:`Reading.wait` or :meth:`finish`, or let go with
        :meth:`stop`, which whoever meets an error must call.
        """
        for stored, target in wanted:
            if target.device.type not in ("cpu", "cuda"):
                target.copy_(self.mapped(stored).reshape(-1).view(torch.uint8))
        cut = list(pieces.pieces_of([(stored, target) for stored, target in wanted if target.device.type in ("cpu", "cuda")]))
        for path, modified_ns in dict.fromkeys((piece.path, piece.modified_ns) for piece in cut):
            with pieces.named(path):  # threads may have it open under this name from before
                pieces.check_unchanged(path, path.stat(), modified_ns)
        reading, before = Reading(), [other for other in self._under_way if other.unfinished_bytes]
        if not cut:
            return reading
        if not before and len(cut) == 1 and cut[0].device == CPU:
            pieces.read_alone(cut[0])  # not worth a thread
            return reading
        self._under_way = [*before, reading]
        self._submit(cut, reading, self._urgent if urgent else self._errands)
        for earlier in before:
            if sum(other.unfinished_bytes for other in self._under_way) > AHEAD_BYTES:
                earlier.wait()
        return reading

    def finish(self) -> None:
        """Wait for all that was begun."""
        for reading in self._under_way:
            reading.wait()
        self._under_way.clear()

    def stop(self) -> None:
        """Let go of all that was begun; how much of it has arrived is not known. No thread writes to it any more."""
        for reading in self._under_way:
            reading.stopped = True  # all of them, before any is waited for
        for reading in self._under_way:
            reading.stop()
        self._under_way.clear()

    # ---- how

    def _submit(self, cut: Sequence[Piece], reading: Reading, errands: "deque[_Errand]") -> None:
        """Have pieces read; where that can't be, none of them is still to be read."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="wan-sharded-reader"), Sender(BUFFERS)
        readers, sender = self._threads
        streams = {device: None if device == CPU else torch.cuda.current_stream(device) for device in {piece.device for piece in cut}}
        wanted = [_Errand(piece, reading, streams[piece.device]) for piece in cut]
        reading.add(len(cut), sum(piece.size_bytes for piece in cut))
        name = None
        try:
            with self._taking:
                errands.extend(wanted)
            for _ in wanted:
                with self._taking:
                    if not errands or len(self._at_work) >= THREADS:
                        return
                    name = object()
                    self._at_work.add(name)
                readers.submit(self._work, name, sender)
        except BaseException:
            with self._taking:
                self._at_work.discard(name)
                for errand in wanted:
                    with suppress(ValueError):  # a thread has taken it on
                        errands.remove(errand)
                        reading.done(left_out=True)
            raise

    def _work(self, name: object, sender: Sender) -> None:
        """Read while there is something to be read. One task for each piece would take longer."""
        while True:
            with self._taking:
                if not (errands := self._urgent or self._errands):
                    self._at_work.discard(name)
                    return
                errand = errands.popleft()
            self._read(errand, sender)
            del errand  # which knows the memory that it filled

    def _read(self, errand: _Errand, sender: Sender) -> None:
        """Read one piece to where it goes, or have it sent there."""
        piece, reading, stream = errand.piece, errand.reading, errand.stream
        buffer = None
        try:
            left_out = reading.stopped
            if not left_out:
                with pieces.named(piece.path):
                    file = self._file(piece.path, piece.modified_ns)
                    if stream is None:
                        pieces.read_parts(file, piece)
                    else:
                        buffer = sender.buffer()
                        pieces.read_at(file, buffer.room(piece.size_bytes), piece.offset)
                        sender.send(Sending(buffer, piece, stream, reading.done))
                        return
        except BaseException as error:
            if buffer is not None:
                sender.give(buffer)
            reading.done(error)
        else:
            reading.done(left_out=left_out)

    def _file(self, path: Path, modified_ns: int) -> IO[bytes]:
        """A file as the thread that asks has it open."""
        files: Any = self._files.__dict__
        if (path, modified_ns) not in files:
            file = path.open("rb", buffering=0)
            self._opened.append(file)
            pieces.check_unchanged(path, os.fstat(file.fileno()), modified_ns)
            files[path, modified_ns] = file
        return files[path, modified_ns]
