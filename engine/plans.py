"""Plans for a model on a machine: which devices take part, how, and where both experts' blocks go. Moves nothing.

Joins what the pure planning needs to what a model is; called by the owner of loaded models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any, Protocol

import torch

from .checkpoints.stored import HIGH_NOISE
from .errors import PlacementError
from .handle import ModelHandle
from .planning import footprint
from .planning.advice import advice
from .planning.budgets import NO_RESERVE, Budget, Reserve, budgets_for
from .planning.devices import Machine
from .planning.footprint import VideoShape, transformer_activation_bytes, worker_activation_bytes
from .planning.forecast import WORSE_BY, Forecast, Work, forecast, speed_shares
from .planning.placement import HOST, Placement, place_expert
from .planning.remedies import check_host_memory, length_remedy, slider_remedy
from .planning.shares import proportions, within_limits
from .weights.expert import Expert
from .weights.precision import Precision

# Shares are planned by guessed speeds and corrected by measured ones; so much more than planned a device may be given.
SHARE_MARGIN = 1.15
# Halvings in the search for the largest share that fits: to a millionth.
SHARE_STEPS = 20
# What memory takes from a share beyond what its speed would give is told from here on.
NOTED_SHARE = 0.02
# Of no more GPUs than this, every set is planned: 31, within a second.
EVERY_SET_OF = 5


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


@dataclass(frozen=True)
class Plan:
    """Where everything goes for runs up to one size.

    Attributes:
        shape: the largest run it holds for.
        budgets: the limits of the devices that take part.
        placements: expert part name ("transformer", "transformer_2") -> its placement.
        precision: how weights are kept.
        machine: the devices as they were, also those that are left out.
        offload: what the user allows, "auto", "cpu" or "none".
        notes: sentences for people.
        shares: device index -> the fraction of the tokens it is expected to compute; all 1 where one device computes at a time.
        expected: of one forward, where the devices' speeds are known.
        host_bytes: system memory that weights may take.
        reserve: what the application around us wants left alone.
    """

    shape: VideoShape
    budgets: tuple[Budget, ...]
    placements: Mapping[str, Placement]
    precision: Precision
    machine: Machine
    offload: str
    notes: tuple[str, ...]
    shares: Mapping[int, float]
    expected: Forecast | None = None
    host_bytes: int = 0
    reserve: Reserve = NO_RESERVE

    @property
    def fragmentation(self) -> float:
        """Of the allocator, as planned for."""
        return self.machine.fragmentation

    @property
    def parallel(self) -> bool:
        """Whether all devices compute every block."""
        return self.placements[HIGH_NOISE].parallel

    @property
    def main_device(self) -> torch.device:
        placement = self.placements[HIGH_NOISE]
        return torch.device(self.budget(placement.main_device).device.torch_device)

    @property
    def frames_bytes(self) -> int:
        """System memory that a run's frames take at their peak, with the VAE's work where the CPU does it."""
        return footprint.host_bytes(self.shape, vae_on_host=not self.budgets[0].device.is_gpu)

    def budget(self, index: int) -> Budget:
        return next(b for b in self.budgets if b.device.index == index)

    def most_share(self, index: int) -> float:
        """The largest fraction of the tokens that a device's memory is planned for."""
        return most_share(self.shares[index])

    def spare_bytes(self, index: int) -> int:
        """What a device may use and nothing is planned for."""
        return self.budget(index).usable_bytes - max(p.predicted_peak_bytes(index) for p in self.placements.values())


def most_share(share: float) -> float:
    """The largest fraction of the tokens a device may get that is expected to compute this one."""
    return min(1.0, share * SHARE_MARGIN + 0.02)


def still_holds(old: Plan, new: Plan) -> bool:
    """Whether the homes in force also suit a new plan's limits and size, so that nothing needs to move."""
    if old.parallel != new.parallel or [b.device.torch_device for b in old.budgets] != [b.device.torch_device for b in new.budgets]:
        return False
    for part, wanted in new.placements.items():
        current = old.placements[part]
        if current.main_device != wanted.main_device or len(current.offloaded) > len(wanted.offloaded):
            return False
        for budget in new.budgets:
            index = budget.device.index
            if current.weight_bytes(index) + wanted.reserve_bytes[index] > budget.usable_bytes:
                return False
    return True


