"""Copies from system memory to GPUs, queued without letting Python's other threads in: torch does that at each call, and waits to be let in again."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .pieces import Piece

NOT_READY = 600  # CUDA_ERROR_NOT_READY
# The driver has room for about a thousand copies that wait, and there are some forty pieces at a time.
MOST_TARGETS = 20


class Filled(Protocol):
    """Memory that a piece was read into.

    Attributes:
        memory: uint8.
        address: of its first byte.
        is_locked: whether it is page-locked.
    """

    memory: torch.Tensor
    address: int
    is_locked: bool

    @property
    def piece(self) -> Piece: ...


@dataclass(eq=False)
class Copied:
    """When copies have arrived.

    Attributes:
        number: the driver's name of the event.
        device: of the GPU that makes them.
    """

    event: "torch.cuda.Event"
    number: int
    device: torch.device


@dataclass
class _Gpu:
    """Attributes: context, the driver's; idle, what no copies are waited for with."""

    context: int
    idle: list[Copied] = field(default_factory=list)


class DriverCopies:
    """Queues copies by asking CUDA's driver. For one thread.

    Args:
        driver: as :func:`~.library_calls.cuda_driver` has it.
    """

    def __init__(self, driver: Any):
        self._driver = driver
        self._gpus: dict[torch.device, _Gpu] = {}

    def queue(self, stream: "torch.cuda.Stream", filled: Sequence[Filled]) -> Copied:
        """From memory that was read into to where the parts of pieces go; it must stay until they have arrived.

        Raises:
            RuntimeError: the GPU refuses. Some may be under way.
        """
        copied = self._idle(stream)
        # The driver waits for copies from memory that is not locked, and where too many are queued; torch lets others go on meanwhile.
        if not all(one.is_locked and len(one.piece.targets) <= MOST_TARGETS for one in filled):
            with torch.inference_mode(), torch.cuda.stream(stream):
                for one in filled:
                    for place, target in one.piece.targets:
                        target.view().copy_(one.memory[place : place + target.size_bytes], non_blocking=True)
                copied.event.record(stream)
            return copied
        driver, raw = self._driver, stream.cuda_stream
        # The stream that all is queued in at first has no name of its own: it is the one of the current context.
        self._check(driver.cuCtxSetCurrent(self._gpus[stream.device].context))
        for one in filled:
            for place, target in one.piece.targets:
                self._check(driver.cuMemcpyHtoDAsync_v2(target.address, one.address + place, target.size_bytes, raw))
        self._check(driver.cuEventRecord(copied.number, raw))
        return copied

    def are_over(self, copied: Copied) -> bool:
        """Whether they have arrived, or never will: the GPU failed, which whoever uses it next is told too."""
        answer = self._driver.cuEventQuery(copied.number)
        if answer in (0, NOT_READY):
            return answer == 0
        try:
            return copied.event.query()  # a buffer that is filled too soon would be another tensor's: torch has the last word
        except RuntimeError:
            return True

    def give_back(self, copied: Copied) -> None:
        """It is waited for no more."""
        self._gpus[copied.device].idle.append(copied)

    def _idle(self, stream: "torch.cuda.Stream") -> Copied:
        gpu = self._gpus.get(stream.device)
        if gpu is not None and gpu.idle:
            return gpu.idle.pop()
        with torch.cuda.device(stream.device):
            event = torch.cuda.Event()
            event.record(stream)  # makes it, and the GPU's context this thread's
            if gpu is None:
                context = ctypes.c_void_p()
                self._check(self._driver.cuCtxGetCurrent(ctypes.byref(context)))
                self._gpus[stream.device] = _Gpu(context.value or 0)
        return Copied(event, event.cuda_event, stream.device)

    def _check(self, error: int) -> None:
        if error:
            words = ctypes.c_char_p()
            self._driver.cuGetErrorString(error, ctypes.byref(words))
            raise RuntimeError(f"CUDA error: {(words.value or b'unknown').decode()} (number {error}, where a copy to a GPU was queued)")
