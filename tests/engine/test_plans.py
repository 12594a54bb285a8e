"""Which way a plan chooses: which GPUs take part, all at once or one after the other, and the reason it gives."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from imagined_machine import TinyExpert, gpu, machine
from wan_sharded.engine import open_model
from wan_sharded.engine.calibration import model_shape
from wan_sharded.engine.computing import Computing
from wan_sharded.engine.errors import PlacementError
from wan_sharded.engine.handle import ModelHandle
from wan_sharded.engine.owner import ModelOwner
from wan_sharded.engine.planning.devices import GIB, DeviceInfo, Links
from wan_sharded.engine.planning.footprint import VideoShape
from wan_sharded.engine.planning.forecast import NO_LINKS
from wan_sharded.engine.planning.placement import HOST
from wan_sharded.engine.plans import Plan

P480 = VideoShape(832, 480, 81)
TINY = VideoShape(64, 48, 5)


def timed(index: int, *, tflops: float | None = 1.0, link_gb_s: float = 25.0, total_gib: float = 64) -> DeviceInfo:
    return replace(gpu(index, total_gib), speed_tflops=tflops, link_bytes_per_s=link_gb_s * 1e9)


def plan_of(checkpoint: Path, *devices: DeviceInfo, shape: VideoShape = P480, links: Links = NO_LINKS, **options: object) -> Plan:
    where = replace(machine(*devices), links=links)
    return ModelOwner().dry_plan(open_model(checkpoint, weight_dtype="fp32", **options), where, shape)


def taking_part(plan: Plan) -> list[int]:
    return [budget.device.index for budget in plan.budgets]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_all_gpus_take_part_where_nothing_speaks_against_it(tiny_checkpoint: Path, count: int) -> None:
    plan = plan_of(tiny_checkpoint, *(timed(index, tflops=1 + index) for index in range(count)))
    assert plan.parallel and taking_part(plan) == list(range(count))
    assert not [note for note in plan.notes if "left out" in note or "at a time" in note]
    speeds = [1 + index for index in range(count)]
    assert plan.shares == pytest.approx({index: speed / sum(speeds) for index, speed in enumerate(speeds)})
    alone = plan_of(tiny_checkpoint, timed(0))
    assert plan.expected is not None and alone.expected is not None
    assert plan.expected.seconds == pytest.approx(alone.expected.seconds / sum(speeds))


def test_shares_follow_measured_blocks(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a product in a moment says of a GPU that another program used then need not stay so."""
    gpus = [timed(0), timed(1), timed(2)]
    monkeypatch.setattr(Computing, "block_speeds", {0: 0.75, 1: 0.25, 2: 0.5})
    assert plan_of(tiny_checkpoint, *gpus).shares == pytest.approx({0: 0.5, 1: 1 / 6, 2: 1 / 3})
    assert plan_of(tiny_checkpoint, *gpus[:2]).shares == pytest.approx({0: 0.75, 1: 0.25})
    assert plan_of(tiny_checkpoint, *gpus[:2], execution="sequential").shares == {0: 1.0, 1: 1.0}
    monkeypatch.setattr(Computing, "block_speeds", {0: 0.75})
    assert plan_of(tiny_checkpoint, *gpus[:2]).shares == {0: 0.5, 1: 0.5}, "of one of them nothing is known"


def test_blocks_speeds_are_known_once_all_were_timed() -> None:
    computing = object.__new__(Computing)
    computing.crew = None
    assert computing.block_speeds == {}
    workers = [SimpleNamespace(index=index, is_timed=index > 0) for index in range(2)]
    crew: Any = SimpleNamespace(workers=workers, shares=[SimpleNamespace(worker=worker, speed=3.0 - worker.index) for worker in workers])
    computing.crew = crew
    assert computing.block_speeds == {}
    workers[0].is_timed = True
    assert computing.block_speeds == {0: 3.0, 1: 2.0}


def test_all_gpus_take_part_where_speeds_are_unknown(tiny_checkpoint: Path) -> None:
    plan = plan_of(tiny_checkpoint, timed(0, link_gb_s=0.001), timed(1, tflops=None))
    assert plan.parallel and taking_part(plan) == [0, 1]
    assert plan.shares == {0: 0.5, 1: 0.5} and plan.expected is None


