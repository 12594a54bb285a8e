"""After an out-of-memory: which device it was, and what leaves it for good."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from . import probe
from .checkpoints.stored import HIGH_NOISE
from .handle import ModelHandle
from .loaded import LoadedModel
from .planning.devices import GIB, DeviceInfo
from .planning.placement import HOST
from .plans import Plan

# What moves to the host at a time when a forward runs out of memory.
SHED_BYTES = GIB
# What a slider should be lowered by after all else has failed, the first that can be planned: about what other programs and fragmentation take.
LOWER_BY_GIB = (1.5, 1.0, 0.5)


def failed_device(loaded: LoadedModel, message: str) -> DeviceInfo:
    """The device that an out-of-memory message names, or else the one with the least room left."""
    plan = loaded.planned()
    named = re.search(r"GPU (\d+)|device (\d+)", message)
    for budget in plan.budgets:
        if named and budget.device.torch_device == f"cuda:{named[1] or named[2]}":
            return budget.device
    return min(plan.budgets, key=lambda b: b.usable_bytes - loaded.resident_bytes(torch.device(b.device.torch_device))).device


def may_shed(loaded: LoadedModel, index: int, part: str) -> bool:
    """Whether weights may leave a device for the host: some are there, and the user has not forbidden it.

    Args:
        loaded: the model.
        index: the device.
        part: the working expert.
    """
    plan = loaded.planned()
    on_device = any(home == index and name.startswith("blocks.") for name, home in plan.placements[HIGH_NOISE].homes.items())
    return (plan.parallel and bool(_waiting_on(loaded, index, part))) or (plan.offload != "none" and on_device)


def shed(loaded: LoadedModel, index: int, part: str) -> str:
    """Make room on a device for good, after a forward ran out of memory there.

    What waits there goes first, where all devices compute at once; else blocks that live there get a home on the host, for both experts.

    Args:
        loaded: the model.
        index: the device that ran out.
        part: the working expert.

    Returns:
        What moved, or moves at the next activation, in words.
    """
    loaded.finish_handover(wait=False)
    plan = loaded.planned()
    waiting = _waiting_on(loaded, index, part) if plan.parallel else []
    if waiting:
        _learn_reserve(loaded, index, sum(loaded.experts[other].part_bytes(name) for other, name in waiting))
        for other, name in waiting:
            loaded.park(other, name)
        probe.release_cached([b.device.torch_device for b in plan.budgets])
        return "the waiting expert"
    first = plan.placements[HIGH_NOISE]
    blocks = [name for name, home in first.homes.items() if home == index and name.startswith("blocks.")]
    count = -(-SHED_BYTES // max(1, first.sizes["blocks.0"]))
    main, room = first.main_device, 0
    if not any(name.startswith("blocks.") for name in first.offloaded) and not first.fetch_bytes.get(main):
        # The first block on the host brings buffers for fetching.
        buffers = 2 if plan.parallel else 1
        room = buffers * max(size for p in plan.placements.values() for name, size in p.sizes.items() if name.startswith("blocks."))
        count += buffers if index == main else 0
    gone = set(blocks[-count:])
    placements = {
        part: replace(
            placement,
            homes={name: HOST if name in gone else home for name, home in placement.homes.items()},
            fetch_bytes=_with_more(placement.fetch_bytes, main, room),
            reserve_bytes=_with_more(placement.reserve_bytes, main, room),
        )
        for part, placement in plan.placements.items()
    }
    _learn_reserve(loaded, index, sum(first.sizes[name] for name in gone))
    loaded.set_plan(replace(plan, placements=placements))
    probe.release_cached([b.device.torch_device for b in plan.budgets])
    return f"{len(gone)} blocks"


def relieving_settings(handle: ModelHandle, plan: Plan, index: int, can_plan: Callable[[ModelHandle], bool]) -> str:
    """Settings by which less of a device would be used, as the beginning of a sentence; nothing where none can be planned.

    Args:
        handle: how the model was to be spread.
        plan: the one that failed.
        index: the device that ran out.
        can_plan: whether a plan is found for a handle.
    """
    limit_gib = plan.budget(index).limit_bytes / GIB
    values = dict.fromkeys(max(0.5, int((limit_gib - by) * 2) / 2) for by in LOWER_BY_GIB)

    def with_slider(value: float, offload: str = handle.offload) -> ModelHandle:
        return replace(handle, offload=offload, max_memory_gib={**handle.max_memory_gib, index: value})

    for offload in dict.fromkeys((handle.offload, "auto")):
        for value in values:
            if value < limit_gib and can_plan(with_slider(value, offload)):
                return f"set {'' if offload == handle.offload else 'offload to auto and '}its slider to {value:g}, "
    if len(plan.budgets) > 1 and can_plan(with_slider(-1)):
        return "leave it out (set its slider to -1), "
    return ""


def _waiting_on(loaded: LoadedModel, index: int, part: str) -> list[tuple[str, str]]:
    """(expert, part) of everything on a device that the working expert does not need."""
    device = torch.device(loaded.planned().budget(index).device.torch_device)
    return [(other, name) for other, expert in loaded.experts.items() if other != part for name in expert.parts_on(device)]


def _with_more(planned: Mapping[int, int], index: int, more: int) -> dict[int, int]:
    return {**planned, index: planned.get(index, 0) + more}


def _learn_reserve(loaded: LoadedModel, index: int, freed_bytes: int) -> None:
    # Not all of what waited there: what a forward lacks is seldom more than what moves at a time.
    loaded.learned_reserve_bytes[index] = loaded.learned_reserve_bytes.get(index, 0) + min(freed_bytes, SHED_BYTES)
