"""What a forward is expected to take: work as torch itself counts it, and what holds up which placement."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import WanTransformer3DModel
from imagined_machine import gpu, machine
from stored_like import part_sizes
from torch.utils.flop_counter import FlopCounterMode
from wan_sharded.engine.planning.budgets import budgets_for
from wan_sharded.engine.planning.devices import GIB, DeviceInfo, Links
from wan_sharded.engine.planning.footprint import VideoShape
from wan_sharded.engine.planning.forecast import REACHED_SHARE, REACHED_TOGETHER, Forecast, Work, forecast, speed_shares
from wan_sharded.engine.planning.placement import HOST, Placement, place_expert
from wan_sharded.engine.weights.precision import Precision

P480 = VideoShape(832, 480, 81)
P720 = VideoShape(1280, 720, 81)
WAN_14B = {"width": 5120, "ffn_width": 13_824, "blocks": 40, "element_bytes": 2}
BF16 = Precision(torch.bfloat16, torch.bfloat16)


def timed_gpu(index: int, total_gib: float = 64, *, tflops: float | None = 100.0, link_gb_s: float | None = 25.0) -> DeviceInfo:
    return replace(gpu(index, total_gib), speed_tflops=tflops, link_bytes_per_s=link_gb_s and link_gb_s * 1e9)


def by_index(*devices: DeviceInfo) -> dict[int, DeviceInfo]:
    return {device.index: device for device in devices}


def place(model: WanTransformer3DModel, devices: Mapping[int, DeviceInfo], *, parallel: bool, offload: str = "auto") -> Placement:
    return place_expert(
        part_sizes(model, BF16),
        budgets_for(machine(*devices.values()), {})[0],
        device_map="balanced",
        offload=offload,
        activation_bytes=3 * GIB,
        host_bytes=56 * GIB,
        parallel=parallel,
    )


def seconds(model: WanTransformer3DModel, devices: Mapping[int, DeviceInfo], *, parallel: bool, shape: VideoShape = P480) -> float:
    found = forecast(place(model, devices, parallel=parallel), devices, Work.of(shape, **WAN_14B))
    assert found is not None
    return found.seconds


# ---- the work


@pytest.mark.parametrize(("shape", "flops"), [(P480, 1.68e15), (P720, 6.52e15)], ids=str)
def test_work_of_a_forward_by_hand(shape: VideoShape, flops: float) -> None:
    width, ffn, text, tokens = 5120, 13_824, 512, shape.tokens
    matrices = tokens * (6 * width**2 + 2 * width * ffn) + text * 2 * width**2
    scores = 2 * tokens * tokens * width + 2 * tokens * text * width
    by_hand = 40 * 2 * (matrices + scores)
    assert by_hand == pytest.approx(flops, rel=0.005)
    # The text's keys and values are left out.
    assert 0.98 * by_hand < Work.of(shape, **WAN_14B).flops <= by_hand


def test_work_of_a_block_as_torch_counts_it(wan_14b: WanTransformer3DModel) -> None:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        rotary = (torch.empty(1, P480.tokens, 1, 128), torch.empty(1, P480.tokens, 1, 128))
        wan_14b.blocks[0](torch.empty(1, P480.tokens, 5120), torch.empty(1, 512, 5120), torch.empty(1, 6, 5120), rotary)
    assert Work.of(P480, **{**WAN_14B, "blocks": 1}).flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_work_of_a_batch() -> None:
    one, two = Work.of(P480, **WAN_14B), Work.of(replace(P480, batch_size=2), **WAN_14B)
    assert (one.tokens, two.tokens) == (32_760, 65_520)
    assert two.flops == 2 * one.flops, "videos don't attend to each other"
    assert one.exchanged_bytes == 40 * 32_760 * 2 * 5120 * 2
    assert two.exchanged_bytes == 2 * one.exchanged_bytes


# ---- speeds


def test_shares_follow_speeds() -> None:
    assert speed_shares(by_index(timed_gpu(0, tflops=300), timed_gpu(3, tflops=100))) == {0: 0.75, 3: 0.25}


def test_gpus_of_one_kind_that_are_about_as_fast_get_equal_shares() -> None:
    """Measuring says no more, and equal GPUs lose by shares that are off; others don't, and one that is slower for a reason is."""

    def shares(*devices: DeviceInfo) -> list[float]:
        return [round(share, 4) for share in speed_shares(by_index(*devices)).values()]

    def one(index: int, tflops: float, name: str = "RTX A", total_gib: float = 12) -> DeviceInfo:
        return replace(timed_gpu(index, total_gib, tflops=tflops), name=name)

    assert shares(one(0, 102), one(1, 98)) == [0.5, 0.5]
    assert shares(one(0, 102, total_gib=44.51), one(1, 98, total_gib=44.49)) == [0.5, 0.5], "what is left of its memory"
    assert shares(one(0, 104), one(1, 98)) == [0.5149, 0.4851]
    assert shares(one(0, 102, "RTX B"), one(1, 98)) == [0.51, 0.49]
    assert shares(one(0, 90), one(1, 102), one(2, 98)) == [0.3103, 0.3448, 0.3448], "one of them is slower"
    assert shares(one(0, 102), one(1, 100, "RTX B"), one(2, 98), one(3, 100)) == [0.25] * 4
    assert shares(one(0, 101), one(1, 200, "RTX B"), one(2, 99)) == [0.25, 0.5, 0.25]


