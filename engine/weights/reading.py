"""Tensors from checkpoint files to where they are wanted, each once, as the files have them.

Several threads read, piece by piece. To a GPU the pieces go through a ring of small page-locked buffers, so that reading and copying
overlap; into host memory they are read in place. Nothing is mapped that a GPU waits for: a mapped page that must be fetched costs more
than reading.
"""

import mmap
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from ..checkpoints.stored import StoredTensor
from ..errors import CheckpointError
from .host_memory import host_buffer
from .precision import stored_dtype

CPU = torch.device("cpu")
# One thread saturates neither a fast disk nor memory (benchmarks/loading.py).
THREADS = min(8, os.cpu_count() or 1)
# Small enough that all threads are busy with one block's pieces until nearly its end.
PIECE_BYTES = 4 * 1024**2
# What is not wanted between two tensors of a file is read along where it is no more than this: one piece costs more.
GAP_BYTES = 64 * 1024
# Pieces that are being read or wait for a thread: it finds the next one also while an earlier one takes long.
READING = 2 * THREADS
# And some that are being copied.
BUFFERS = READING + THREADS


@dataclass(frozen=True)
class _Piece:
    """A stretch of a file, and where its parts go: offsets within it, and memory on one device."""

    path: Path
    modified_ns: int
    offset: int
    size_bytes: int
    targets: tuple[tuple[int, torch.Tensor], ...]

    @property
    def device(self) -> torch.device:
        return self.targets[0][1].device


@dataclass
class _Buffer:
    """Page-locked memory, and the copy from it that may still be under way."""

    memory: torch.Tensor
    copied: "torch.cuda.Event | None" = field(default=None)

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None


class TensorReader:
    """Reads tensors of one model's files. Not to be used by two threads at once.

    Raises (all methods): :class:`CheckpointError` where a file can't be read any more, or has become shorter.
    """

    def __init__(self) -> None:
        self._buffers: list[_Buffer] = []
        self._turn = 0
        self._pool: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """Give the buffers and threads back; they are made again when needed."""
        for buffer in self._buffers:
            buffer.wait()
        self._buffers.clear()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    # ---- what is wanted

    def mapped(self, stored: StoredTensor) -> torch.Tensor:
        """A tensor on the CPU whose memory is the file's own pages, fetched when touched. Writing to it does not change the file."""
        dtype = stored_dtype(stored)
        if stored.elements == 0:
            return torch.empty(stored.shape, dtype=dtype)
        # Only its own pages: systems refuse a private mapping of more than they have memory.
        begin = stored.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        within = stored.offset - begin
        try:
            with stored.file.open("rb") as file:
                if os.fstat(file.fileno()).st_size < stored.offset + stored.size_bytes:
                    raise _unreadable(stored.file, "it has become shorter")
                _check_unchanged(stored.file, file, stored.modified_ns)
                pages = mmap.mmap(file.fileno(), within + stored.size_bytes, access=mmap.ACCESS_COPY, offset=begin)
        except (OSError, ValueError) as error:
            raise _unreadable(stored.file, error) from error
        count = stored.size_bytes // dtype.itemsize
        return torch.frombuffer(pages, dtype=dtype, count=count, offset=within).view(raw_shape(stored))

    def read(self, stored: StoredTensor) -> torch.Tensor:
        """A tensor on the CPU, in memory of its own."""
        memory = torch.empty(stored.size_bytes, dtype=torch.uint8)
        self.read_into([(stored, memory)])
        return memory.view(stored_dtype(stored)).view(raw_shape(stored))

    def read_into(self, wanted: Sequence[tuple[StoredTensor, torch.Tensor]]) -> None:
        """Tensors' bytes into memory, each uint8 [size_bytes], on one or several devices.

        On the CPU they are there when this returns. On a GPU they arrive in the order of its current stream.
        """
        real = [(stored, target) for stored, target in wanted if target.device.type in ("cpu", "cuda")]
        for stored, target in wanted:
            if target.device.type not in ("cpu", "cuda"):
                target.copy_(self.mapped(stored).reshape(-1).view(torch.uint8))
        self._read_pieces(list(_pieces(real)))

    # ---- how

    def _read_pieces(self, pieces: list[_Piece]) -> None:
        if len(pieces) == 1 and pieces[0].device == CPU:
            _read(pieces[0], None)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="wan-sharded-reader")
        reading: deque[tuple[Future[None], _Piece, _Buffer | None]] = deque()
        try:
            for piece in pieces:
                if len(reading) >= READING:
                    self._deliver(*reading[0])
                    reading.popleft()
                buffer = self._next_buffer() if piece.device != CPU else None
                reading.append((self._pool.submit(_read, piece, None if buffer is None else buffer.memory), piece, buffer))
            while reading:
                self._deliver(*reading[0])
                reading.popleft()
        finally:
            # No thread may write into memory that is let go.
            for future, _, _ in reading:
                future.cancel()
                future.exception() if not future.cancelled() else None

    @staticmethod
    def _deliver(future: "Future[None]", piece: _Piece, buffer: _Buffer | None) -> None:
        """Wait until a piece is read, and send it on."""
        future.result()
        if buffer is not None:
            for place, target in piece.targets:
                target.copy_(buffer.memory[place : place + target.numel()], non_blocking=True)
            buffer.copied = torch.cuda.Event()
            buffer.copied.record(torch.cuda.current_stream(piece.device))

    def _next_buffer(self) -> _Buffer:
        """Room that no copy uses any more."""
        if len(self._buffers) < BUFFERS:
            self._buffers.append(_Buffer(host_buffer(PIECE_BYTES)))
            self._turn = len(self._buffers) - 1
        else:
            self._turn = (self._turn + 1) % BUFFERS
        buffer = self._buffers[self._turn]
        buffer.wait()
        return buffer