def test_a_gpu_behind_an_awfully_slow_link_is_left_out(tiny_checkpoint: Path) -> None:
    plan = plan_of(tiny_checkpoint, timed(0), timed(1, tflops=0.8, link_gb_s=0.01))
    assert plan.parallel and taking_part(plan) == [0]
    (note,) = [note for note in plan.notes if "left out" in note]
    found = re.fullmatch(
        r"GPU 1 · Imagined 64 GB is left out: a forward is expected to take ([\d.]+) s so, and ([\d.]+) s with all GPUs at once, "
        r"held up by the link of GPU 1 · Imagined 64 GB, 0.0 GB/s\.",
        note,
    )
    assert found, note
    assert 0 < float(found[1]) < float(found[2])
    assert plan.expected is not None and f"{plan.expected.seconds:.1f}" == found[1]
    everybody = plan_of(tiny_checkpoint, timed(0), timed(1, tflops=0.8, link_gb_s=0.01), execution="parallel")
    assert everybody.expected is not None and f"{everybody.expected.seconds:.1f}" == found[2]
    assert taking_part(everybody) == [0, 1], "what is asked for is done"


def test_only_what_slows_the_others_down_is_left_out(tiny_checkpoint: Path) -> None:
    plan = plan_of(tiny_checkpoint, timed(0), timed(1, tflops=0.5, link_gb_s=0.01), timed(2))
    assert plan.parallel and taking_part(plan) == [0, 2]
    assert plan.shares == {0: 0.5, 2: 0.5}


def test_a_fast_gpu_behind_an_awfully_slow_link_is_left_out_alone(tiny_checkpoint: Path) -> None:
    plan = plan_of(tiny_checkpoint, timed(0), timed(1, tflops=1.5, link_gb_s=0.01), timed(2, tflops=0.5))
    assert plan.parallel and taking_part(plan) == [0, 2]


def test_fewer_gpus_where_system_memory_holds_all_of_them_up(tiny_checkpoint: Path) -> None:
    """Each more of them makes the others' copies more, and each takes less of the work: with these links two are the best, not one or four."""
    four = [timed(index) for index in range(4)]
    alone = plan_of(tiny_checkpoint, four[0]).expected
    assert alone is not None
    # So that two wait as long as they compute.
    links = Links(together_bytes_per_s=relayed_bytes(tiny_checkpoint, *four[:2]) / (alone.seconds / 2))
    plan = plan_of(tiny_checkpoint, *four, links=links)
    assert plan.parallel and len(taking_part(plan)) == 2
    (note,) = [note for note in plan.notes if "left out" in note]
    assert (
        "are left out: a forward is expected to take" in note and "held up by what the GPUs copy from and to system memory together" in note
    )
    everybody = plan_of(tiny_checkpoint, *four, links=links, execution="parallel")
    assert taking_part(everybody) == [0, 1, 2, 3]
    assert any("The GPUs wait for their copies from and to system memory longer than they compute" in note for note in everybody.notes)
    reached = {(a, b): 1e12 for a in range(4) for b in range(4) if a != b}
    assert len(taking_part(plan_of(tiny_checkpoint, *four, links=replace(links, direct=reached)))) == 4


@pytest.mark.parametrize("together", [155e9, 178e9, 190e9])
@pytest.mark.parametrize("tflops", [740.0, 760.0])
def test_two_of_four_h200s_that_relay(tflops: float, together: float) -> None:
    """Three and four took longer (benchmarks/RESULTS.md); where they reach each other's memory, all of them take part."""
    gpus = [timed(index, tflops=tflops, link_gb_s=55, total_gib=139) for index in range(4)]
    handle = ModelHandle(model_shape(), "default", "balanced", "auto", "auto", {})
    links = Links(together_bytes_per_s=together)
    assert len(taking_part(ModelOwner().dry_plan(handle, replace(machine(*gpus), links=links), P480))) == 2
    reached = replace(links, direct={(a, b): 360e9 for a in range(4) for b in range(4) if a != b})
    assert len(taking_part(ModelOwner().dry_plan(handle, replace(machine(*gpus), links=reached), P480))) == 4


