"""Reading by threads of Python's, into system memory; for GPUs too where the libraries are not at hand that library_reads.py asks, as on Windows."""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from . import pieces
from .errands import Errand, Errands
from .sending import Sender, Sending


class ThreadReads:
    """Does errands in several threads, each of which goes on while there is something to be read.

    Args:
        threads: how many at most.
        buffers: for what goes to GPUs.

    Raises:
        RuntimeError: there is no thread to be had.
    """

    def __init__(self, threads: int, buffers: int):
        self._errands = Errands()
        self._most = threads
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="wan-sharded-reader")
        self._sender = Sender(buffers)
        self._at_work: set[object] = set()
        # Each thread's own, until the thread ends.
        self._files = threading.local()
        self._opened: list[IO[bytes]] = []

    def close(self) -> None:
        """Give files, buffers and threads back, when nothing is left to be done."""
        self._threads.shutdown()
        self._sender.close()
        while self._opened:
            self._opened.pop().close()

    def begin(self, wanted: Sequence[Errand], *, urgent: bool) -> None:
        """Have errands done; where that can't be, none of them is still to be done.

        Raises:
            RuntimeError: there is no thread to be had.
        """
        name = None
        try:
            with self._errands.lock:
                self._errands.add(wanted, urgent=urgent)
            for _ in wanted:
                with self._errands.lock:
                    if not self._errands or len(self._at_work) >= self._most:
                        return
                    name = object()
                    self._at_work.add(name)
                self._threads.submit(self._work, name)
        except BaseException:
            with self._errands.lock:
                self._at_work.discard(name)
                self._errands.leave_out(wanted)
            raise

    def _work(self, name: object) -> None:
        """Read while there is something to be read. One task for each piece would take longer."""
        while True:
            with self._errands.lock:
                errand = self._errands.take()
                if errand is None:
                    self._at_work.discard(name)
                    return
            self._read(errand)
            del errand  # which knows the memory that it filled

    def _read(self, errand: Errand) -> None:
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
                        buffer = self._sender.buffer()
                        pieces.read_at(file, buffer.room(piece.size_bytes), piece.offset)
                        self._sender.send(Sending(buffer, piece, stream, reading.done))
                        return
        except BaseException as error:
            if buffer is not None:
                self._sender.give(buffer)
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
