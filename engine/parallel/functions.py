"""A block's halves as the workers call them: plain, or compiled where that pays.

Compiling fuses what stands between the matrix products, a seventh of a forward's time on an H200. It costs some seconds per device
once, and needs Triton (and a C compiler); where it fails, the plain functions go on and a note says why.
"""

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..errors import first_line
from ..memory_errors import is_out_of_memory
from ..transformer.wan_block import BlockMath

logger = logging.getLogger(__name__)

# What compiling takes per device, and what of a forward's time it is expected to save (benchmarks/parallel.py).
COMPILE_SECONDS = 40.0 if os.name == "nt" else 10.0  # guessed on Windows, where torch compiles in one process
SAVED_SHARE = 0.1


def can_compile() -> bool:
    """Whether torch can compile for these GPUs here: Triton is there and they are new enough for it."""
    try:
        from torch.utils._triton import has_triton

        return torch.cuda.is_available() and bool(has_triton())
    except Exception:  # a Triton that is there and does not work
        return False


def pays_off(seconds_per_forward: float, forwards: int, devices: int) -> bool:
    """Whether compiling is expected to save more time than it takes.

    Args:
        seconds_per_forward: without it.
        forwards: that are still to come.
        devices: to compile for.
    """
    return seconds_per_forward * forwards * SAVED_SHARE > COMPILE_SECONDS * devices


# Of one function: for each device, with and without LoRAs, with weights of either precision.
VERSIONS = 64


def _many_versions() -> Any:
    """Inside, torch compiles another version where it would give up after its usual eight."""
    config: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    return config.patch(**{name: VERSIONS})


class BlockFunctions:
    """The halves of one kind of block. One compiled version serves all blocks and all sizes, but for keys and values: where another size has
    other head groups (groups.py), there is another version for them.

    Args:
        math: the arithmetic.
        compilable: whether compiling is to be considered at all.
    """

    def __init__(self, math: BlockMath, *, compilable: bool = True):
        self.math = math
        self._compilable = compilable
        self.compiled = False
        self.failure: str | None = None
        # Those that compute; one that can't be compiled for goes on without, the others with.
        self.devices: set[torch.device] = set()
        self.without: set[torch.device] = set()
        self._compiled: dict[str, Callable[..., Any]] = {}

    @property
    def may_compile(self) -> bool:
        """Whether there is anything to try."""
        return self._compilable and not self.compiled and self.failure is None and can_compile()

    def compile(self) -> None:
        """Use compiled functions from the next call on; the work is done at the first call on each device."""
        # One graph each, or an error that says what is in the way.
        parts = (self.math.project, self.math.keys_into, self.math.query, self.math.finish)
        try:
            self._compiled = {function.__name__: torch.compile(function, fullgraph=True) for function in parts}
        except RuntimeError as error:  # a Python or a system that torch can't compile for at all
            self._give_up(error, self.devices)
        else:
            self.compiled = True

    def compiled_on(self, device: torch.device) -> bool:
        """Whether a device computes with compiled halves."""
        return self.compiled and device not in self.without

    def _give_up(self, error: Exception, devices: set[torch.device]) -> None:
        """Go on with plain functions on these devices, for good."""
        self.failure = f"{type(error).__name__}: {first_line(error) or 'no reason given'}"
        self.without |= devices
        self.compiled = self.compiled and bool(self.devices - self.without)
        where = f" for {', '.join(map(str, sorted(devices, key=str)))}" if self.compiled else ""
        logger.warning("Compiling the blocks%s failed, going on without: %s", where, self.failure)

    def _call(self, plain: Callable[..., Any], *arguments: Any) -> Any:
        device = arguments[1].device
        if self.compiled_on(device):
            try:
                with _many_versions():
                    return self._compiled[plain.__name__](*arguments)
            except Exception as error:  # compilers raise many kinds, at any new size; the plain functions are what is certain
                if is_out_of_memory(error):
                    raise
                self._give_up(error, {device})
        return plain(*arguments)

    def project(self, weights: Any, x: torch.Tensor, temb: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        """As :meth:`BlockMath.project`."""
        self._any_length(x, cos, sin, temb if temb.ndim == 4 else None)
        return self._call(self.math.project, weights, x, temb, cos, sin)

    def keys_into(
        self, weights: Any, x: torch.Tensor, temb: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rooms: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """As :meth:`BlockMath.keys_into`."""
        self._any_length(x, cos, sin, temb if temb.ndim == 4 else None, *rooms)
        return self._call(self.math.keys_into, weights, x, temb, cos, sin, rooms)

    def query(self, weights: Any, modulated: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """As :meth:`BlockMath.query`."""
        self._any_length(modulated, cos, sin)
        return self._call(self.math.query, weights, modulated, cos, sin)

    def finish(self, weights: Any, x: torch.Tensor, attended: torch.Tensor, temb: torch.Tensor, keys: Any) -> torch.Tensor:
        """As :meth:`BlockMath.finish`."""
        self._any_length(x, attended, temb if temb.ndim == 4 else None)
        return self._call(self.math.finish, weights, x, attended, temb, keys)

    def _any_length(self, *tensors: torch.Tensor | None) -> None:
        """Tell the compiler that the number of tokens varies. Only that: told to guess, it makes the norms' epsilon variable too."""
        if self.compiled:
            _mark_tokens(tensor for tensor in tensors if tensor is not None)


def _mark_tokens(tensors: Iterable[torch.Tensor]) -> None:
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 1)