def relayed_bytes(checkpoint: Path, *devices: DeviceInfo) -> float:
    """What all copies through system memory come to in a forward, where they go no faster than a byte a second."""
    expected = plan_of(checkpoint, *devices, links=Links(together_bytes_per_s=1.0), execution="parallel").expected
    assert expected is not None and expected.slow_together
    return expected.seconds


def test_one_of_three_alone_where_the_others_only_hold_it_up(heavy: Path) -> None:
    """And the reason is the one: all at once would not fit, so nothing is said of its seconds."""
    expert = TinyExpert(heavy)
    sliders = {0: 0.0, 1: 0.0, 2: expert.slider_gib(TINY, 1.5 * expert.block_bytes)}
    plan = plan_of(heavy, timed(0), timed(1, link_gb_s=0.0001), timed(2, tflops=0.5), shape=TINY, max_memory_gib=sliders)
    assert taking_part(plan) == [0]
    (note,) = [note for note in plan.notes if "left out" in note]
    assert note.endswith("are left out: all GPUs at once need more memory than they may use."), note


def test_a_slow_gpu_behind_a_good_link_takes_part(tiny_checkpoint: Path) -> None:
    plan = plan_of(tiny_checkpoint, timed(0), timed(1, tflops=0.1))
    assert plan.parallel and taking_part(plan) == [0, 1]


@pytest.fixture
def heavy(make_checkpoint: Callable[..., Path]) -> Path:
    """8 blocks of 3 MiB in float32."""
    return make_checkpoint(num_blocks=8, num_heads=16)


@pytest.mark.parametrize("known", [True, False])
def test_one_at_a_time_where_all_at_once_does_not_fit(heavy: Path, known: bool) -> None:
    """All at once needs room for two fetched blocks, one at a time for one at most."""
    expert = TinyExpert(heavy)
    others = expert.total_bytes - 8 * expert.block_bytes
    sliders = expert.sliders(TINY, [1.5 * expert.block_bytes + others])
    device = timed(0, tflops=1.0 if known else None)
    plan = plan_of(heavy, device, shape=TINY, max_memory_gib=sliders, offload="cpu")
    assert not plan.parallel and taking_part(plan) == [0]
    assert "One GPU computes at a time, and fetches no block ahead: fetching ahead needs more memory than it may use." in plan.notes
    assert plan_of(heavy, device, shape=TINY, offload="cpu").parallel, "only for want of memory"
    with pytest.raises(PlacementError, match="for activations and the block being fetched"):
        plan_of(heavy, device, shape=TINY, max_memory_gib=sliders, offload="cpu", execution="parallel")


def test_a_gpu_too_small_for_its_part_is_left_out(heavy: Path) -> None:
    expert = TinyExpert(heavy)
    sliders = {0: 0.0, 1: expert.slider_gib(TINY, 1.5 * expert.block_bytes)}
    plan = plan_of(heavy, timed(0), timed(1, tflops=0.5), shape=TINY, max_memory_gib=sliders)
    assert plan.parallel and taking_part(plan) == [0]
    assert "GPU 1 · Imagined 64 GB is left out: all GPUs at once need more memory than they may use." in plan.notes
    with pytest.raises(PlacementError, match="With execution auto instead of parallel this size fits as it is."):
        plan_of(heavy, timed(0), timed(1, tflops=0.5), shape=TINY, max_memory_gib=sliders, execution="parallel")
    with pytest.raises(PlacementError) as caught:
        plan_of(heavy, timed(0), timed(1), shape=VideoShape(1280, 720, 4001), max_memory_gib={0: 1, 1: 1}, execution="parallel")
    assert "execution auto" not in str(caught.value)


def test_one_at_a_time_where_links_are_slower_than_that(heavy: Path) -> None:
    """Neither GPU holds all blocks; one after the other, none of them has to travel."""
    expert = TinyExpert(heavy)
    sliders = expert.sliders(TINY, [0.8 * expert.total_bytes] * 2)
    slow = [timed(index, link_gb_s=0.001, tflops=1 + index) for index in range(2)]
    plan = plan_of(heavy, *slow, shape=TINY, max_memory_gib=sliders)
    assert not plan.parallel and taking_part(plan) == [0, 1]
    assert HOST not in plan.placements["transformer"].homes.values()
    (note,) = [note for note in plan.notes if "One GPU computes at a time" in note]
    assert "with all GPUs at once, held up by the link of GPU 0" in note
    assert plan_of(heavy, *(timed(index) for index in range(2)), shape=P480).parallel


