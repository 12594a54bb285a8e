"""Tensors from checkpoint files to where they are wanted, each once, as the files have them.

Several threads read, piece by piece, while whoever asked goes on to what is wanted next (library_reads.py, thread_reads.py). To a GPU the
pieces go through small page-locked buffers, so that reading and copying overlap; into host memory they are read in place. Nothing is mapped
that a GPU waits for: a mapped page that must be fetched costs more than reading.
"""

import os
from collections.abc import Callable, Sequence

import torch

from ..checkpoints.stored import StoredTensor
from . import library_reads, pieces
from .errands import Errand, Reading
from .library_reads import LibraryReads
from .mapping import MappedFiles
from .pieces import Piece, Stretch
from .precision import stored_dtype
from .thread_reads import ThreadReads

CPU = torch.device("cpu")
# One thread saturates neither a fast disk nor memory, and some wait for Python while others read (benchmarks/loading.py).
THREADS = min(12, os.cpu_count() or 1)
# Each thread reads into one while another one is sent.
BUFFERS = 2 * THREADS
# Of what was begun, so much may still be on its way when something else is begun: a few blocks, so that threads find something to read while
# the next one is prepared.
AHEAD_BYTES = 2 * 1024**3
Reads = ThreadReads | LibraryReads


class TensorReader:
    """Reads tensors of one model's files. Not to be used by two threads at once.

    Raises (all methods but :meth:`close` and :meth:`stop`): :class:`CheckpointError` where a file can't be read any more, or has become
    shorter.
    """

    def __init__(self) -> None:
        self._thread_reads: ThreadReads | None = None
        self._library_reads: LibraryReads | None = None
        self._under_way: list[Reading] = []
        self._mapped = MappedFiles()

    def close(self) -> None:
        """Give files, buffers and threads back; they are made again when needed."""
        self.stop()
        if self._thread_reads is not None:
            self._thread_reads.close()
        if self._library_reads is not None:
            self._library_reads.close()
        self._thread_reads = self._library_reads = None

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

    def begin(self, wanted: Sequence[tuple[StoredTensor, torch.Tensor | Stretch]], *, urgent: bool = False) -> Reading:
        """As :meth:`read_into`, but what is wanted may still be on its way when this returns.

        It is read in the order of these calls (what goes to GPUs, and what to the CPU), what is urgent before all that has not begun. No more
        than ``AHEAD_BYTES`` of it all is still on its way then, but for what is begun here. All memory must stay until it was waited for, with
        :meth:`Reading.wait` or :meth:`finish`, or let go with :meth:`stop`, which whoever meets an error must call.
        """
        stretches = [(stored, Stretch.of(target)) for stored, target in wanted]
        for stored, target in stretches:
            if target.device.type not in ("cpu", "cuda"):
                target.view().copy_(self.mapped(stored).reshape(-1).view(torch.uint8))
        direct = [pair for pair in stretches if pair[1].device.type in ("cpu", "cuda")]
        in_place = list(pieces.pieces_of([pair for pair in direct if pair[1].device == CPU], pieces.PIECE_BYTES))
        for_gpus = [pair for pair in direct if pair[1].device != CPU]
        sends = self._library if for_gpus and library_reads.available() else self._threads
        to_gpus = list(pieces.pieces_of(for_gpus, library_reads.PIECE_BYTES if sends == self._library else pieces.PIECE_BYTES))
        cut = [*in_place, *to_gpus]
        for path, modified_ns in dict.fromkeys((piece.path, piece.modified_ns) for piece in cut):
            with pieces.named(path):  # threads may have it open under this name from before
                pieces.check_unchanged(path, path.stat(), modified_ns)
        reading, before = Reading(), [other for other in self._under_way if other.unfinished_bytes]
        if not cut:
            return reading
        if not before and len(in_place) == 1 and not to_gpus:
            pieces.read_alone(in_place[0])  # not worth a thread
            return reading
        self._under_way = [*before, reading]
        self._submit([(self._threads, in_place), (sends, to_gpus)], reading, urgent=urgent)
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

    def _submit(self, work: Sequence[tuple[Callable[[], Reads], Sequence[Piece]]], reading: Reading, *, urgent: bool) -> None:
        """Have pieces read by somebody; where that can't be, none of them is still to be read."""
        streams = {piece.device: None for _, cut in work for piece in cut}
        streams = {device: None if device == CPU else torch.cuda.current_stream(device) for device in streams}
        begun = [(reads(), [Errand(piece, reading, streams[piece.device]) for piece in cut]) for reads, cut in work if cut]
        reading.add(sum(len(cut) for _, cut in work), sum(piece.size_bytes for _, cut in work for piece in cut))
        while begun:
            reads, errands = begun.pop()
            try:
                reads.begin(errands, urgent=urgent)
            except BaseException:
                for _, others in begun:
                    for _ in others:
                        reading.done(left_out=True)
                raise

    def _threads(self) -> ThreadReads:
        if self._thread_reads is None:
            self._thread_reads = ThreadReads(THREADS, BUFFERS)
        return self._thread_reads

    def _library(self) -> LibraryReads:
        if self._library_reads is None:
            self._library_reads = LibraryReads()
        return self._library_reads
