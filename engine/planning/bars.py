"""The placement as bars: one for each device and one for system memory, what is in it and where its limit is. Pure.

For a picture: what each number is called, and how it looks, is the business of whoever draws it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .budgets import CONTEXT_BYTES, Budget
from .devices import GIB, DeviceInfo, Machine
from .footprint import VideoShape, host_bytes
from .placement import HOST, Placement
from .vae_stage import vae_stages

# Kinds of what a bar is made of, in the order in which they lie.
CONTEXT, FETCHED, ACTIVATIONS, FRAMES = "cuda", "fetched", "activations", "frames"
SYSTEM_MEMORY = "system memory"


@dataclass(frozen=True)
class Part:
    """A piece of a bar.

    Attributes:
        kind: "cuda" (the driver's share), "fetched" (room for fetched blocks), "activations", "frames" (pictures in system memory), or
            the name of an expert's part ("transformer", "transformer_2") for its weights.
        size_bytes: how much.
        waiting: weights of the expert that does not work just now; they leave when something else needs their room.
    """

    kind: str
    size_bytes: int
    waiting: bool = False


@dataclass(frozen=True)
class Bar:
    """One device's memory, at the moment that needs the most of it while an expert works.

    Attributes:
        label: "GPU 0 · RTX 5060 Ti 16 GB", "CPU" or "system memory".
        total_bytes: of the device; 0 where that is not known.
        limit_bytes: the most this pack may use there; 0 for a GPU that is left out.
        automatic: whether that comes from what is free, rather than from a slider.
        taken_bytes: what others have there: never to be had.
        parts: what is planned, one behind the other.
        vae_bytes: what decoding with the model's VAE takes there; it comes after the experts, whose weights then step aside.
        measured_bytes: the most that torch's allocator held in the last run, the driver's share not in it; ``None`` before one.
        left_out: a GPU that takes no part.
    """

    label: str
    total_bytes: int
    limit_bytes: int
    automatic: bool
    taken_bytes: int
    parts: tuple[Part, ...] = ()
    vae_bytes: int = 0
    measured_bytes: int | None = None
    left_out: bool = False


def memory_bars(
    placements: Mapping[str, Placement],
    machine: Machine,
    shape: VideoShape,
    *,
    host_weight_bytes: int,
    own_vae: bool,
    measured: Mapping[int, int] | None = None,
) -> tuple[Bar, ...]:
    """A bar for each device of the machine, and one for system memory where GPUs compute.

    Args:
        placements: expert part name -> its placement.
        machine: all devices, also those that the placements leave out.
        shape: the run's size.
        host_weight_bytes: the most that weights may take of system memory.
        own_vae: the model's VAE decodes, so that what it takes is known.
        measured: device index -> measured peak, once a run is over.
    """
    budgets = {budget.device.index: budget for budget in next(iter(placements.values())).budgets}
    stage = vae_stages(shape, tuple(budgets.values()), decode=True, fragmentation=machine.fragmentation)[0] if own_vae else None
    bars = []
    for device in machine.devices:
        budget = budgets.get(device.index)
        if budget is None:
            bars.append(Bar(device.label, device.total_bytes, 0, False, _taken(device), left_out=True))
            continue
        vae_bytes = stage.bytes_needed if stage and stage.budget is budget else 0
        # The CPU has no allocator that counts.
        peak = (measured or {}).get(device.index) if device.is_gpu else None
        bars.append(_device_bar(budget, placements, vae_bytes, peak))
    if machine.devices[0].is_gpu:
        bars.append(_host_bar(placements, machine, shape, host_weight_bytes))
    return tuple(bars)


def _taken(device: DeviceInfo) -> int:
    return max(0, device.total_bytes - device.free_bytes)


def _device_bar(budget: Budget, placements: Mapping[str, Placement], vae_bytes: int, peak: int | None) -> Bar:
    device, index = budget.device, budget.device.index
    busiest = max(placements, key=lambda name: placements[name].predicted_peak_bytes(index))
    placement = placements[busiest]
    parts = [Part(CONTEXT, CONTEXT_BYTES)] if device.is_gpu else []
    if placement.predicted_peak_bytes(index):
        fetched = placement.fetch_bytes.get(index, 0)
        parts += [
            Part(busiest, placement.weight_bytes(index)),
            Part(FETCHED, fetched),
            Part(ACTIVATIONS, placement.reserve_bytes[index] - fetched),
        ]
    room = budget.limit_bytes - sum(part.size_bytes for part in parts)
    parts += _waiting(placements, busiest, index, room)
    taken = device.total_bytes - budget.ceiling_bytes
    return Bar(device.label, device.total_bytes, budget.limit_bytes, budget.automatic, taken, _real(parts), vae_bytes, peak)


def _host_bar(placements: Mapping[str, Placement], machine: Machine, shape: VideoShape, weight_bytes: int) -> Bar:
    first = next(iter(placements))
    weights = placements[first].weight_bytes(HOST)
    frames = host_bytes(shape, vae_on_host=False)
    parts = [Part(first, weights), *_waiting(placements, first, HOST, weight_bytes - weights), Part(FRAMES, frames)]
    total, free = machine.host_total_bytes, max(machine.host_available_bytes, weight_bytes)  # what we hold counts as free
    return Bar(SYSTEM_MEMORY, total, weight_bytes, True, max(0, total - free), _real(parts))


def _waiting(placements: Mapping[str, Placement], working: str, home: int | str, room_bytes: int) -> list[Part]:
    """What of the other expert can stay where it is while one works."""
    others = [(name, placement.weight_bytes(home)) for name, placement in placements.items() if name != working]
    return [Part(name, min(size, max(0, room_bytes)), waiting=True) for name, size in others]


def _real(parts: list[Part]) -> tuple[Part, ...]:
    return tuple(part for part in parts if part.size_bytes > 0)


def as_json(bars: tuple[Bar, ...]) -> list[dict[str, object]]:
    """What a page can read: sizes in GiB, to the hundredth."""

    def gib(size_bytes: int | None) -> float | None:
        return None if size_bytes is None else round(size_bytes / GIB, 2)

    return [
        {
            "label": bar.label,
            "total_gib": gib(bar.total_bytes),
            "limit_gib": gib(bar.limit_bytes),
            "automatic": bar.automatic,
            "taken_gib": gib(bar.taken_bytes),
            "parts": [{"kind": part.kind, "gib": gib(part.size_bytes), "waiting": part.waiting} for part in bar.parts],
            "vae_gib": gib(bar.vae_bytes),
            "measured_gib": gib(bar.measured_bytes),
            "left_out": bar.left_out,
        }
        for bar in bars
    ]
