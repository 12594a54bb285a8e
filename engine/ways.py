"""One way to compute a model's blocks, with some devices at once or one at a time: each one's share of the tokens, and where blocks go.

Joins what the pure planning needs to what a model is; called by plans, which choose among the ways.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from .checkpoints.stored import HIGH_NOISE
from .errors import PlacementError
from .handle import ModelHandle
from .planning.budgets import Budget
from .planning.devices import Machine
from .planning.footprint import VideoShape, transformer_activation_bytes, worker_activation_bytes
from .planning.forecast import Forecast, Work, forecast, speed_shares
from .planning.placement import HOST, Placement, place_expert
from .planning.remedies import check_host_memory, slider_remedy
from .planning.shares import proportions, within_limits
from .weights.expert import Expert
from .weights.precision import Precision

# Shares are planned by guessed speeds and corrected by measured ones; so much more than planned a device may be given.
SHARE_MARGIN = 1.15
# Halvings in the search for the largest share that fits: to a millionth.
SHARE_STEPS = 20
# What memory takes from a share beyond what its speed would give is told from here on.
NOTED_SHARE = 0.02


class PlannedModel(Protocol):
    """What a plan needs to know of a loaded model."""

    precision: Precision
    learned_reserve_bytes: dict[int, int]

    @property
    def experts(self) -> Mapping[str, Expert]:
        """Both experts by part name."""
        ...

    @property
    def block_speeds(self) -> Mapping[int, float]:
        """Device index -> its measured speed at blocks, in proportion to the others'; nothing where none was measured."""
        ...

    def resident_bytes(self, device: torch.device) -> int:
        """Bytes of weights on a device, both experts."""
        ...

    def host_memory_bytes(self) -> int:
        """What weights take of system memory, pages of mapped files left out."""
        ...


def most_share(share: float) -> float:
    """The largest fraction of the tokens a device may get that is expected to compute this one."""
    return min(1.0, share * SHARE_MARGIN + 0.02)


@dataclass(frozen=True)
class Way:
    """One way to compute: who takes part, and whether all at once."""

    parallel: bool
    budgets: tuple[Budget, ...]


