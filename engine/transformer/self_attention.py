"""Which function computes self-attention: torch's, or FlashAttention 3 where that is installed, right and faster.

FlashAttention 3 is made for Hopper GPUs (H100, H200); on H200s it takes a sixth less than what torch chooses, as exactly (ARCHITECTURE.md). It
is no requirement: people install it who have such a GPU. Nowhere else is it asked: where it has no kernels for a GPU, as at other errors of
CUDA's while it is started, it ends the process.
"""

import importlib
import importlib.util
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import first_line
from ..memory_errors import is_out_of_memory
from ..speeds import best_seconds
from .wan_block import Attention, attend

logger = logging.getLogger(__name__)

# FlashAttention's own build, and its forward half, which the package index has as "fa3-fwd"; the first that works is taken.
MODULES = ("flash_attn_interface", "fa3_fwd_interface")
HOPPER = (9, 0)
# How far from torch's result it may be, relatively. Both round to half precision, which moves either by 2.3e-3.
ALIKE = 1e-2
# How much faster it must be.
FASTER_BY = 0.97
# (queries, keys, heads) to compare: odd numbers, and, as it has one kernel for odd and one for even numbers of 128 queries, both.
COMPARED = ((333, 1003, 3), (200, 1003, 3))
# To time so many that a GPU is busy for most of a millisecond, longer than asking takes the host: 130 MiB with head width 128. A half and a
# quarter of what a video of 832x480x81 has: torch's is slower where the tokens are no multiple of 128, as they seldom are.
TIMED = (8190, 16380, 8)
# Asked in a row, so that the host is ahead.
ASKED = 16


@dataclass
class Choice:
    """How self-attention is computed on a device.

    Attributes:
        attention: computes it.
        flash: whether that is FlashAttention 3.
        refused: why it is not, or no longer, though installed; empty where it is not installed, or not for this device.
        gave_up: whether it was, until it failed.
    """

    attention: Attention = attend
    flash: bool = False
    refused: str = ""
    gave_up: bool = False


_choices: dict[tuple[torch.device, torch.dtype, int], Choice] = {}
_choosing = threading.Lock()


def self_attention(device: torch.device, dtype: torch.dtype, head_width: int) -> Attention:
    """What computes self-attention on a device. At the first call for a Hopper GPU this is found out, which takes a moment, waits for the
    device's current stream and allocates some 130 MiB there.

    Raises:
        torch.OutOfMemoryError: there is no room for that; nothing is decided then.
    """
    if device.type != "cuda":
        return attend
    key = (device, dtype, head_width)
    choice = _choices.get(key)
    if choice is None:
        with _choosing:
            choice = _choices.get(key)
            if choice is None:
                choice = _choices[key] = choose(device, dtype, head_width)
    return choice.attention


def choices(devices: Iterable[torch.device], dtype: torch.dtype) -> dict[torch.device, Choice]:
    """What was chosen for those of these devices that have computed in this dtype, in this process."""
    wanted = set(devices)
    return {device: choice for (device, kind, _), choice in _choices.items() if device in wanted and kind == dtype}


def choose(
    device: torch.device,
    dtype: torch.dtype,
    head_width: int,
    *,
    modules: Iterable[str] | None = None,
    seconds: Callable[[torch.device, Callable[[], object]], float] = best_seconds,
) -> Choice:
    """Find out what is best on a device.

    Args:
        device: a GPU.
        dtype: of queries, keys and values.
        head_width: theirs.
        modules: where FlashAttention 3 may be found; ``MODULES`` by default.
        seconds: how long a function takes on a device.

    Raises:
        torch.OutOfMemoryError: there is no room to find out.
    """
    # AMD's GPUs count their generations in the same numbers.
    if torch.version.hip or torch.cuda.get_device_capability(device) != HOPPER:
        return Choice()
    function, why_not = _flash_3(MODULES if modules is None else modules)
    if function is None:
        return _refused(device, why_not) if why_not else Choice()
    flash = _Flash(function, device)
    try:
        with torch.inference_mode():
            for size in COMPARED:
                compared = _random(size, head_width, device, dtype)
                ours, theirs = flash.ask(*compared).float(), attend(*compared).float()
                error = float((ours - theirs).norm() / theirs.norm())
                if not error <= ALIKE:
                    return _refused(device, f"its result is {error:.1e} away from torch's")
            timed = _random(TIMED, head_width, device, dtype)
            quick, usual = (seconds(device, _in_a_row(ask, timed)) / ASKED for ask in (flash.ask, attend))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return _refused(device, _words(error))
    logger.info("%s: attention takes %.2f ms by FlashAttention 3, %.2f by torch", device, quick * 1e3, usual * 1e3)
    if quick > usual * FASTER_BY:
        return _refused(device, f"torch's own is as fast here ({usual * 1e3:.2f} ms, where it takes {quick * 1e3:.2f})")
    return flash.choice


class _Flash:
    """FlashAttention 3 on one device; torch's function takes over for good if it ever fails."""

    def __init__(self, function: Callable[..., Any], device: torch.device):
        self._function, self._device = function, device
        self.choice = Choice(self, flash=True)

    def ask(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """As :func:`attend`; raises what it raises."""
        result = self._function(query, key, value)
        # Earlier versions return the sums of the softmax too.
        return result[0] if isinstance(result, tuple) else result

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.choice.flash:
            try:
                return self.ask(query, key, value)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self.choice.flash, self.choice.gave_up, self.choice.refused = False, True, _words(error)
                logger.warning("FlashAttention 3 failed on %s, going on with torch's attention: %s", self._device, self.choice.refused)
        return attend(query, key, value)


def _flash_3(modules: Iterable[str]) -> tuple[Callable[..., Any] | None, str]:
    """Its function by the first of these modules that works; where one is there and none works, why."""
    why_not = ""
    for name in modules:
        try:
            if importlib.util.find_spec(name) is not None:
                return getattr(importlib.import_module(name), "flash_attn_func"), ""  # noqa: B009  no stubs
        except Exception as error:  # built for another torch or CUDA, or something else of that name
            if is_out_of_memory(error):
                raise
            why_not = why_not or f"{name} can't be imported: {_words(error)}"
    return None, why_not


def _random(size: tuple[int, int, int], head_width: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Query, key and value as a forward has them: the query some heads of more, key and value side by side."""
    queries, keys, heads = size
    generator = torch.Generator(device).manual_seed(0)  # the process's own is the user's

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    key, value = drawn(1, keys, 2, heads, head_width).unbind(2)
    return drawn(1, queries, heads + 1, head_width)[:, :, 1:], key, value


def _in_a_row(ask: Attention, given: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    def action() -> None:
        for _ in range(ASKED):
            ask(*given)

    return action


def _words(error: Exception) -> str:
    return (first_line(error) or type(error).__name__).rstrip(".")


def _refused(device: torch.device, why: str) -> Choice:
    logger.warning("FlashAttention 3 is installed, and not used on %s: %s", device, why)
    return Choice(refused=why)
