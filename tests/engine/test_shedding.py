"""Running out of memory all the same, on a GPU or in the system: what leaves, what is repeated, and what is said where nothing helps.

On imagined GPUs that count every byte.
"""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_bench import MIB, Bench, sliders
from imagined_machine import TinyExpert
from wan_sharded.engine import open_model
from wan_sharded.engine.errors import PlacementError
from wan_sharded.engine.planning.placement import HOST
from wan_sharded.engine.weights.host_memory import HostPool


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


def test_what_cannot_be_helped_is_raised_and_everything_let_go(bench: Callable[..., Bench], checkpoint: Path) -> None:
    """So that ComfyUI can unload models and report it; and the next run works."""
    one = bench(capacity={0: 8 * MIB})
    handle = open_model(checkpoint, weight_dtype="fp32", offload="none")
    with pytest.raises(torch.OutOfMemoryError, match=r"GPU 0 .* set its slider to [\d.]+"):
        one.run(handle)
    gc.collect()
    assert one.owner.loaded is None
    assert one.gpus.live_bytes(0) == 0
    one.gpus.capacity.clear()
    assert torch.isfinite(one.run(handle).frames).all()


def test_a_system_without_memory_says_so_and_everything_is_let_go(
    bench: Callable[..., Bench], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = bench()
    handle = open_model(checkpoint, weight_dtype="fp32", offload="cpu")
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise MemoryError("Unable to allocate 675. MiB")

        patch.setattr(HostPool, "take", full)
        with pytest.raises(PlacementError, match=r"The system has no memory left for this.*smaller weight_dtype.*675"):
            one.run(handle)
    assert one.owner.loaded is None
    assert torch.isfinite(one.run(handle).frames).all()