@dataclass(frozen=True)
class Planner:
    """What a model takes on a machine, whichever way it computes.

    Attributes:
        handle: how to spread it.
        loaded: the model to place.
        machine: the devices as they are now.
        host_bytes: system memory that weights may take.
        waiting_bytes: of weights that wait in system memory, and leave it for frames.
    """

    handle: ModelHandle
    loaded: PlannedModel
    machine: Machine
    host_bytes: int
    waiting_bytes: int

    def shares(self, way: Way, size: VideoShape) -> dict[int, float]:
        """Each device's fraction of the tokens: by its speed, but no more than its memory allows."""
        if not way.parallel:
            return {b.device.index: 1.0 for b in way.budgets}
        return self._affordable(self._by_speed(way), way, size)

    def share_notes(self, way: Way, size: VideoShape) -> tuple[str, ...]:
        """Whose memory allows less than its speed would."""
        if not way.parallel:
            return ()
        shares, wanted = self.shares(way, size), self._by_speed(way)
        return tuple(
            f"{b.device.label} computes {shares[b.device.index]:.0%} of the tokens; by its speed it would be {wanted[b.device.index]:.0%}, for "
            "which its memory does not suffice."
            for b in way.budgets
            if shares[b.device.index] < wanted[b.device.index] - NOTED_SHARE
        )

    def _by_speed(self, way: Way) -> dict[int, float]:
        measured = {b.device.index: self.loaded.block_speeds.get(b.device.index, 0.0) for b in way.budgets}
        if all(measured.values()):
            return proportions(measured)
        return speed_shares({b.device.index: b.device for b in way.budgets})

    def _affordable(self, wanted: dict[int, float], way: Way, size: VideoShape) -> dict[int, float]:
        """The wanted fractions, what some GPU has no memory for going to the others; as wanted, where they have none for that either."""
        if len(wanted) == 1 or not way.budgets[0].device.is_gpu:
            return wanted
        limits = {b.device.index: self._largest_share(b, wanted[b.device.index], size) for b in way.budgets}
        if all(wanted[index] <= limit for index, limit in limits.items()):
            return wanted
        limits = {b.device.index: self._largest_share(b, 1.0, size) for b in way.budgets}
        if sum(limits.values()) < 1:
            return wanted
        return dict(zip(wanted, within_limits(list(wanted.values()), [limits[index] for index in wanted]), strict=True))

    def _largest_share(self, budget: Budget, most: float, size: VideoShape) -> float:
        """The largest fraction of the tokens, up to ``most``, that a device has memory for beside the blocks it fetches."""
        room = budget.usable_bytes - 2 * self._largest_block_bytes

        def fits(share: float) -> bool:
            return max(self._worker_bytes(part, budget.device.index, share, size) for part in self.loaded.experts) <= room

        if fits(most):
            return most
        low, high = 0.0, most
        for _ in range(SHARE_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def place(self, way: Way, size: VideoShape, *, remedies: bool = True) -> dict[str, Placement]:
        """Both experts' homes.

        Raises:
            PlacementError: they don't fit.
        """
        check_host_memory(size, self.machine.host_available_bytes + self.waiting_bytes, vae_on_host=not way.budgets[0].device.is_gpu)
        shares = self.shares(way, size)
        try:
            return {
                part: self._place_expert(part, way, size, shares, remedies=remedies and len(shares) == 1) for part in self.loaded.experts
            }
        except PlacementError as error:
            if not remedies or len(shares) == 1:
                raise
            raise PlacementError(
                f"{error} {slider_remedy(way.budgets, lambda tried: self.placed(replace(way, budgets=tried), size) is not None)}"
            ) from None

    def _place_expert(self, part: str, way: Way, size: VideoShape, shares: Mapping[int, float], *, remedies: bool) -> Placement:
        return place_expert(
            self._sizes[part],
            way.budgets,
            device_map=self.handle.device_map,
            offload=self.handle.offload,
            activation_bytes=self._activation_bytes(part, way, size, shares),
            host_bytes=self.host_bytes,
            largest_block_bytes=self._largest_block_bytes,
            parallel=way.parallel,
            remedies=remedies,
        )

    def placed(self, way: Way, size: VideoShape) -> dict[str, Placement] | None:
        """As :meth:`place`; nothing where they don't fit."""
        try:
            return self.place(way, size, remedies=False)
        except PlacementError:
            return None

    def all_on_gpus(self, way: Way, size: VideoShape) -> bool:
        """Whether no weights would wait in system memory."""
        placements = self.placed(way, size)
        return placements is not None and not any(placement.weight_bytes(HOST) for placement in placements.values())

    def _activation_bytes(self, part: str, way: Way, size: VideoShape, shares: Mapping[int, float]) -> dict[int, int]:
        if way.parallel and len(shares) > 1:
            return {index: self._worker_bytes(part, index, share, size) for index, share in shares.items()}
        needed = transformer_activation_bytes(size, self.loaded.experts[part].width, self._element_bytes, **self._sizing(part))
        return {index: needed + self.loaded.learned_reserve_bytes.get(index, 0) for index in shares}

    def _worker_bytes(self, part: str, index: int, share: float, size: VideoShape) -> int:
        """What a forward takes besides weights on one of several devices, which is expected to compute this share."""
        width = self.loaded.experts[part].width
        # Which of them hands the tokens out is known only when homes are; it hardly counts.
        needed = worker_activation_bytes(size, width, self._element_bytes, share=most_share(share), main=True, **self._sizing(part))
        return needed + self.loaded.learned_reserve_bytes.get(index, 0)

    def _sizing(self, part: str) -> Any:
        return {"fragmentation": self.machine.fragmentation, "widened_bytes": self._widened_bytes[part]}

    @property
    def _element_bytes(self) -> int:
        return self.loaded.precision.dtype.itemsize

    @cached_property
    def _widened_bytes(self) -> dict[str, int]:
        return {part: expert.widened_bytes(self.handle.loras.get(part, ())) for part, expert in self.loaded.experts.items()}

    @cached_property
    def _sizes(self) -> dict[str, dict[str, int]]:
        return {part: expert.sizes(self.handle.loras.get(part, ())) for part, expert in self.loaded.experts.items()}

    @cached_property
    def _largest_block_bytes(self) -> int:
        """Both experts' blocks pass through the same buffers."""
        return max(size for sizes in self._sizes.values() for part, size in sizes.items() if part.startswith("blocks."))

    def expected(self, way: Way, placements: Mapping[str, Placement], size: VideoShape) -> Forecast | None:
        expert = self.loaded.experts[HIGH_NOISE]
        config: Any = expert.model.config
        work = Work.of(size, width=expert.width, ffn_width=config.ffn_dim, blocks=config.num_layers, element_bytes=self._element_bytes)
        devices = {b.device.index: b.device for b in way.budgets}
        shares = self._affordable(speed_shares(devices), way, size) if way.parallel else None
        return forecast(placements[HIGH_NOISE], devices, work, self.machine.links, shares)
