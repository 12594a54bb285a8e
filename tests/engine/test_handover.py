"""At the expert switch: one expert's blocks taking the place of the other's behind a forward, on imagined GPUs that count every byte.

On real ones: tests/gpu/test_gpus.py.
"""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_bench import SMALL_CHANGE, Bench, sliders
from imagined_machine import TinyExpert
from wan_sharded.engine import ModelHandle, open_model
from wan_sharded.engine import loaded as loaded_module
from wan_sharded.engine.errors import CheckpointError
from wan_sharded.engine.handover import Handover
from wan_sharded.engine.parallel.blocks import BlockLoop
from wan_sharded.engine.planning.placement import HOST


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The blocks that each switch moved behind the last forward before it."""
    found: list[list[int]] = []
    finish = Handover.finish

    def watched(handover: Handover, **options: bool) -> None:
        finish(handover, **options)
        found.append(list(handover.moved))

    monkeypatch.setattr(Handover, "finish", watched)
    return found


Run = tuple[Bench, ModelHandle, torch.Tensor]


@pytest.fixture
def done_once(bench: Callable[..., Bench], checkpoint: Path, make_request) -> Run:
    """A bench of one GPU, a handle whose experts hand over to each other there, and the frames that it made."""
    one = bench()
    rooms = sliders(TinyExpert(checkpoint, "fp32"), make_request, 1.3)
    handle = open_model(checkpoint, weight_dtype="fp32", execution="parallel", max_memory_gib=rooms)
    return one, handle, one.run(handle).frames


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("weight_dtype", ["fp32", "bf16", "int8"])
def test_blocks_take_each_others_place_behind_the_last_forward(
    bench: Callable[..., Bench],
    checkpoint: Path,
    make_request,
    handed_over: list[list[int]],
    weight_dtype: str,
    count: int,
    guidance_scale: float,
) -> None:
    """What the file holds as it is kept from the first run on; what was converted once both experts have been."""
    expert = TinyExpert(checkpoint, weight_dtype)
    one = bench(count)
    rooms = sliders(expert, make_request, *[1.3 / count] * count)
    handle = open_model(checkpoint, weight_dtype=weight_dtype, execution="parallel", max_memory_gib=rooms)
    runs = []
    for run in range(2):
        one.forget()
        runs.append(one.run(handle, guidance_scale=guidance_scale))
        if run or weight_dtype == "fp32":
            placements = one.owner.loaded.plan.placements
            swapped = [number for number in range(8) if placements["transformer"].homes[f"blocks.{number}"] != HOST]
            assert handed_over[-1] and set(handed_over[-1]) <= set(swapped)
        else:
            assert handed_over == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaded_module.LoadedModel, "hand_over_behind", lambda *args: None)
        other = bench(count)
        for run in range(2):
            other.forget()
            plain = other.run(handle, guidance_scale=guidance_scale)
            assert torch.equal(plain.frames, runs[run].frames)
            for index in range(count):
                assert one.gpus.peak[index] <= other.gpus.peak[index] + SMALL_CHANGE


def test_a_handover_in_a_forward_that_runs_out_of_memory(
    done_once: Run, handed_over: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks that left come back, and the forward is repeated, without another try."""
    one, handle, expected = done_once
    block_done, failed = Handover.block_done, []

    def out_of_memory(handover: Handover, number: int, marks: list) -> None:
        block_done(handover, number, marks)
        if number == 4 and not failed:
            failed.append(number)
            raise torch.OutOfMemoryError("GPU 0 ran out, it is imagined")

    monkeypatch.setattr(Handover, "block_done", out_of_memory)
    handed_over.clear()
    result = one.run(handle)
    assert failed and handed_over == [[0, 1, 2, 3, 4]]
    assert any("the step was repeated" in note for note in result.notes)
    assert torch.equal(result.frames, expected)


def test_a_forward_that_never_fits_ends(done_once: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has handed over leaves once; then its own blocks do, and then it is said."""
    one, handle, expected = done_once
    block_done, handed_over = Handover.block_done, []
    run_block, failed = BlockLoop._run_block, []

    def watched(handover: Handover, number: int, marks: list) -> None:
        block_done(handover, number, marks)
        handed_over.append(number)

    def out_of_memory(loop: BlockLoop, states: list, block: int, *, timed: bool) -> None:
        if block == 6 and handed_over:
            failed.append(block)
            assert len(failed) < 20, "for ever"
            raise torch.OutOfMemoryError("GPU 0 ran out, it is imagined")
        run_block(loop, states, block, timed=timed)

    with monkeypatch.context() as patch:
        patch.setattr(Handover, "block_done", watched)
        patch.setattr(BlockLoop, "_run_block", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError, match="moving weights to system memory was not enough"):
            one.run(handle)
    assert failed and handed_over == [0, 1, 2, 3, 4, 5]
    gc.collect()
    assert one.owner.loaded is None and one.gpus.live_bytes(0) == 0
    assert torch.equal(one.run(handle).frames, expected)


def test_a_run_that_is_cancelled_in_a_handover(done_once: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    one, handle, expected = done_once
    with monkeypatch.context() as patch:

        def cancel(handover: Handover, number: int, marks: list) -> None:
            raise KeyboardInterrupt

        patch.setattr(Handover, "block_done", cancel)
        with pytest.raises(KeyboardInterrupt):
            one.run(handle)
    assert torch.equal(one.run(handle).frames, expected)


def test_a_file_that_is_gone_stops_the_run_at_the_switch(
    bench: Callable[..., Bench], checkpoint: Path, make_request, tmp_path: Path, handed_over: list[list[int]]
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    expert = TinyExpert(checkpoint, "fp32")
    one = bench()
    handle = open_model(folder, weight_dtype="fp32", execution="parallel", max_memory_gib=sliders(expert, make_request, 1.3))
    (weights,) = (folder / "transformer_2").glob("*.safetensors")
    kept = weights.rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match="could not be read"):
        one.run(handle)
    assert handed_over[-1] == []
    kept.rename(weights)
    whole = bench().run(open_model(checkpoint, weight_dtype="fp32"))
    assert torch.equal(one.run(handle).frames, whole.frames)
