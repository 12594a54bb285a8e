"""How fast GPUs and their links are, for plans: measured once in a moment each, without a model.

``None`` where there is no memory for it now; asked again the next time.
"""

import time
from collections.abc import Callable, Iterable
from functools import lru_cache

import torch

from . import usable
from .host_memory import PAGE_LOCKING, host_buffer

MATRIX = 4096
COPIED_BYTES = 64 * 1024**2
# All at once, each for as long as it alone would take about so many seconds, in pieces as staged copies go; over slow links in smaller ones.
TOGETHER_SECONDS = 0.03
TOGETHER_ROUNDS = 3
LARGEST_PIECE_BYTES, SMALLEST_PIECE_BYTES = 16 * 1024**2, 1024**2
FEWEST_PIECES = 8
# Out of memory, of either kind, or a torch without CUDA.
NOT_NOW = (RuntimeError, MemoryError, AssertionError)


def measured_speeds(torch_index: int) -> tuple[float | None, float | None]:
    """TFLOP/s of a GPU at a half-precision matrix product, and bytes per second from page-locked memory."""
    try:
        return _speeds(torch.device("cuda", torch_index))
    except NOT_NOW:
        return None, None
    finally:
        torch.cuda.empty_cache()


def measured_copy(source: torch.device, target: torch.device) -> float | None:
    """Bytes per second from one GPU's memory to another's that it reaches."""
    try:
        return _copy(source, target)
    except NOT_NOW:
        return None
    finally:
        torch.cuda.empty_cache()


def measured_together(links: Iterable[tuple[torch.device, float]]) -> float | None:
    """Bytes per second from and to page-locked memory, all GPUs copying both ways at once: what they reach together. ``None`` also where
    memory can't be page-locked; that is not asked again.

    Args:
        links: each GPU, and its own link's bytes per second.
    """
    try:
        return _together(tuple(links))
    except NOT_NOW:
        return None
    finally:
        torch.cuda.empty_cache()


@lru_cache(maxsize=64)
def _speeds(device: torch.device) -> tuple[float, float]:
    dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= usable.BF16_CAPABILITY else torch.float16
    with torch.inference_mode():
        a = torch.randn(MATRIX, MATRIX, device=device, dtype=dtype)
        b = torch.randn(MATRIX, MATRIX, device=device, dtype=dtype)
        multiplying = best_seconds(device, lambda: torch.mm(a, b))
        memory = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(memory, device=device)
        copying = best_seconds(device, lambda: there.copy_(memory, non_blocking=True))
    return 2 * MATRIX**3 / multiplying / 1e12, COPIED_BYTES / copying


@lru_cache(maxsize=64)
def _copy(source: torch.device, target: torch.device) -> float:
    with torch.inference_mode():
        here, there = (torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device) for device in (source, target))
        # torch copies in the source's stream.
        return COPIED_BYTES / best_seconds(source, lambda: there.copy_(here, non_blocking=True))


def best_seconds(device: torch.device, action: Callable[[], object]) -> float:
    """The shortest of a few runs, by the device's own clock, after a warm-up."""
    seconds = []
    with torch.cuda.device(device):
        for _ in range(8):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            action()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
    return min(seconds[2:])


@lru_cache(maxsize=16)
def _together(links: tuple[tuple[torch.device, float], ...]) -> float | None:
    ways: list[_Way] = []
    with torch.inference_mode():
        for device, speed in links:
            for down in (True, False):
                # Copies from other memory wait for themselves, and show nothing.
                memory = host_buffer(COPIED_BYTES) if PAGE_LOCKING.allowed else torch.empty(0)
                if not memory.is_pinned():
                    PAGE_LOCKING.try_again()  # weights may fare better later
                    return None
                ways.append(_Way(device, memory, speed, down=down))
        best = min(_seconds_together(ways) for _ in range(TOGETHER_ROUNDS))
    return sum(way.total_bytes for way in ways) / best


def _seconds_together(ways: list["_Way"]) -> float:
    for way in ways:
        way.stream.synchronize()
    begin = time.perf_counter()
    # By turns, so that all have something to do from the beginning.
    for number in range(max(way.pieces for way in ways)):
        for way in ways:
            if number < way.pieces:
                way.queue(number)
    for way in ways:
        way.stream.synchronize()
    return time.perf_counter() - begin


class _Way:
    """Copies between a GPU and system memory, one way, in a stream of their own."""

    def __init__(self, device: torch.device, memory: torch.Tensor, speed: float, *, down: bool):
        wanted = speed * TOGETHER_SECONDS
        size = piece_bytes(wanted)
        self.stream = torch.cuda.Stream(device)
        self.pieces = max(1, round(wanted / size))
        self.total_bytes = self.pieces * size
        there = torch.empty_like(memory, device=device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        source, target = (memory, there) if down else (there, memory)
        self._pieces = list(zip(target.split(size), source.split(size), strict=True))

    def queue(self, number: int) -> None:
        target, source = self._pieces[number % len(self._pieces)]
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)


def piece_bytes(wanted_bytes: float) -> int:
    """Of what is copied in so many bytes: a power of two, so that buffers are whole pieces."""
    size = LARGEST_PIECE_BYTES
    while size > SMALLEST_PIECE_BYTES and size * FEWEST_PIECES > wanted_bytes:
        size //= 2
    return size