@pytest.mark.parametrize("unknown", [None, 0.0])
def test_shares_are_even_where_a_speed_is_unknown(unknown: float | None) -> None:
    assert speed_shares(by_index(timed_gpu(0, tflops=300), timed_gpu(1, tflops=unknown))) == {0: 0.5, 1: 0.5}


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("unknown", [None, 0.0])
def test_nothing_is_expected_where_a_speed_is_unknown(wan_14b: WanTransformer3DModel, parallel: bool, unknown: float | None) -> None:
    devices = by_index(timed_gpu(0), timed_gpu(1, tflops=unknown))
    assert forecast(place(wan_14b, devices, parallel=parallel), devices, Work.of(P480, **WAN_14B)) is None


# ---- all devices at once


def test_two_equal_gpus_take_half_the_time(wan_14b: WanTransformer3DModel) -> None:
    one, two = by_index(timed_gpu(0)), by_index(timed_gpu(0), timed_gpu(1))
    alone = seconds(wan_14b, one, parallel=True)
    assert alone == pytest.approx(Work.of(P480, **WAN_14B).flops / (REACHED_SHARE * 100e12))
    assert seconds(wan_14b, two, parallel=True) == pytest.approx(alone / 2)
    assert seconds(wan_14b, two, parallel=False) == pytest.approx(alone), "one after the other"


def test_unequal_gpus_finish_together(wan_14b: WanTransformer3DModel) -> None:
    devices = by_index(timed_gpu(0, tflops=100), timed_gpu(1, tflops=50))
    found = forecast(place(wan_14b, devices, parallel=True), devices, Work.of(P480, **WAN_14B))
    assert found is not None and found.limit == "computing"
    assert found.seconds == pytest.approx(Work.of(P480, **WAN_14B).flops / (REACHED_SHARE * 150e12))


@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_link_is_the_limit_and_is_named(wan_14b: WanTransformer3DModel, slow: int) -> None:
    devices = by_index(*(timed_gpu(index, link_gb_s=0.8 if index == slow else 25) for index in range(2)))
    placement, work = place(wan_14b, devices, parallel=True), Work.of(P480, **WAN_14B)
    found = forecast(placement, devices, work)
    assert found is not None
    assert found.limit == f"the link of GPU {slow} · Imagined 64 GB, 0.8 GB/s"
    # Everything that lives on the other GPU, and the keys and values of the other half of the tokens.
    foreign = sum(size for part, size in placement.sizes.items() if part.startswith("blocks.") and placement.homes[part] == 1 - slow)
    assert found.seconds == pytest.approx((foreign + work.exchanged_bytes / 2) / 0.8e9)


def test_what_the_host_holds_passes_every_link(wan_14b: WanTransformer3DModel) -> None:
    """Work grows with the square of the tokens and weights do not, so it shows in small videos."""
    small = VideoShape(320, 192, 17)
    devices = by_index(*(timed_gpu(index) for index in range(2)))
    work = Work.of(small, **WAN_14B)
    on_host = place(wan_14b, devices, parallel=True, offload="cpu")
    found = forecast(on_host, devices, work)
    assert found is not None and found.limit.startswith("the link of GPU 0")
    assert found.seconds == pytest.approx((on_host.weight_bytes(HOST) + work.exchanged_bytes / 2) / 25e9)
    half_at_home = forecast(place(wan_14b, devices, parallel=True), devices, work)
    assert half_at_home is not None and half_at_home.seconds < 0.6 * found.seconds