@dataclass(frozen=True)
class _Way:
    """One way to compute: who takes part, and whether all at once."""

    parallel: bool
    budgets: tuple[Budget, ...]


@dataclass(frozen=True)
class _Planner:
    handle: ModelHandle
    loaded: PlannedModel
    machine: Machine
    host_bytes: int
    # Of weights that wait in system memory, and leave it for frames.
    waiting_bytes: int

    def shares(self, way: _Way, size: VideoShape) -> dict[int, float]:
        """Each device's fraction of the tokens: by its speed, but no more than its memory allows."""
        if not way.parallel:
            return {b.device.index: 1.0 for b in way.budgets}
        return self._affordable(self._by_speed(way), way, size)

    def share_notes(self, way: _Way, size: VideoShape) -> tuple[str, ...]:
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

    def _by_speed(self, way: _Way) -> dict[int, float]:
        measured = {b.device.index: self.loaded.block_speeds.get(b.device.index, 0.0) for b in way.budgets}
        if all(measured.values()):
            return proportions(measured)
        return speed_shares({b.device.index: b.device for b in way.budgets})

    def _affordable(self, wanted: dict[int, float], way: _Way, size: VideoShape) -> dict[int, float]:
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

    def place(self, way: _Way, size: VideoShape, *, remedies: bool = True) -> dict[str, Placement]:
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

    def _place_expert(self, part: str, way: _Way, size: VideoShape, shares: Mapping[int, float], *, remedies: bool) -> Placement:
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

    def placed(self, way: _Way, size: VideoShape) -> dict[str, Placement] | None:
        """As :meth:`place`; nothing where they don't fit."""
        try:
            return self.place(way, size, remedies=False)
        except PlacementError:
            return None

    def all_on_gpus(self, way: _Way, size: VideoShape) -> bool:
        """Whether no weights would wait in system memory."""
        placements = self.placed(way, size)
        return placements is not None and not any(placement.weight_bytes(HOST) for placement in placements.values())

    def _activation_bytes(self, part: str, way: _Way, size: VideoShape, shares: Mapping[int, float]) -> dict[int, int]:
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

    def expected(self, way: _Way, placements: Mapping[str, Placement], size: VideoShape) -> Forecast | None:
        expert = self.loaded.experts[HIGH_NOISE]
        config: Any = expert.model.config
        work = Work.of(size, width=expert.width, ffn_width=config.ffn_dim, blocks=config.num_layers, element_bytes=self._element_bytes)
        devices = {b.device.index: b.device for b in way.budgets}
        shares = self._affordable(speed_shares(devices), way, size) if way.parallel else None
        return forecast(placements[HIGH_NOISE], devices, work, self.machine.links, shares)


def _ways(execution: str, budgets: tuple[Budget, ...]) -> list[_Way]:
    """The ways to be considered, the preferred one first."""
    if execution != "auto":
        return [_Way(execution == "parallel", budgets)]
    if not budgets[0].device.is_gpu:
        return [_Way(False, budgets)]
    ways = [_Way(True, budgets)]
    if len(budgets) > 1 and all(b.device.speed_tflops for b in budgets):
        # A fast card may have a slow link, or little memory. Of many GPUs not every set is tried: without any one of them, without more and
        # more of the slowest, and each alone.
        slowest_first = sorted(budgets, key=lambda b: (float(b.device.speed_tflops or 0), float(b.device.link_bytes_per_s or 0)))
        left_out: list[Sequence[Budget]] = []
        if len(budgets) <= EVERY_SET_OF:
            left_out += [gone for count in range(1, len(budgets)) for gone in combinations(slowest_first, count)]
        else:
            left_out += [[budget] for budget in slowest_first] + [slowest_first[:count] for count in range(2, len(budgets))]
            left_out += [[other for other in budgets if other is not budget] for budget in slowest_first[:-1]]
        ways += [_Way(True, tuple(b for b in budgets if b not in gone)) for gone in left_out]
    return [*ways, _Way(False, budgets)]  # which needs the least memory


