"""Running out of memory all the same, on a GPU or in the system: what leaves, what is repeated, and what is said where nothing helps.

On imagined GPUs that count every byte.
"""

import gc
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_bench import MIB, Bench, sliders
from imagined_machine import TinyExpert
from wan_sharded.engine import ModelHandle, open_model
from wan_sharded.engine.checkpoints.stored import HIGH_NOISE, LOW_NOISE
from wan_sharded.engine.errors import PlacementError
from wan_sharded.engine.host_pool import HostPool
from wan_sharded.engine.planning.devices import GIB
from wan_sharded.engine.planning.placement import HOST
from wan_sharded.engine.shedding import relieving_settings, shed


@pytest.mark.parametrize("execution", ["sequential", "parallel"])
@pytest.mark.parametrize("raises", [torch.OutOfMemoryError, lambda _: RuntimeError("CUDA error: out of memory")], ids=["torch's", "CUDA's"])
def test_a_forward_that_runs_out_of_memory_is_repeated_with_more_on_the_host(
    bench: Callable[..., Bench], checkpoint: Path, expert: TinyExpert, make_request, execution: str, raises: Callable[[str], Exception]
) -> None:
    roomy = bench()
    handle = open_model(checkpoint, weight_dtype="fp32", execution=execution, max_memory_gib=sliders(expert, make_request, 2.1))
    expected = roomy.run(handle).frames
    weights = roomy.gpus.live_bytes(0)
    roomy.owner.release()
    gc.collect()
    # Loading both experts fits; the activations on top do not.
    one = bench(capacity={0: weights + 256 * 1024})
    one.gpus.raises = raises
    result = one.run(handle)
    assert any("ran out of memory" in note and "the step was repeated" in note for note in result.notes)
    assert torch.equal(result.frames, expected)
    if execution == "sequential":  # all at once, what waits leaves before what works
        assert HOST in one.homes()
    again = one.run(handle)
    assert torch.equal(again.frames, expected)
    assert not any("ran out of memory" in note for note in again.notes), "learned"


@pytest.mark.parametrize(("execution", "buffers"), [("parallel", 2), ("sequential", 1)])
def test_what_is_fetched_from_then_on_has_its_room(bench: Callable[..., Bench], checkpoint: Path, execution: str, buffers: int) -> None:
    """Where nothing waited on the host before, nothing was planned for fetching it."""
    one = bench()
    handle = open_model(checkpoint, weight_dtype="fp32", execution=execution)
    one.run(handle)
    loaded = one.owner.loaded
    assert loaded is not None
    before = loaded.planned().placements[HIGH_NOISE]
    largest = max(size for name, size in before.sizes.items() if name.startswith("blocks."))
    if execution == "parallel":
        shed(loaded, 0, LOW_NOISE)  # what waits goes first
    shed(loaded, 0, LOW_NOISE)
    for placement in loaded.planned().placements.values():
        assert HOST in placement.homes.values()
        assert placement.fetch_bytes[0] == buffers * largest
        assert placement.reserve_bytes[0] == before.reserve_bytes[0] + buffers * largest
    shed(loaded, 0, LOW_NOISE)
    assert loaded.planned().placements[HIGH_NOISE].fetch_bytes[0] == buffers * largest


def test_what_cannot_be_helped_is_raised_and_everything_let_go(
    bench: Callable[..., Bench], checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """So that ComfyUI can unload models and report it; and the next run works. The plan that failed is in the log."""
    caplog.set_level(logging.INFO)
    one = bench(capacity={0: 8 * MIB})
    handle = open_model(checkpoint, weight_dtype="fp32", offload="none")
    with pytest.raises(torch.OutOfMemoryError, match=r"GPU 0 .* was used up to 61.2 GiB: set its slider to 59.5, make the video smaller"):
        one.run(handle)
    assert any(re.match(r"Planned: GPU 0 .* for the expert at work", message) for message in caplog.messages)
    gc.collect()
    assert one.owner.loaded is None
    assert one.gpus.live_bytes(0) == 0
    one.gpus.capacity.clear()
    assert torch.isfinite(one.run(handle).frames).all()


@pytest.mark.parametrize(
    ("count", "slider", "advice"),
    [(1, 2.5, "set its slider to 1.5, make"), (1, 1.5, "make"), (2, 1.5, "set its slider to 0.5, make")],
)
def test_what_is_advised_can_be_planned(bench: Callable[..., Bench], checkpoint: Path, count: int, slider: float, advice: str) -> None:
    one = bench(count, capacity=dict.fromkeys(range(count), MIB))
    handle = open_model(checkpoint, weight_dtype="fp32", offload="none", max_memory_gib=dict.fromkeys(range(count), slider))
    with pytest.raises(torch.OutOfMemoryError, match=re.escape(f"used up to {slider:.1f} GiB: {advice} the video smaller")):
        one.run(handle)
    one.gpus.capacity.clear()
    if "slider" in advice:
        lowered = 0.5 if count > 1 else 1.5
        other = open_model(checkpoint, weight_dtype="fp32", offload="none", max_memory_gib={**handle.max_memory_gib, 0: lowered})
        assert torch.isfinite(one.run(other).frames).all()


@pytest.mark.parametrize(
    ("can_plan", "words"),
    [
        (lambda tried: True, "set its slider to 10.5, "),
        (lambda tried: tried.max_memory_gib[0] >= 11, "set its slider to 11, "),
        (lambda tried: tried.offload == "auto" and tried.max_memory_gib[0] >= 11.5, "set offload to auto and its slider to 11.5, "),
        (lambda tried: tried.max_memory_gib[0] < 0, "leave it out (set its slider to -1), "),
        (lambda tried: False, ""),
    ],
)
def test_the_mildest_setting_that_relieves_most_is_advised(checkpoint: Path, can_plan: Callable[[ModelHandle], bool], words: str) -> None:
    handle = open_model(checkpoint, offload="none", max_memory_gib={0: 12.0, 1: 8.0})
    limits = [SimpleNamespace(limit_bytes=int(gib * GIB)) for gib in (12, 8)]
    plan: Any = SimpleNamespace(budgets=limits, budget=limits.__getitem__)
    assert relieving_settings(handle, plan, 0, can_plan) == words


def test_a_system_without_memory_says_so_and_everything_is_let_go(
    bench: Callable[..., Bench], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = bench()
    handle = open_model(checkpoint, weight_dtype="fp32", offload="cpu")
    with monkeypatch.context() as patch:

        def full(*_: object, **__: object) -> None:
            raise MemoryError("Unable to allocate 675. MiB")

        patch.setattr(HostPool, "take", full)
        with pytest.raises(PlacementError, match=r"The system has no memory left for this.*smaller weight_dtype.*675"):
            one.run(handle)
    assert one.owner.loaded is None
    assert torch.isfinite(one.run(handle).frames).all()