def foreign_bytes(placement: Placement, home: int) -> int:
    return sum(size for part, size in placement.sizes.items() if part.startswith("blocks.") and placement.homes[part] == home)


def test_what_system_memory_carries_for_all_is_a_limit_of_its_own(wan_14b: WanTransformer3DModel) -> None:
    """Each link could take it. What goes from GPU to GPU through system memory is copied twice."""
    devices = by_index(*(timed_gpu(index, tflops=800, link_gb_s=55) for index in range(4)))
    placement, work = place(wan_14b, devices, parallel=True), Work.of(P480, **WAN_14B)
    assert not placement.weight_bytes(HOST)
    alone = forecast(placement, devices, work)
    found = forecast(placement, devices, work, Links(together_bytes_per_s=110e9))
    assert alone is not None and found is not None
    relayed = 3 * (sum(foreign_bytes(placement, home) for home in range(4)) + work.exchanged_bytes)
    assert found.seconds == pytest.approx(2 * relayed / (REACHED_TOGETHER * 110e9)) and found.seconds > 2 * alone.seconds
    assert found.limit == "what the GPUs copy from and to system memory together, 110.0 GB/s"
    assert found.slow_together and found.slow_link is None
    assert forecast(placement, devices, work, Links(together_bytes_per_s=1e12)) == alone


# benchmarks/forecast.py on H200s, all copies staged: GPUs, what they copied together (of the two on a machine of their own), and seconds.
@pytest.mark.parametrize(("count", "together", "seconds"), [(2, 124e9, 1.52), (3, 178e9, 1.69)])
def test_h200s_that_relay_as_measured(wan_14b: WanTransformer3DModel, count: int, together: float, seconds: float) -> None:
    devices = by_index(*(timed_gpu(index, tflops=752, link_gb_s=55) for index in range(count)))
    found = forecast(place(wan_14b, devices, parallel=True), devices, Work.of(P480, **WAN_14B), Links(together_bytes_per_s=together))
    assert found is not None and found.seconds == pytest.approx(seconds, rel=0.1)
    assert found.slow_together == (count > 2)


def test_where_links_are_all_that_is_slow_a_link_is_named(wan_14b: WanTransformer3DModel) -> None:
    """Together they carry what each carries, or nearly; and what is expected has no step where it is called otherwise."""
    devices = by_index(*(timed_gpu(index, link_gb_s=1.5 - 0.1 * index) for index in range(2)))
    placement, work, both_ways = place(wan_14b, devices, parallel=True), Work.of(P480, **WAN_14B), 2 * (1.5e9 + 1.4e9)

    def found(reached: float) -> Forecast:
        expected = forecast(placement, devices, work, Links(together_bytes_per_s=reached * both_ways))
        assert expected is not None
        return expected

    alone = forecast(placement, devices, work)
    assert alone is not None and alone.slow_link == devices[1]
    assert found(1.0) == found(1.2) == alone
    assert found(0.76).limit == alone.limit and found(0.76).slow_link == devices[1] and not found(0.76).slow_together
    assert found(0.74).slow_together and found(0.74).slow_link is None
    seconds = [found(step / 100).seconds for step in range(100, 30, -1)]
    assert all(before <= after < 1.05 * before for before, after in pairwise(seconds))


def test_what_waits_in_system_memory_is_copied_once_to_each(wan_14b: WanTransformer3DModel) -> None:
    devices = by_index(*(timed_gpu(index, tflops=800, link_gb_s=1000) for index in range(2)))
    placement, work = place(wan_14b, devices, parallel=True, offload="cpu"), Work.of(P480, **WAN_14B)
    found = forecast(placement, devices, work, Links(together_bytes_per_s=10e9))
    blocks = sum(size for part, size in placement.sizes.items() if part.startswith("blocks."))
    assert found is not None and found.seconds == pytest.approx((2 * blocks + 2 * work.exchanged_bytes) / (REACHED_TOGETHER * 10e9))


