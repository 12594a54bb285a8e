"""Tensors from checkpoint files to where they are wanted, each once, as the files have them.

Several threads read, piece by piece, while whoever asked goes on to what is wanted next (library_reads.py, thread_reads.py). To a GPU the
pieces go through small page-locked buffers, so that reading and copying overlap; into host memory they are read in place. Nothing is mapped
that a GPU waits for: a mapped page that must be fetched costs more than reading.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from ..checkpoints.stored import StoredTensor
from . import library_reads, pieces
from .errands import Errand, Reading
from .library_reads import Buffers, LibraryReads
from .mapping import MappedFiles
from .pieces import Stretch
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

    Raises (all methods but :meth:`close`, :meth:`stop` and :meth:`give_back_buffers`): :class:`CheckpointError` where a file can't be read any
    more, or has become shorter.
    """

    def __init__(self) -> None:
        self._thread_reads: ThreadReads | None = None
        self._library_reads: LibraryReads | None = None
        self._buffers: Buffers | None = None
        self._under_way: list[Reading] = []
        self._mapped = MappedFiles()

    def close(self) -> None:
        """Give files and threads back; they are made again when needed."""
        self.stop()
        if self._thread_reads is not None:
            self._thread_reads.close()
        if self._library_reads is not None:
            self._library_reads.close()
        self._thread_reads = self._library_reads = None

    def give_back_buffers(self) -> None:
        """Give back the page-locked memory that is kept for what goes to GPUs, up to 168 MiB; after what is under way, if anything is."""
        buffers, self._buffers = self._buffers, None
        if buffers is not None and self._library_reads is None:
            buffers.let_go()

    def prepare(self) -> None:
        """Have that memory made now, in a thread, for what is to be read to GPUs soon; where that can't be, it is made then."""
        with suppress(RuntimeError):
            if library_reads.available():
                self._library().prepare()

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

        It is read in the order of these calls (what goes to each GPU, and what to the CPU), what is urgent before all that has not begun. No more
        than ``AHEAD_BYTES`` of it all is still on its way then, but for what is begun here. All memory must stay until it was waited for, with
        :meth:`Reading.wait` or :meth:`finish`, or let go with :meth:`stop`, which whoever meets an error must call.
        """
        by_device = self._direct(wanted)
        direct = [stored for pairs in by_device.values() for stored, _ in pairs]
        for path, modified_ns in dict.fromkeys((stored.file, stored.modified_ns) for stored in direct):
            with pieces.named(path):  # threads may have it open under this name from before
                pieces.check_unchanged(path, path.stat(), modified_ns)
        reading, before = Reading(), [other for other in self._under_way if other.unfinished_bytes]
        if not direct:
            return reading
        in_place = list(pieces.pieces_of(by_device.pop(CPU, ()), pieces.PIECE_BYTES))
        if not before and len(in_place) == 1 and not by_device:
            pieces.read_alone(in_place[0])  # not worth a thread
            return reading
        by_library = bool(by_device) and library_reads.available()
        most_bytes = library_reads.PIECE_BYTES if by_library else pieces.PIECE_BYTES
        self._under_way = [*before, reading]
        to_host = [Errand(piece, reading, None) for piece in in_place]
        to_gpus: list[Errand] = []
        for device, pairs in by_device.items():
            stream = torch.cuda.current_stream(device)
            to_gpus += [Errand(piece, reading, stream) for piece in pieces.pieces_of(pairs, most_bytes)]
        work = [(self._threads, to_host), (self._library if by_library else self._threads, to_gpus)]
        self._submit(work, reading, sum(stored.size_bytes for stored in direct), urgent=urgent)
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

    def _direct(
        self, wanted: Sequence[tuple[StoredTensor, torch.Tensor | Stretch]]
    ) -> dict[torch.device, list[tuple[StoredTensor, Stretch]]]:
        """By device, what is read to where it goes, without what has no byte; what goes elsewhere is copied there now."""
        found: dict[torch.device, list[tuple[StoredTensor, Stretch]]] = {}
        for stored, target in wanted:
            stretch = Stretch.of(target)
            device = stretch.device
            if device.type not in ("cpu", "cuda"):
                stretch.view().copy_(self.mapped(stored).reshape(-1).view(torch.uint8))
            elif stored.size_bytes:
                found.setdefault(device, []).append((stored, stretch))
        return found

    def _submit(
        self, work: Sequence[tuple[Callable[[], Reads], Sequence[Errand]]], reading: Reading, size_bytes: int, *, urgent: bool
    ) -> None:
        """Have errands done by somebody; where that can't be, none of them is still to be done."""
        begun = [(reads(), errands) for reads, errands in work if errands]
        reading.add(sum(len(errands) for _, errands in begun), size_bytes)
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
            if self._buffers is None:
                self._buffers = Buffers()
            self._library_reads = LibraryReads(self._buffers)
        return self._library_reads
