"""The placement in words: what lives where, how much of each device that takes, and why. Pure."""

from collections.abc import Mapping

from .budgets import CONTEXT_BYTES, Budget
from .devices import gib
from .forecast import Forecast
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
    how: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
    measured: Mapping[int, int] | None = None,
) -> str:
    """Plain text for the loader node and for bug reports; names no paths.

    Args:
        placements: key -> (what the expert is called, its placement).
        precision: in words.
        size: the run's size in words.
        how: who computes, and what is expected or measured of it.
        notes: sentences, shown last.
        measured: device index -> measured peak bytes, once a run is over.
    """
    lines = [f"{precision}, planned for {size}; one expert works at a time, the other waits.", *how]
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
    # As the slider, everything included.
    context = CONTEXT_BYTES if budget.device.is_gpu else 0
    peak = max(placement.predicted_peak_bytes(index) for placement in placements) + context
    limit = f"automatic limit {gib(budget.limit_bytes)}" if budget.automatic else f"slider {gib(budget.limit_bytes)}"
    words = f"{budget.device.label}: {gib(peak)} for the expert at work, {limit}"
    if measured and index in measured and budget.device.is_gpu:
        # What is spare holds the waiting expert, and before and after the blocks the text encoder and the VAE.
        words += f", measured {gib(measured[index] + context)} over the whole run"
    return words


def how_lines(
    placement: Placement, shares: Mapping[int, float], expected: Forecast | None, tokens: Mapping[int, tuple[int, float]] | None = None
) -> tuple[str, ...]:
    """Who computes: the shares of the tokens, what is expected of a forward, and what was measured.

    Args:
        placement: of one of the experts.
        shares: device index -> the planned fraction of the tokens.
        expected: of one forward.
        tokens: device index -> tokens of the latest forward, and milliseconds a block.
    """
    names = {budget.device.index: budget.device.label for budget in placement.budgets}
    lines = []
    if placement.parallel and len(names) > 1:
        planned = ", ".join(f"{names[index]} {share:.0%}" for index, share in shares.items())
        lines.append(f"All GPUs compute every block, each its share of the tokens; planned: {planned}.")
    elif len(names) > 1:
        lines.append("One GPU computes at a time, block after block.")
    if tokens and len(tokens) > 1:
        total = sum(count for count, _ in tokens.values())
        found = ", ".join(f"{names[index]} {count / total:.0%} in {ms:.1f} ms a block" for index, (count, ms) in tokens.items())
        lines.append(f"Shares by measured speed: {found}.")
    if expected is not None:
        lines.append(
            f"Expected: about {expected.seconds:.1f} s a forward (two a step where cfg is above 1); the limit is {expected.limit}."
        )
    return tuple(lines)