@pytest.mark.parametrize(("execution", "parallel"), [("parallel", True), ("sequential", False)])
def test_what_is_asked_for_is_done(tiny_checkpoint: Path, execution: str, parallel: bool) -> None:
    plan = plan_of(tiny_checkpoint, timed(0), timed(1), execution=execution)
    assert plan.parallel == parallel and taking_part(plan) == [0, 1]
    assert plan.shares == ({0: 0.5, 1: 0.5} if parallel else {0: 1.0, 1: 1.0})


def test_a_cpu_computes_one_block_after_the_other(tiny_checkpoint: Path) -> None:
    cpu = DeviceInfo(0, "CPU", "cpu", 64 * GIB, 60 * GIB, is_gpu=False)
    assert not plan_of(tiny_checkpoint, cpu, shape=TINY).parallel


SMALL_AND_FAST = (
    replace(gpu(0, 8, free_gib=7.2), speed_tflops=75.0, link_bytes_per_s=12e9),
    replace(gpu(1, 12, free_gib=11.2), speed_tflops=28.0, link_bytes_per_s=12e9),
)


def fp8_plan(*devices: DeviceInfo, shape: VideoShape, execution: str = "auto", host_gib: float = 128) -> Plan:
    handle = ModelHandle(model_shape(), "fp8_e4m3fn", "balanced", execution, "auto", {})
    return ModelOwner().dry_plan(handle, replace(machine(*devices), host_available_bytes=int(host_gib * GIB), fragmentation=1.4), shape)


@pytest.mark.parametrize("execution", ["auto", "parallel"])
def test_a_fast_gpu_with_little_memory_computes_what_it_has_memory_for(execution: str) -> None:
    """Its speed alone would give it 73 % of the tokens of this length, which do not fit; the slow one alone would take twice as long."""
    fits, larger = VideoShape(1280, 720, 81), VideoShape(1280, 720, 101)
    assert fp8_plan(*SMALL_AND_FAST, shape=fits, execution=execution).shares == pytest.approx({0: 75 / 103, 1: 28 / 103})
    plan = fp8_plan(*SMALL_AND_FAST, shape=larger, execution=execution)
    assert plan.parallel and taking_part(plan) == [0, 1]
    assert 0.4 < plan.shares[0] < 0.6 and sum(plan.shares.values()) == pytest.approx(1)
    for placement in plan.placements.values():
        for budget in plan.budgets:
            assert placement.predicted_peak_bytes(budget.device.index) <= budget.usable_bytes
    (note,) = [note for note in plan.notes if "by its speed it would be" in note]
    assert note.startswith("GPU 0 · Imagined 8 GB computes ") and "73%" in note
    alone = fp8_plan(SMALL_AND_FAST[1], shape=larger)
    assert plan.expected is not None and alone.expected is not None
    assert plan.expected.seconds == pytest.approx(alone.expected.seconds * plan.shares[1])


def test_every_set_of_a_few_gpus_is_tried() -> None:
    """Neither of two fast ones with little memory takes part, so that both slow ones with much can."""
    large = [replace(gpu(index, 24), speed_tflops=70.0, link_bytes_per_s=12e9) for index in range(2)]
    small = [replace(SMALL_AND_FAST[0], index=index, torch_device=f"cuda:{index}") for index in (2, 3)]
    plan = fp8_plan(*large, *small, shape=VideoShape(1280, 720, 121))
    assert plan.parallel and taking_part(plan) == [0, 1]


