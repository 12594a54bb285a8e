"""What is in memory when: experts that share a GPU, parked and dropped weights, models that replace each other.

On imagined GPUs that count every byte. The weights of the model used here are large beside its activations, so that the count is about
weights.
"""

import gc
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_bench import MIB, SMALL_CHANGE, Bench, sliders
from imagined_machine import TinyExpert, imagined_machine
from wan_sharded.engine import loaded as loaded_module
from wan_sharded.engine import open_model
from wan_sharded.engine.errors import PlacementError
from wan_sharded.engine.owner import ModelOwner
from wan_sharded.engine.planning.budgets import AUTOMATIC_MARGIN, CONTEXT_BYTES, NO_RESERVE, Reserve
from wan_sharded.engine.planning.devices import GIB
from wan_sharded.engine.planning.placement import HOST
from wan_sharded.engine.system_memory import SystemMemory
from wan_sharded.engine.weights import keeping
from wan_sharded.engine.weights.expert import CPU, NOWHERE

EXPERTS = ("transformer", "transformer_2")


def free_gib(slider_gib: float) -> float:
    """What must be free for "automatic" to give as much as a slider."""
    return (slider_gib - CONTEXT_BYTES / GIB) / (1 - AUTOMATIC_MARGIN)


# ---- both experts of one model


def test_the_second_run_reads_and_moves_nothing(bench: Callable[..., Bench], checkpoint: Path) -> None:
    one = bench(2)
    handle = open_model(checkpoint, weight_dtype="fp32")
    first = one.run(handle)
    assert len(one.read) == sum(len(files.tensors) for files in handle.model.experts.values())
    one.forget()
    again = one.run(handle)
    assert one.read == [] and one.loaded == []
    assert torch.equal(first.frames, again.frames)
    # A loader node that ran again gives another handle of the same model.
    one.run(open_model(checkpoint, weight_dtype="fp32", node_id="7"))
    assert one.read == []


