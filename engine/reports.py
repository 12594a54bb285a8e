"""A plan, and what was measured of it, for people: in words, and as bars for a picture."""

from collections.abc import Mapping

from .checkpoints.stored import EXPERT_WORDS, HIGH_NOISE
from .parallel.state import Timing
from .planning.bars import Bar, memory_bars
from .planning.report import how_lines, placement_report
from .plans import Plan


def plan_report(plan: Plan, measured: dict[int, int] | None = None, timings: Mapping[int, Timing] | None = None) -> str:
    """A plan in words, and what was measured of it once a run is over."""
    placements = {part: (EXPERT_WORDS[part], placement) for part, placement in plan.placements.items()}
    tokens = {index: (timing.tokens, timing.seconds * 1e3) for index, timing in (timings or {}).items()}
    return placement_report(
        placements,
        precision=str(plan.precision),
        size=str(plan.shape),
        how=how_lines(plan.placements[HIGH_NOISE], plan.shares, plan.expected, tokens),
        notes=plan.notes,
        measured=measured,
    )


def plan_bars(plan: Plan, measured: Mapping[int, int] | None = None, *, own_vae: bool) -> tuple[Bar, ...]:
    """A plan as bars, one for each device and one for system memory.

    Args:
        plan: what is planned.
        measured: device index -> the most that torch's allocator held, once a run is over.
        own_vae: the model's VAE decodes, rather than one from elsewhere.
    """
    return memory_bars(plan.placements, plan.machine, plan.shape, host_weight_bytes=plan.host_bytes, own_vae=own_vae, measured=measured)
