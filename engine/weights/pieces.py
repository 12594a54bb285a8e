"""Pieces of checkpoint files, and how one is read.

Knows files and memory on the CPU, nothing of threads or GPUs; called by the reader of tensors (reading.py).
"""

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import torch

from ..checkpoints.stored import StoredTensor
from ..errors import CheckpointError

# Small enough that all threads have something to do until nearly the end, large enough that Python's work for each counts little.
PIECE_BYTES = 8 * 1024**2
# What is not wanted between two tensors of a file is read along where it is no more than this: one piece costs more.
GAP_BYTES = 64 * 1024
Target = TypeVar("Target")


class Stretch(NamedTuple):
    """Some of a piece of memory. A view would be a call of torch's, which lets other threads in, and there are thousands of these.

    Attributes:
        memory: uint8, one-dimensional, on any device.
        first: the first byte.
        size_bytes: how many.
    """

    memory: torch.Tensor
    first: int
    size_bytes: int

    @classmethod
    def of(cls, memory: "torch.Tensor | Stretch") -> "Stretch":
        """All of it."""
        return memory if isinstance(memory, Stretch) else cls(memory, 0, memory.numel())

    @property
    def device(self) -> torch.device:
        return self.memory.device

    @property
    def address(self) -> int:
        return self.memory.data_ptr() + self.first

    def view(self) -> torch.Tensor:
        """The same as a tensor."""
        is_all = self.size_bytes == self.memory.numel()
        return self.memory if is_all else self.memory[self.first : self.first + self.size_bytes]


@dataclass(slots=True, eq=False)
class Piece:
    """A stretch of a file, and where its parts go: offsets within it, and memory on one device.

    Not frozen: there are thousands, and making them would take three times as long.
    """

    path: Path
    modified_ns: int
    offset: int
    size_bytes: int
    targets: tuple[tuple[int, Stretch], ...]

    @property
    def device(self) -> torch.device:
        return self.targets[0][1].device


def pieces_of(wanted: Sequence[tuple[StoredTensor, Stretch]], most_bytes: int) -> Iterator[Piece]:
    """What is wanted in pieces of about one size: what lies near each other in a file is cut without regard to where tensors end."""
    ordered = sorted(wanted, key=lambda pair: (_whose(pair), pair[0].offset))
    for _, near in groupby(numbered_runs(ordered), key=lambda found: found[0]):
        run = [pair for _, pair in near]
        first, last = run[0][0], run[-1][0]
        size = last.offset + last.size_bytes - first.offset
        yield from _cut(run, -(-size // max(1, -(-size // most_bytes))))


def _whose(pair: tuple[StoredTensor, Any]) -> tuple[str, int, str]:
    stored, target = pair
    return str(stored.file), stored.modified_ns, str(target.device)


def numbered_runs(ordered: Sequence[tuple[StoredTensor, Target]]) -> Iterator[tuple[int, tuple[StoredTensor, Target]]]:
    """Tensors that lie behind each other in a file have one number. Those without a byte are left out."""
    number, whose, end = 0, None, 0
    for pair in ordered:
        stored = pair[0]
        if stored.size_bytes:
            before, whose = whose, _whose(pair)
            if whose != before or not end <= stored.offset <= end + GAP_BYTES:
                number += 1
            end = stored.offset + stored.size_bytes
            yield number, pair


def _cut(run: Sequence[tuple[StoredTensor, Stretch]], each: int) -> Iterator[Piece]:
    """A run at each multiple of so many bytes from its beginning. Pieces begin and end with a part of a tensor."""
    file, modified_ns, run_offset = run[0][0].file, run[0][0].modified_ns, run[0][0].offset
    parts: list[tuple[int, Stretch]] = []
    offset, following = run_offset, run_offset + each
    for stored, (memory, first, _) in run:
        place, left = stored.offset, stored.size_bytes
        while left:
            if place >= following:
                yield Piece(file, modified_ns, offset, parts[-1][0] + parts[-1][1].size_bytes, tuple(parts))
                parts, offset = [], place
                following = place - (place - run_offset) % each + each
            size = min(left, following - place)
            parts.append((place - offset, Stretch(memory, first, size)))
            place, first, left = place + size, first + size, left - size
    yield Piece(file, modified_ns, offset, parts[-1][0] + parts[-1][1].size_bytes, tuple(parts))


def read_alone(piece: Piece) -> None:
    with named(piece.path), piece.path.open("rb", buffering=0) as file:
        check_unchanged(piece.path, os.fstat(file.fileno()), piece.modified_ns)
        read_parts(file, piece)


def read_parts(file: IO[bytes], piece: Piece) -> None:
    """Into the memory where a piece's parts go."""
    for place, target in piece.targets:
        read_at(file, target.memory.numpy().data[target.first : target.first + target.size_bytes], piece.offset + place)


def read_at(file: IO[bytes], rest: memoryview, offset: int) -> None:
    """Fill memory from a place in a file."""
    while rest:
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [rest], offset)
        else:
            file.seek(offset)
            count = file.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("it has become shorter")
        rest, offset = rest[count:], offset + count


def check_unchanged(path: Path, found: os.stat_result, modified_ns: int) -> None:
    """Another file under the same name has other tensors at the same places."""
    if modified_ns and found.st_mtime_ns != modified_ns:
        raise changed(path)


def changed(path: Path) -> CheckpointError:
    """What to raise where a file is not what it was."""
    return CheckpointError(f"{path} was changed after it was chosen. Run again, so that it is looked at anew.")


@contextmanager
def named(path: Path) -> Generator[None, None, None]:
    """Errors say which file it is."""
    try:
        yield
    except (OSError, EOFError, ValueError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, why: object) -> CheckpointError:
    """What to raise where a file can't be read."""
    return CheckpointError(f"{path} could not be read ({why}). Was it moved or is it damaged? Download it again.")


def raw_shape(stored: StoredTensor) -> tuple[int, ...]:
    """The shape of what the file has: the values' own, or rows of GGUF's bytes; what is no matrix is one row."""
    if stored.gguf_type is None:
        return stored.shape
    rows = stored.shape[0] if len(stored.shape) > 1 else 1
    return rows, stored.size_bytes // rows
