"""Plans for a model on a machine: which devices take part, how, and where both experts' blocks go. Moves nothing.

Chooses among the ways to compute (ways.py); called by the owner of loaded models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from .checkpoints.stored import HIGH_NOISE
from .errors import PlacementError
from .handle import ModelHandle
from .planning import footprint
from .planning.advice import advice
from .planning.budgets import NO_RESERVE, Budget, Reserve, budgets_for
from .planning.devices import Machine
from .planning.footprint import VideoShape
from .planning.forecast import WORSE_BY, Forecast
from .planning.placement import Placement
from .planning.remedies import length_remedy
from .ways import PlannedModel, Planner, Way, most_share
from .weights.precision import Precision

# Of no more GPUs than this, every set is planned: 31, within a second.
EVERY_SET_OF = 5


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


def _ways(execution: str, budgets: tuple[Budget, ...]) -> list[Way]:
    """The ways to be considered, the preferred one first."""
    if execution != "auto":
        return [Way(execution == "parallel", budgets)]
    if not budgets[0].device.is_gpu:
        return [Way(False, budgets)]
    ways = [Way(True, budgets)]
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
        ways += [Way(True, tuple(b for b in budgets if b not in gone)) for gone in left_out]
    return [*ways, Way(False, budgets)]  # which needs the least memory


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
    planner = Planner(handle, loaded, machine, host_bytes, waiting_bytes)
    ways = _ways(handle.execution, budgets)
    found = _fitting(planner, ways, shape)
    if not found:
        try:
            planner.place(ways[-1], shape)
        except PlacementError as error:
            remedy = length_remedy(shape, lambda size: planner.place(ways[-1], size, remedies=False))
            if handle.execution != "auto" and any(planner.placed(way, shape) for way in _ways("auto", budgets)):
                remedy = f" With execution auto instead of {handle.execution} this size fits as it is.{remedy}"
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


_Found = tuple[Way, dict[str, Placement], Forecast | None]


def _fitting(planner: Planner, ways: list[Way], shape: VideoShape) -> list[_Found]:
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


def _best(found: list[_Found], ways: list[Way]) -> tuple[Way, dict[str, Placement], Forecast | None, tuple[str, ...]]:
    """The preferred way that fits, unless another is expected to be faster; with the reason where it is not the preferred one."""
    best = found[0]
    for other in found[1:]:
        if best[2] and other[2] and other[2].seconds * WORSE_BY < best[2].seconds:
            best = other
    way, placements, expected = best
    return way, placements, expected, _reason(best, found[0], ways[0])


def _reason(best: _Found, first: _Found, preferred: Way) -> tuple[str, ...]:
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