def test_no_device_is_waited_for_between_parts(bench: Callable[..., Bench], checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving buffers back waits for all that is queued, which would be the parts before."""
    one = bench(2)
    waits: list[int] = []
    bring_home, clear = loaded_module.LoadedModel._bring_home, loaded_module.LoadedModel.clear_fetch_rooms

    def counted(loaded, *arguments) -> None:
        waits.append(0)
        bring_home(loaded, *arguments)

    def cleared(loaded) -> None:
        if waits:
            waits[-1] += 1
        clear(loaded)

    monkeypatch.setattr(loaded_module.LoadedModel, "_bring_home", counted)
    monkeypatch.setattr(loaded_module.LoadedModel, "clear_fetch_rooms", cleared)
    one.run(open_model(checkpoint, weight_dtype="fp32", execution="parallel"))
    assert one.owner.loaded is not None
    # Before the first part, once for each GPU; and by activate() itself, and by what the run needs besides.
    assert len(waits) == 2 and max(waits) <= 4 < len(one.owner.loaded.experts["transformer"].parts)


def test_both_experts_stay_where_both_fit(bench: Callable[..., Bench], checkpoint: Path, expert: TinyExpert, make_request) -> None:
    one = bench()
    one.run(open_model(checkpoint, weight_dtype="fp32", max_memory_gib=sliders(expert, make_request, 2.1)))
    assert all(one.locations(part) == {torch.device("lazy:0")} for part in EXPERTS)
    assert one.gpus.live_bytes(0) >= 2 * expert.total_bytes


def test_experts_take_turns_where_one_fits(bench: Callable[..., Bench], checkpoint: Path, expert: TinyExpert, make_request) -> None:
    one = bench()
    handle = open_model(checkpoint, weight_dtype="fp32", max_memory_gib=sliders(expert, make_request, 1.1))
    roomy = bench().run(open_model(checkpoint, weight_dtype="fp32"))
    one = bench()
    one.gpus.reset_peaks()
    before = one.gpus.live_bytes(0)
    for _ in range(2):
        result = one.run(handle)
        assert one.homes() == {0}, result.placement
        assert torch.equal(result.frames, roomy.frames)
        assert one.gpus.peak[0] - before <= 1.1 * expert.total_bytes + 2 * expert.block_bytes + SMALL_CHANGE


def test_what_the_file_holds_as_it_is_kept_is_dropped(
    bench: Callable[..., Bench], checkpoint: Path, expert: TinyExpert, make_request
) -> None:
    """The mapped file is the host's copy: parking would take memory twice."""
    one = bench()
    handle = open_model(checkpoint, weight_dtype="fp32", max_memory_gib=sliders(expert, make_request, 1.1))
    one.run(handle)
    assert NOWHERE in one.locations("transformer") and CPU not in one.locations("transformer")
    one.forget()
    one.run(handle)
    assert one.read, "so it is read again"


def test_what_was_converted_is_parked(bench: Callable[..., Bench], checkpoint: Path, make_request) -> None:
    """Converting again at every switch would take longer than copying."""
    expert = TinyExpert(checkpoint, "bf16")
    one = bench()
    handle = open_model(checkpoint, weight_dtype="bf16", max_memory_gib=sliders(expert, make_request, 1.1))
    first = one.run(handle)
    assert CPU in one.locations("transformer") and NOWHERE not in one.locations("transformer")
    one.forget()
    again = one.run(handle)
    assert not [name for name in one.read if name.startswith("blocks.")]
    assert torch.equal(first.frames, again.frames)


def test_nothing_is_parked_where_the_host_is_full(
    bench: Callable[..., Bench], checkpoint: Path, make_request, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SystemMemory(64 * GIB, NO_RESERVE.host_bytes + MIB)
    monkeypatch.setattr(loaded_module, "system_memory", lambda: full)
    expert = TinyExpert(checkpoint, "bf16")
    one = bench()
    handle = open_model(checkpoint, weight_dtype="bf16", max_memory_gib=sliders(expert, make_request, 1.1))
    first = one.run(handle)
    assert CPU not in one.locations("transformer")
    assert torch.equal(first.frames, one.run(handle).frames)


def test_weights_that_wait_in_system_memory_leave_it_for_frames(
    bench: Callable[..., Bench], checkpoint: Path, make_request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as must, before decoding; nothing leaves where there is room, and the next run reads them again."""
    calls: list[int] = []
    real = loaded_module.LoadedModel.make_room_for_frames

    def counted(loaded: loaded_module.LoadedModel) -> None:
        calls.append(loaded.host_memory_bytes())
        real(loaded)

    monkeypatch.setattr(loaded_module.LoadedModel, "make_room_for_frames", counted)
    one = bench()
    handle = open_model(checkpoint, weight_dtype="bf16", max_memory_gib=sliders(TinyExpert(checkpoint, "bf16"), make_request, 1.1))
    first = one.run(handle)
    loaded = one.owner.loaded
    assert loaded is not None and len(calls) == 1
    waiting = loaded.host_memory_bytes()
    assert waiting and calls == [waiting], "with room nothing leaves"
    plan, block = loaded.planned(), loaded.experts["transformer"].part_bytes("blocks.0")
    missing = waiting // 2

    def memory() -> SystemMemory:
        left = waiting - loaded.host_memory_bytes()
        return SystemMemory(64 * GIB, plan.frames_bytes + plan.reserve.host_bytes // 2 - missing + left)

    monkeypatch.setattr(loaded_module, "system_memory", memory)
    loaded.make_room_for_frames()
    assert 0 <= waiting - loaded.host_memory_bytes() - missing < block
    monkeypatch.undo()
    assert torch.equal(one.run(handle).frames, first.frames)


@pytest.mark.parametrize(
    ("rooms", "offload", "device_map", "weight_dtype"),
    [
        ((2.2,), "auto", "balanced", "fp32"),
        ((1.1,), "auto", "balanced", "fp32"),
        ((0.5,), "auto", "balanced", "fp32"),
        ((0.2,), "auto", "balanced", "fp32"),
        ((1.1, 1.1), "auto", "balanced", "fp32"),
        ((0.7, 0.5), "none", "auto", "bf16"),
        ((0.4, 0.3), "auto", "balanced", "bf16"),
        ((0.1, 0.6), "auto", "auto", "fp32"),
        ((0.4, 0.3), "auto", "balanced", "int8"),
        ((2.0, 2.0), "cpu", "balanced", "fp32"),
    ],
    ids=str,
)
def test_no_gpu_ever_holds_more_than_planned(
    bench: Callable[..., Bench],
    checkpoint: Path,
    make_request,
    monkeypatch: pytest.MonkeyPatch,
    weight_dtype: str,
    rooms: tuple[float, ...],
    offload: str,
    device_map: str,
) -> None:
    """The promise of the sliders, at every moment of two runs: loading, switching experts and computing included."""
    monkeypatch.setattr(keeping, "WAITING_BYTES", 1024)  # as small as the model is; it stands where activations will
    expert = TinyExpert(checkpoint, weight_dtype)
    one = bench(len(rooms))
    handle = open_model(
        checkpoint, weight_dtype=weight_dtype, offload=offload, device_map=device_map, max_memory_gib=sliders(expert, make_request, *rooms)
    )
    one.run(handle)
    one.run(handle)
    plan = one.owner.loaded.plan
    for index, room in enumerate(rooms):
        # What a plan keeps for activations is mostly a constant; in its place, the small change that they are here.
        reserves = {placement.reserve_bytes[index] for placement in plan.placements.values()}
        planned_activations = expert.slider_gib(make_request().shape, 0) * GIB - CONTEXT_BYTES
        fetched = max(reserves) - planned_activations
        weights = room * expert.total_bytes + expert.block_bytes - fetched
        assert one.gpus.peak.get(index, 0) <= weights + fetched + SMALL_CHANGE


# ---- models that come and go


def test_release_lets_everything_go(bench: Callable[..., Bench], checkpoint: Path) -> None:
    one = bench(2)
    one.run(open_model(checkpoint, weight_dtype="fp32"))
    assert one.gpus.live_bytes(0) > 10 * MIB
    one.owner.release()
    gc.collect()
    assert one.gpus.live_bytes(0) == one.gpus.live_bytes(1) == 0
    assert one.owner.loaded is None and one.owner.held_bytes() == {}
    one.owner.release()  # twice is once
    one.run(open_model(checkpoint, weight_dtype="fp32"))


def test_what_is_held_is_told(bench: Callable[..., Bench], checkpoint: Path, expert: TinyExpert) -> None:
    """ComfyUI asks this to know how much unloading us would free."""
    one = bench(2)
    one.run(open_model(checkpoint, weight_dtype="fp32"))
    held = one.owner.held_bytes()
    assert set(held) == {"lazy:0", "lazy:1"}
    # Rotary tables count with the weights.
    assert 2 * expert.total_bytes <= sum(held.values()) <= 2 * expert.total_bytes + MIB
    for index in range(2):
        assert held[f"lazy:{index}"] <= one.gpus.live_bytes(index) <= held[f"lazy:{index}"] + SMALL_CHANGE


def test_another_model_replaces_the_first(
    bench: Callable[..., Bench], make_checkpoint: Callable[..., Path], checkpoint: Path, expert: TinyExpert
) -> None:
    """Handles are kept alive by ComfyUI's caches; the weights of two models must not be."""
    handles = [open_model(path, weight_dtype="fp32") for path in (checkpoint, make_checkpoint(num_blocks=8, num_heads=16, seed=1))]
    one = bench()
    frames = []
    for handle in (*handles, *handles):
        frames.append(one.run(handle).frames)
        assert one.gpus.live_bytes(0) <= 2 * expert.total_bytes + SMALL_CHANGE
    assert one.gpus.peak[0] <= 2 * expert.total_bytes + SMALL_CHANGE, "not even for a moment"
    assert torch.equal(frames[0], frames[2]) and torch.equal(frames[1], frames[3])
    assert not torch.equal(frames[0], frames[1])


def test_the_same_model_in_another_precision_replaces_it(bench: Callable[..., Bench], checkpoint: Path, expert: TinyExpert) -> None:
    one = bench()
    for weight_dtype in ("fp32", "bf16", "int8"):
        one.run(open_model(checkpoint, weight_dtype=weight_dtype))
        assert one.gpus.live_bytes(0) <= 2 * expert.total_bytes + SMALL_CHANGE
    assert one.gpus.live_bytes(0) <= 1.0 * expert.total_bytes


def test_what_the_old_model_holds_counts_as_free_for_the_new(
    bench: Callable[..., Bench], make_checkpoint: Callable[..., Path], checkpoint: Path, expert: TinyExpert, make_request
) -> None:
    one = bench()
    (slider,) = sliders(expert, make_request, 2.1).values()
    one.free_gib[0] = free_gib(slider)  # as large a GPU as both experts of one model need, and no slider
    one.run(open_model(checkpoint, weight_dtype="fp32"))
    assert one.homes() == {0}
    one.run(open_model(make_checkpoint(num_blocks=8, num_heads=16, seed=1), weight_dtype="fp32"))
    assert one.homes() == {0}


def test_files_that_changed_are_another_model(bench: Callable[..., Bench], checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    one = bench()
    one.run(open_model(copy, weight_dtype="fp32"))
    file = next((copy / "transformer_2").glob("*.safetensors"))
    os.utime(file, (1, 1))
    one.forget()
    one.run(open_model(copy, weight_dtype="fp32"))
    assert one.read


# ---- plans that change


def test_moving_a_slider_moves_weights(bench: Callable[..., Bench], checkpoint: Path, expert: TinyExpert, make_request) -> None:
    one = bench(2)
    frames = []
    for rooms, homes in (((2.1, 2.1), {0, 1}), ((0.3, 0.3), {0, 1, HOST}), ((2.1, 2.1), {0, 1})):
        handle = open_model(checkpoint, weight_dtype="fp32", max_memory_gib=sliders(expert, make_request, *rooms))
        frames.append(one.run(handle).frames)
        assert one.homes() == homes
    assert torch.equal(frames[0], frames[1]) and torch.equal(frames[0], frames[2])


def test_a_gpu_that_is_left_out_is_left(bench: Callable[..., Bench], checkpoint: Path) -> None:
    one = bench(2)
    one.run(open_model(checkpoint, weight_dtype="fp32"))
    assert one.gpus.live_bytes(1) > MIB
    one.run(open_model(checkpoint, weight_dtype="fp32", max_memory_gib={1: -1}))
    assert one.homes() == {0}
    assert one.gpus.live_bytes(1) == 0


def test_a_plan_that_still_holds_is_kept(bench: Callable[..., Bench], checkpoint: Path, expert: TinyExpert) -> None:
    """Free memory is never the same twice; weights must not wander for that."""
    one = bench(2)
    handle = open_model(checkpoint, weight_dtype="fp32")
    one.free_gib = {0: 3.0, 1: 3.0}
    one.run(handle)
    one.forget()
    for free in (2.9, 3.1, 2.5):
        one.free_gib = {0: free, 1: 3.0}
        one.run(handle)
    assert one.loaded == [] and one.read == []


def test_a_plan_that_no_longer_holds_is_not_kept(bench: Callable[..., Bench], checkpoint: Path, expert: TinyExpert, make_request) -> None:
    one = bench(2)
    handle = open_model(checkpoint, weight_dtype="fp32", device_map="auto")
    first = one.run(handle)
    assert one.homes() == {0}
    (small,) = sliders(expert, make_request, 0.7).values()
    one.free_gib = {0: free_gib(small), 1: free_gib(small)}
    again = one.run(handle)
    assert one.homes() == {0, 1}, again.placement
    assert torch.equal(first.frames, again.frames)


def test_a_plan_that_does_not_fit_leaves_what_is_loaded(bench: Callable[..., Bench], checkpoint: Path) -> None:
    one = bench()
    handle = open_model(checkpoint, weight_dtype="fp32")
    first = one.run(handle)
    one.forget()
    with pytest.raises(PlacementError):
        one.run(open_model(checkpoint, weight_dtype="fp32", max_memory_gib={0: 0.5}))
    assert torch.equal(one.run(handle).frames, first.frames)
    assert one.read == []


def test_making_room_parks_only_what_it_must(bench: Callable[..., Bench], checkpoint: Path, expert: TinyExpert) -> None:
    """As ComfyUI asks when another node needs memory."""
    one = bench()
    one.run(open_model(checkpoint, weight_dtype="fp32"))
    model = one.owner.loaded
    before = one.gpus.live_bytes(0)
    model.make_room(0, 0, before - 2 * expert.block_bytes)
    gc.collect()
    freed = before - one.gpus.live_bytes(0)
    assert 2 * expert.block_bytes <= freed <= 5 * expert.block_bytes
    model.make_room(0, 10**15, 0)
    gc.collect()
    assert one.gpus.live_bytes(0) <= MIB
    one.run(open_model(checkpoint, weight_dtype="fp32"))


# ---- messages of plans


def test_the_length_that_fits_is_named(bench: Callable[..., Bench], checkpoint: Path, expert: TinyExpert) -> None:
    one = bench()
    handle = open_model(checkpoint, weight_dtype="fp32", max_memory_gib={0: 1.5})
    size = {"width": 832, "height": 480}
    with pytest.raises(PlacementError) as caught:
        one.owner.obtain(handle, one.machine(), one.make_request(**size, num_frames=401).shape)
    named = re.search(r"At 832x480, length (\d+) fits\.", str(caught.value))
    assert named, caught.value
    length = int(named[1])
    assert length % 4 == 1 and 1 < length < 401
    one.owner.obtain(handle, one.machine(), one.make_request(**size, num_frames=length).shape)
    with pytest.raises(PlacementError):
        one.owner.obtain(handle, one.machine(), one.make_request(**size, num_frames=length + 4).shape)


def test_frames_that_overflow_system_memory_are_refused(checkpoint: Path, make_request) -> None:
    """The operating system would end ComfyUI; an error on the node is better."""
    owner = ModelOwner()
    absurd = make_request(width=8192, height=8192, num_frames=4093).shape
    with pytest.raises(PlacementError) as caught:
        owner.obtain(open_model(checkpoint, weight_dtype="fp32"), imagined_machine(2), absurd)
    message = str(caught.value)
    assert "8192x8192x4093 needs" in message and "64.0 GiB are free" in message and "smaller or shorter" in message


def test_system_memory_that_is_not_ours_is_left(checkpoint: Path, make_request) -> None:
    """In the plan, and by it wherever parts are parked."""
    machine, handle, shape = imagined_machine(1), open_model(checkpoint), make_request().shape
    usual, careful = (ModelOwner().dry_plan(handle, machine, shape, reserve=left) for left in (NO_RESERVE, Reserve(host_bytes=7 * GIB)))
    assert usual.host_bytes - careful.host_bytes == 7 * GIB - NO_RESERVE.host_bytes
    assert careful.reserve.host_bytes == 7 * GIB


def test_a_dry_plan_changes_nothing(bench: Callable[..., Bench], checkpoint: Path) -> None:
    one = bench(2)
    handle = open_model(checkpoint, weight_dtype="fp32")
    one.run(handle)
    one.forget()
    before = one.gpus.live_bytes(0)
    plan = one.owner.dry_plan(open_model(checkpoint, weight_dtype="bf16", offload="cpu"), one.machine(), one.make_request().shape)
    assert set(plan.placements["transformer"].homes.values()) == {0, HOST}
    assert one.gpus.live_bytes(0) == before
    one.run(handle)
    assert one.read == []


def test_thirty_prompts_of_changing_sizes_hold_no_more(
    bench: Callable[..., Bench], checkpoint: Path, expert: TinyExpert, make_request
) -> None:
    """Neither on the GPUs nor, counted in tensors, in system memory."""
    one = bench(2)
    handle = open_model(checkpoint, execution="parallel", max_memory_gib=sliders(expert, make_request, 0.8, 0.8))
    sizes = ({"width": 64, "height": 48}, {"width": 32, "height": 64}, {"width": 48, "height": 48, "num_frames": 9})
    held = []
    for number in range(30):
        one.run(handle, seed=number, **sizes[number % 3])
        if number % 3 == 2:
            tensors = sum(isinstance(found, torch.Tensor) for found in gc.get_objects())
            held.append((tensors, *(one.gpus.live_bytes(index) for index in range(2))))
    assert len(set(held[2:])) == 1, held