def make_plan(
    handle: ModelHandle,
    loaded: PlannedModel,
    machine: Machine,
    shape: VideoShape,
    notes: tuple[str, ...] = (),
    *,
    in_memory: PlannedModel,
    reserve: Reserve = NO_RESERVE,
) -> Plan:
    """Homes for both experts for a run of a size. Moves nothing.

    Args:
        handle: how to spread it.
        loaded: the model to place.
        machine: the devices as they are now.
        shape: the run's size.
        notes: to be repeated in the plan.
        in_memory: whose weights are on the devices now; they count as free.
        reserve: what the application around us wants left alone.

    Raises:
        PlacementError: it does not fit; the message names the slider and the value, and the length that would fit.
    """
    held = {d.index: in_memory.resident_bytes(torch.device(d.torch_device)) for d in machine.devices}
    budgets, budget_notes = budgets_for(machine, handle.max_memory_gib, held_bytes=held, reserve=reserve)
    waiting_bytes = in_memory.host_memory_bytes()
    host_bytes = max(0, machine.host_available_bytes - reserve.host_bytes + waiting_bytes)
    planner = _Planner(handle, loaded, machine, host_bytes, waiting_bytes)
    ways = _ways(handle.execution, budgets)
    found = _fitting(planner, ways, shape)
    if not found:
        try:
            planner.place(ways[-1], shape)
        except PlacementError as error:
            remedy = length_remedy(shape, lambda size: planner.place(ways[-1], size, remedies=False))
            raise PlacementError(f"{error}{remedy}") from None
    way, placements, expected, way_notes = _best(found, ways)
    advised = advice(
        placements[HIGH_NOISE],
        machine,
        handle.max_memory_gib,
        offload=handle.offload,
        few_bits=loaded.precision.quantized
        and not (loaded.precision.as_stored and any(e.files.wide_dtype for e in loaded.experts.values())),
        expected=expected,
        all_on_gpus=lambda tried: planner.all_on_gpus(replace(way, budgets=tried), shape),
    )
    return Plan(
        shape,
        way.budgets,
        placements,
        loaded.precision,
        machine,
        handle.offload,
        (*machine.warnings, *notes, *budget_notes, *way_notes, *planner.share_notes(way, shape), *placements[HIGH_NOISE].notes, *advised),
        planner.shares(way, shape),
        expected,
        host_bytes,
        reserve,
    )


_Found = tuple[_Way, dict[str, Placement], Forecast | None]


def _fitting(planner: _Planner, ways: list[_Way], shape: VideoShape) -> list[_Found]:
    found: list[_Found] = []
    for way in ways:
        placements = planner.placed(way, shape)
        if placements is None:
            continue
        expected = planner.expected(way, placements, shape)
        found.append((way, placements, expected))
        if expected is None:
            break  # nothing to compare by
    return found


def _best(found: list[_Found], ways: list[_Way]) -> tuple[_Way, dict[str, Placement], Forecast | None, tuple[str, ...]]:
    """The preferred way that fits, unless another is expected to be faster; with the reason where it is not the preferred one."""
    best = found[0]
    for other in found[1:]:
        if best[2] and other[2] and other[2].seconds * WORSE_BY < best[2].seconds:
            best = other
    way, placements, expected = best
    return way, placements, expected, _reason(best, found[0], ways[0])


def _reason(best: _Found, first: _Found, preferred: _Way) -> tuple[str, ...]:
    way, _, expected = best
    if way == preferred:
        return ()
    what = "One GPU computes at a time, and fetches no block ahead" if not way.parallel else ""
    left_out = [b.device.label for b in preferred.budgets if b not in way.budgets]
    if left_out:
        what = f"{' and '.join(left_out)} {'is' if len(left_out) == 1 else 'are'} left out"
    if first[0] != preferred or expected is None or first[2] is None:
        whole = "all GPUs at once need" if len(preferred.budgets) > 1 else "fetching ahead needs"
        return (f"{what}: {whole} more memory than {'they' if len(preferred.budgets) > 1 else 'it'} may use.",)
    return (
        f"{what}: a forward is expected to take {expected.seconds:.1f} s so, and {first[2].seconds:.1f} s with all GPUs at once, held up by {first[2].limit}.",
    )
