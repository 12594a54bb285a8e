"""Tensors that are pages of checkpoint files, which the system fetches when they are touched, and may forget again.

For weights that the CPU computes with, and that system memory has no room for.
"""

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from weakref import WeakSet

import torch

from ..checkpoints.stored import StoredTensor
from .pieces import changed, check_unchanged, named, numbered_runs, raw_shape
from .precision import stored_dtype


class _Pages(mmap.mmap):
    """Some of a file. Tensors of it keep it; with the last one it is let go.

    Attributes:
        path: of the file.
        seen: what it was when it was mapped.
    """

    path: Path
    seen: os.stat_result


class MappedFiles:
    """What is mapped of the files of one model."""

    def __init__(self) -> None:
        self._pages: WeakSet[_Pages] = WeakSet()

    def tensors(self, wanted: Sequence[StoredTensor]) -> dict[StoredTensor, torch.Tensor]:
        """Tensors on the CPU whose memory is the files' own pages. Writing to them does not change the files.

        Those that lie together in a file are mapped together: every mapping keeps the file open once more, and systems let a process open
        some hundred or thousand.

        Raises:
            CheckpointError: a file can't be read any more, or is another one by now.
        """
        found = {stored: torch.empty(stored.shape, dtype=stored_dtype(stored)) for stored in wanted if not stored.elements}
        ordered = sorted((stored for stored in wanted if stored.elements), key=lambda stored: (str(stored.file), stored.offset))
        for _, near in groupby(numbered_runs([(stored, _NOTHING) for stored in ordered]), key=lambda pair: pair[0]):
            run = [stored for _, (stored, _) in near]
            pages, begin = self._map(run[0], max(stored.offset + stored.size_bytes for stored in run))
            for stored in run:
                dtype = stored_dtype(stored)
                count = stored.size_bytes // dtype.itemsize
                values = torch.frombuffer(pages, dtype=dtype, count=count, offset=stored.offset - begin)
                found[stored] = values.view(raw_shape(stored))
        return found

    def check(self) -> None:
        """Check that no file was written to since it was mapped: what was to be computed with is gone then. Deleted and replaced ones stay
        as they were.

        Raises:
            CheckpointError: one was.
        """
        for path, seen in {(pages.path, pages.seen) for pages in self._pages}:
            with suppress(OSError):
                now = path.stat()
                if os.path.samestat(now, seen) and (now.st_size, now.st_mtime_ns) != (seen.st_size, seen.st_mtime_ns):
                    raise changed(path)

    def _map(self, first: StoredTensor, end: int) -> tuple[_Pages, int]:
        """A file from a tensor on, and where in the file that begins."""
        # Only what is wanted: systems refuse pages that could be written to where they are more than there is memory.
        begin = first.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with named(first.file), first.file.open("rb") as file:
            seen = os.fstat(file.fileno())
            if seen.st_size < end:
                raise EOFError("it has become shorter")
            check_unchanged(first.file, seen, first.modified_ns)
            pages = _Pages(file.fileno(), end - begin, access=mmap.ACCESS_COPY, offset=begin)
        pages.path, pages.seen = first.file, seen
        self._pages.add(pages)
        return pages, begin


_NOTHING = torch.empty(0)