def test_another_gpu_beside_measured_ones_starts_with_its_planned_share(tiny_checkpoint: Path) -> None:
    """Speeds that were measured are tokens a second, beside which a fraction is nothing."""
    owner, where = ModelOwner(), machine(*(timed(index) for index in range(3)))
    two = open_model(tiny_checkpoint, weight_dtype="fp32", execution="parallel", max_memory_gib={2: -1})
    loaded = owner.obtain(two, where, P480)
    crew = loaded.computing._crew_of(loaded.planned())
    for share in crew.shares:
        share.speed, share.worker.is_timed = 6000.0 + share.worker.index, True
    three = open_model(tiny_checkpoint, weight_dtype="fp32", execution="parallel")
    loaded = owner.obtain(three, where, P480)
    assert [share.speed for share in loaded.computing._crew_of(loaded.planned()).shares] == pytest.approx([1 / 3] * 3)


def test_frames_find_system_memory_that_weights_wait_in() -> None:
    """They leave it before decoding. What is mapped takes none that could be left."""
    shape, where = VideoShape(1280, 720, 81), (SMALL_AND_FAST[1],)
    plan = fp8_plan(*where, shape=shape, host_gib=24)
    assert plan.host_bytes == 24 * GIB - plan.reserve.host_bytes
    assert plan.frames_bytes > 3 * GIB
    handle = ModelHandle(model_shape(), "fp8_e4m3fn", "balanced", "auto", "auto", {})
    owner, first = ModelOwner(), replace(machine(*where), host_available_bytes=24 * GIB, fragmentation=1.4)
    loaded, waiting = owner.obtain(handle, first, shape), 0
    expert = loaded.experts["transformer_2"]
    for name in expert.parts:
        if waiting + expert.part_bytes(name) <= plan.host_bytes:
            expert._locations[name], waiting = torch.device("cpu"), waiting + expert.part_bytes(name)
    less = replace(first, host_available_bytes=2 * GIB)
    assert owner.obtain(handle, less, shape).planned().frames_bytes == plan.frames_bytes
    expert.takes_host_memory = lambda name: False  # type: ignore[method-assign]
    for nobody in (owner, ModelOwner()):
        with pytest.raises(PlacementError, match=r"of system memory for its frames, and 2\.0 GiB are free"):
            nobody.obtain(handle, less, shape)


@pytest.mark.parametrize(("fp8", "advised"), [(False, True), (True, False)])
def test_few_bits_are_advised_where_most_of_a_file_is_wide(fp8: bool, advised: bool) -> None:
    """One matrix in few bits saves nothing."""
    model = model_shape()
    experts = {
        part: replace(
            files,
            tensors={
                name: replace(stored, dtype="F8_E4M3" if len(stored.shape) == 2 and (fp8 or name == "blocks.0.ffn.net.2.weight") else "F16")
                for name, stored in files.tensors.items()
            },
        )
        for part, files in model.experts.items()
    }
    handle = ModelHandle(replace(model, experts=experts), "default", "balanced", "auto", "auto", {})
    plan = ModelOwner().dry_plan(handle, replace(machine(SMALL_AND_FAST[1]), host_available_bytes=64 * GIB), P480)
    assert plan.precision.dtype == (torch.bfloat16 if fp8 else torch.float16), "what most of it has, if that is wide"
    assert plan.precision.as_stored == "F8_E4M3" and plan.placements["transformer"].weight_bytes(HOST)
    assert any("weight_dtype" in note for note in plan.notes) == advised


def test_frames_take_no_room_from_what_is_placed_on_the_host() -> None:
    """Where there is none, blocks stay in the mapped file, and waiting ones leave before decoding."""
    plan = fp8_plan(SMALL_AND_FAST[1], shape=VideoShape(832, 480, 161), host_gib=12)
    assert plan.placements["transformer"].weight_bytes(HOST) > 8 * GIB
    with pytest.raises(PlacementError, match=r"At 832x480, length (\d+) fits\.") as caught:
        fp8_plan(SMALL_AND_FAST[1], shape=VideoShape(832, 480, 641), host_gib=12)
    found = re.search(r"length (\d+) fits", str(caught.value))
    assert found is not None
    fits = int(found[1])
    assert fp8_plan(SMALL_AND_FAST[1], shape=VideoShape(832, 480, fits), host_gib=12)
    with pytest.raises(PlacementError):
        fp8_plan(SMALL_AND_FAST[1], shape=VideoShape(832, 480, fits + 4), host_gib=12)