def _pieces(wanted: Sequence[tuple[StoredTensor, torch.Tensor]]) -> Iterator[_Piece]:
    """What is wanted in pieces of about one size: large tensors cut, small ones that lie near each other in a file together."""
    cut = sorted(
        (
            (
                str(stored.file),
                stored.modified_ns,
                str(target.device),
                stored.offset + begin,
                stored.file,
                target[begin : begin + PIECE_BYTES],
            )
            for stored, target in wanted
            for begin in range(0, stored.size_bytes, PIECE_BYTES)
        ),
        key=lambda found: found[:4],
    )
    together: list[tuple[int, torch.Tensor]] = []
    first = end = 0
    for number, (_, modified_ns, _, offset, path, target) in enumerate(cut):
        together.append((offset - first if together else 0, target))
        first = offset if len(together) == 1 else first
        end = offset + target.numel()
        follows = cut[number + 1] if number + 1 < len(cut) else None
        if (
            follows is None
            or follows[:3] != cut[number][:3]
            or not end <= follows[3] <= end + GAP_BYTES
            or follows[3] + follows[5].numel() - first > PIECE_BYTES
        ):
            yield _Piece(path, modified_ns, first, end - first, tuple(together))
            together = []


def _read(piece: _Piece, buffer: torch.Tensor | None) -> None:
    """A piece into a buffer, as the file has it, or into the memory where its parts go."""
    try:
        with piece.path.open("rb", buffering=0) as file:
            _check_unchanged(piece.path, file, piece.modified_ns)
            for place, target in piece.targets if buffer is None else ((0, buffer[: piece.size_bytes]),):
                file.seek(piece.offset + place)
                rest = target.numpy().data
                while rest:
                    count = file.readinto(rest)
                    if not count:
                        raise _unreadable(piece.path, "it has become shorter")
                    rest = rest[count:]
    except OSError as error:
        raise _unreadable(piece.path, error) from error


def _check_unchanged(path: Path, file: IO[bytes], modified_ns: int) -> None:
    """Another file under the same name has other tensors at the same places."""
    if modified_ns and os.fstat(file.fileno()).st_mtime_ns != modified_ns:
        raise CheckpointError(f"{path} was changed after it was chosen. Run again, so that it is looked at anew.")


def _unreadable(path: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{path} could not be read ({why}). Was it moved or is it damaged? Download it again.")


def raw_shape(stored: StoredTensor) -> tuple[int, ...]:
    """The shape of what the file has: the values' own, or rows of GGUF's bytes."""
    if stored.gguf_type is None:
        return stored.shape
    return stored.shape[0], stored.size_bytes // stored.shape[0]
