"""System memory that GPUs copy from and to at the link's full speed.

torch's own pinned allocations are rounded up to powers of two, which for a 0.7 GB block wastes a third. Here ordinary memory
is registered with the driver instead, to the byte, and unregistered when its last tensor is gone.
"""

import logging
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

THREADS = min(8, os.cpu_count() or 1)
TOUCHED_BYTES = 32 * 1024**2
logger = logging.getLogger(__name__)


def host_buffer(size_bytes: int) -> torch.Tensor:
    """Uninitialised system memory, uint8 [size_bytes], page-locked where CUDA is in use and allows it.

    A GPU's copy from memory that could not be locked works too, but waits for itself; ``tensor.is_pinned()`` tells.
    """
    memory = np.empty(max(1, size_bytes), dtype=np.uint8)
    tensor = torch.from_numpy(memory)[:size_bytes]
    if torch.cuda.is_available():
        _touch(memory)
        runtime: Any = torch.cuda.cudart()
        pointer = memory.ctypes.data
        error = runtime.cudaHostRegister(pointer, memory.nbytes, 0)
        if int(error) == 0:
            # Called at the very beginning of the array's end, while the memory still is there.
            weakref.finalize(memory, runtime.cudaHostUnregister, pointer).atexit = False
        else:
            logger.warning(
                "%.1f GiB of system memory could not be page-locked (%s); copies from it will be slower.", size_bytes / 1024**3, error
            )
    return tensor


def _touch(memory: np.ndarray[Any, Any]) -> None:
    """Have the system give the memory's pages now, to several threads: the driver alone would fetch them one by one, many times slower."""
    pieces = [memory[begin : begin + TOUCHED_BYTES] for begin in range(0, memory.nbytes, TOUCHED_BYTES)]
    if len(pieces) > 1:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda piece: piece.fill(0), pieces))


class HostPool:
    """Buffers of parts that have left system memory, kept for the next ones: making one costs more than filling it.

    Args:
        keep_bytes: the most that may wait unused.
    """

    def __init__(self, keep_bytes: int = 2 * 1024**3):
        self._keep_bytes = keep_bytes
        # Of all buffers made, those that could not be page-locked.
        self.unlocked_bytes = 0
        self._free: list[torch.Tensor] = []

    @property
    def unused_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._free)

    def take(self, size_bytes: int) -> torch.Tensor:
        """A buffer as from :func:`host_buffer`; its contents are anything."""
        for buffer in self._free:
            if buffer.numel() == size_bytes:
                self._free = [other for other in self._free if other is not buffer]
                return buffer
        buffer = host_buffer(size_bytes)
        if torch.cuda.is_available() and not buffer.is_pinned():
            self.unlocked_bytes += size_bytes
        return buffer

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back that nothing uses any more, copies under way included."""
        if self.unused_bytes + buffer.numel() <= self._keep_bytes:
            self._free.append(buffer)

    def clear(self) -> None:
        """Give all unused memory back to the system."""
        self._free.clear()
