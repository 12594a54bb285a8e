"""Tensors from checkpoint files to where they are wanted, each once, as the files have them.

To a GPU they go through a few page-locked buffers: while one is copied to the device, several threads fill the next from the file. To
host memory they are read in place. Nothing is mapped that a GPU waits for: a mapped page that must be fetched costs more than reading.
"""

import mmap
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..checkpoints.stored import StoredTensor
from ..errors import CheckpointError
from .host_memory import host_buffer
from .precision import stored_dtype

CPU = torch.device("cpu")
# One thread does not saturate a fast disk, nor memory; more than these add nothing (benchmarks/loading.py).
THREADS = 4
PIECE_BYTES = 16 * 1024**2
BUFFERS = 3


@dataclass
class _Buffer:
    """Page-locked memory, and the copies from it that may still be under way."""

    memory: torch.Tensor
    used_until: "list[torch.cuda.Event]" = field(default_factory=list)

    def wait(self) -> None:
        for event in self.used_until:
            event.synchronize()
        self.used_until.clear()


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

    # ---- one tensor

    def mapped(self, stored: StoredTensor) -> torch.Tensor:
        """A tensor on the CPU whose memory is the file's own pages, fetched when touched. Writing to it does not change the file."""
        dtype = stored_dtype(stored)
        if stored.elements == 0:
            return torch.empty(stored.shape, dtype=dtype)
        try:
            with stored.file.open("rb") as file:
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise _unreadable(stored.file, error) from error
        if len(pages) < stored.offset + stored.size_bytes:
            raise _unreadable(stored.file, "it has become shorter")
        count = stored.size_bytes // dtype.itemsize
        return torch.frombuffer(pages, dtype=dtype, count=count, offset=stored.offset).view(raw_shape(stored))

    def on_device(self, stored: StoredTensor, device: torch.device) -> torch.Tensor:
        """A copy of a tensor on a device, in the file's dtype; GGUF's bytes as uint8 [out, bytes of a row]."""
        dtype = stored_dtype(stored)
        if device.type != "cuda":
            return self.mapped(stored).to(device)
        flat = torch.empty(stored.size_bytes, dtype=torch.uint8, device=device)
        self.read_into(stored, flat)
        return flat.view(dtype).view(raw_shape(stored))

    def read_into(self, stored: StoredTensor, target: torch.Tensor) -> None:
        """A tensor's bytes into ``target``, uint8 [size_bytes]. On a GPU they arrive in the order of its current stream."""
        if stored.size_bytes == 0:
            return
        if target.device == CPU:
            self._read(stored, target)
        elif target.device.type != "cuda":
            target.copy_(self.mapped(stored).reshape(-1).view(torch.uint8))
        else:
            buffer = self._next_buffer(stored.size_bytes)
            staged = buffer.memory[: stored.size_bytes]
            self._read(stored, staged)
            target.copy_(staged, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(target.device))
            buffer.used_until.append(copied)

    # ---- how

    def _next_buffer(self, size_bytes: int) -> _Buffer:
        """Room that no copy uses any more."""
        if len(self._buffers) < BUFFERS:
            self._buffers.append(_Buffer(host_buffer(size_bytes)))
            self._turn = len(self._buffers) - 1
        else:
            self._turn = (self._turn + 1) % BUFFERS
        buffer = self._buffers[self._turn]
        buffer.wait()
        if buffer.memory.numel() < size_bytes:
            buffer.memory = host_buffer(size_bytes)
        return buffer

    def _read(self, stored: StoredTensor, target: torch.Tensor) -> None:
        memory = target.numpy().data
        begins = range(0, stored.size_bytes, PIECE_BYTES)
        if len(begins) == 1:
            _read_piece(stored.file, stored.offset, memory)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="wan-sharded-reader")
        jobs = [self._pool.submit(_read_piece, stored.file, stored.offset + begin, memory[begin : begin + PIECE_BYTES]) for begin in begins]
        _finish(job.result for job in jobs)


def _finish(results: Iterable[object]) -> None:
    """Wait for all, and only then raise what one of them raised: no thread may write into memory that is let go."""
    failure: BaseException | None = None
    for result in results:
        try:
            result()  # type: ignore[operator]
        except Exception as error:  # raised again below
            failure = failure or error
    if failure is not None:
        raise failure


def _read_piece(path: Path, offset: int, target: memoryview) -> None:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while target:
                count = file.readinto(target)
                if not count:
                    raise _unreadable(path, "it has become shorter")
                target = target[count:]
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{path} could not be read ({why}). Was it moved or is it damaged? Download it again.")


def raw_shape(stored: StoredTensor) -> tuple[int, ...]:
    """The shape of what the file has: the values' own, or rows of GGUF's bytes."""
    if stored.gguf_type is None:
        return stored.shape
    return stored.shape[0], stored.size_bytes // stored.shape[0]