def test_one_gpu_shares_system_memory_with_none(wan_14b: WanTransformer3DModel) -> None:
    devices = by_index(timed_gpu(0))
    placement, work = place(wan_14b, devices, parallel=True, offload="cpu"), Work.of(P480, **WAN_14B)
    links = Links(together_bytes_per_s=0.001)
    assert forecast(placement, devices, work, links) == forecast(placement, devices, work)


def test_what_gpus_send_each_other_directly_does_not_pass_system_memory(wan_14b: WanTransformer3DModel) -> None:
    devices = by_index(*(timed_gpu(index, link_gb_s=0.8) for index in range(2)))
    placement, work = place(wan_14b, devices, parallel=True), Work.of(P480, **WAN_14B)
    fast = Links({(0, 1): 300e9, (1, 0): 300e9}, together_bytes_per_s=3e9)
    found = forecast(placement, devices, work, fast)
    assert found is not None and found.limit == "computing"
    one_way = forecast(placement, devices, work, replace(fast, direct={(0, 1): 300e9}))
    assert one_way is not None and one_way.slow_link == devices[0], "only GPU 1 is reached directly"
    assert one_way.seconds == pytest.approx((foreign_bytes(placement, 1) + work.exchanged_bytes / 2) / 0.8e9)


def test_a_slow_direct_link_is_named(wan_14b: WanTransformer3DModel) -> None:
    devices = by_index(*(timed_gpu(index) for index in range(2)))
    placement, work = place(wan_14b, devices, parallel=True, offload="cpu"), Work.of(P480, **WAN_14B)
    found = forecast(placement, devices, work, Links({(0, 1): 1e9, (1, 0): 1e8}))
    assert found is not None and found.limit == "the link from the other GPUs to GPU 0 · Imagined 64 GB"
    assert found.slow_link == devices[0]
    blocks = sum(size for part, size in placement.sizes.items() if part.startswith("blocks."))
    assert found.seconds == pytest.approx(work.exchanged_bytes / 2 / 1e8 + blocks / 25e9), "one after the other, if they are the same lanes"


def test_one_gpu_alone_exchanges_nothing(wan_14b: WanTransformer3DModel) -> None:
    devices = by_index(timed_gpu(0, link_gb_s=0.001))
    found = forecast(place(wan_14b, devices, parallel=True), devices, Work.of(P480, **WAN_14B))
    assert found is not None and found.limit == "computing"


def test_links_of_unknown_speed_hold_nothing_up(wan_14b: WanTransformer3DModel) -> None:
    devices = by_index(*(timed_gpu(index, link_gb_s=None) for index in range(2)))
    for parallel in (True, False):
        found = forecast(place(wan_14b, devices, parallel=parallel, offload="cpu"), devices, Work.of(P480, **WAN_14B))
        assert found is not None and found.limit.startswith("computing")


# ---- one device at a time


def test_one_at_a_time_each_computes_its_own_blocks(wan_14b: WanTransformer3DModel) -> None:
    devices = by_index(timed_gpu(0, tflops=100), timed_gpu(1, tflops=25))
    placement, work = place(wan_14b, devices, parallel=False), Work.of(P480, **WAN_14B)
    found = forecast(placement, devices, work)
    assert found is not None and found.limit == "computing, one GPU at a time"
    on_second = sum(home == 1 for part, home in placement.homes.items() if part.startswith("blocks."))
    assert 0 < on_second < 40
    expected = work.flops / 40 * ((40 - on_second) / 100e12 + on_second / 25e12) / REACHED_SHARE
    assert found.seconds == pytest.approx(expected)


def test_one_at_a_time_waits_for_what_the_host_holds(wan_14b: WanTransformer3DModel) -> None:
    devices = by_index(timed_gpu(0, link_gb_s=1))
    placement, work = place(wan_14b, devices, parallel=False, offload="cpu"), Work.of(P480, **WAN_14B)
    found = forecast(placement, devices, work)
    fetched = sum(size for part, size in placement.sizes.items() if part.startswith("blocks."))
    assert found is not None and found.limit == "the link of GPU 0 · Imagined 64 GB"
    assert found.seconds == pytest.approx(work.flops / (REACHED_SHARE * 100e12) + fetched / 1e9)
