"""The placement in words: what lives where, how much of each device that takes, and why. Pure."""

from collections.abc import Mapping

from .budgets import Budget
from .devices import gib
from .placement import HOST, Placement


def block_ranges(parts: list[str]) -> str:
    """``blocks 0-12, 14`` from part names; other names are left out."""
    numbers = sorted(int(name.split(".")[1]) for name in parts if name.startswith("blocks."))
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    words = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
    return f"block{'s' if len(numbers) > 1 else ''} {words}" if words else ""


def placement_report(
    placements: Mapping[str, tuple[str, Placement]],
    *,
    precision: str,
    size: str,
    notes: tuple[str, ...] = (),
    measured: Mapping[int, int] | None = None,
) -> str:
    """Plain text for the loader node and for bug reports; names no paths.

    Args:
        placements: key -> (what the expert is called, its placement).
        precision: in words.
        size: the run's size in words.
        notes: sentences, shown last.
        measured: device index -> measured peak bytes, once a run is over.
    """
    lines = [f"{precision}, planned for {size}; one expert works at a time, the other waits."]
    first = next(iter(placements.values()))[1]
    for word, placement in placements.values():
        lines.append(f"{word}:")
        for budget in placement.budgets:
            lines += _home_line(budget.device.label, placement, budget.device.index)
        lines += _home_line("system memory", placement, HOST)
    for budget in first.budgets:
        lines.append(_device_line(budget, [placement for _, placement in placements.values()], measured))
    return "\n".join([*lines, *(f"Note: {note}" for note in notes)])


def _home_line(label: str, placement: Placement, home: int | str) -> list[str]:
    parts = [name for name, where in placement.homes.items() if where == home and placement.sizes[name]]
    if not parts:
        return []
    others = len([name for name in parts if not name.startswith("blocks.")])
    words = ", ".join(filter(None, (block_ranges(parts), f"{others} other part{'s' if others > 1 else ''}" if others else "")))
    return [f"  {label}: {words} ({gib(placement.weight_bytes(home))})"]


def _device_line(budget: Budget, placements: list[Placement], measured: Mapping[int, int] | None) -> str:
    index = budget.device.index
    peak = max(placement.predicted_peak_bytes(index) for placement in placements)
    limit = f"automatic limit {gib(budget.limit_bytes)}" if budget.automatic else f"slider {gib(budget.limit_bytes)}"
    words = f"{budget.device.label}: {gib(peak)} expected at most, {limit}"
    if measured and index in measured and budget.device.is_gpu:
        words += f", measured {gib(measured[index])}"
    return words
