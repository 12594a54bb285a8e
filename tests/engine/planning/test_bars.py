"""The placement as bars: they hold what the plan says, nothing more, and stay within the limits."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from imagined_machine import gpu, machine
from stored_like import part_sizes
from wan_sharded.engine.planning.bars import ACTIVATIONS, CONTEXT, FETCHED, FRAMES, Bar, as_json, memory_bars
from wan_sharded.engine.planning.budgets import CONTEXT_BYTES, budgets_for
from wan_sharded.engine.planning.devices import GIB, DeviceInfo, Machine
from wan_sharded.engine.planning.footprint import VideoShape, host_bytes, vae_bytes
from wan_sharded.engine.planning.placement import HOST, Placement, place_expert
from wan_sharded.engine.weights.precision import Precision

P480 = VideoShape(832, 480, 81)
HIGH, LOW = "transformer", "transformer_2"
MODEL_CASE = replace(machine(gpu(0, 16, 14), gpu(1, 12, 11), host_gib=56), host_total_bytes=64 * GIB)


def placed(
    model: WanTransformer3DModel,
    precision: Precision,
    sliders: Mapping[int, float],
    *,
    parallel: bool = True,
    where: Machine = MODEL_CASE,
    activation_gib: float = 3,
) -> Placement:
    return place_expert(
        part_sizes(model, precision),
        budgets_for(where, sliders)[0],
        device_map="balanced",
        offload="auto",
        activation_bytes=int(activation_gib * GIB),
        host_bytes=54 * GIB,
        parallel=parallel,
    )


def bars_of(placement: Placement, *, other: Placement | None = None, **options: object) -> dict[str, Bar]:
    bars = memory_bars(
        {HIGH: placement, LOW: other or placement}, MODEL_CASE, P480, **{"host_weight_bytes": 54 * GIB, "own_vae": True, **options}
    )
    return {bar.label.split(" · ")[0]: bar for bar in bars}


def size_of(bar: Bar, kind: str, *, waiting: bool = False) -> int:
    return sum(part.size_bytes for part in bar.parts if part.kind == kind and part.waiting == waiting)


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
@pytest.mark.parametrize("sliders", [{0: 15, 1: 11}, {}, {0: 9, 1: 9}], ids=str)
def test_bars_are_the_plan(wan_14b: WanTransformer3DModel, precision: Precision, sliders: dict[int, float], parallel: bool) -> None:
    placement = placed(wan_14b, precision, sliders, parallel=parallel)
    bars = bars_of(placement)
    assert list(bars) == ["GPU 0", "GPU 1", "system memory"]
    for budget in placement.budgets:
        index, bar = budget.device.index, bars[f"GPU {budget.device.index}"]
        assert (bar.total_bytes, bar.limit_bytes, bar.automatic) == (budget.device.total_bytes, budget.limit_bytes, not sliders)
        assert size_of(bar, CONTEXT) == CONTEXT_BYTES
        assert size_of(bar, HIGH) == placement.weight_bytes(index)
        assert size_of(bar, FETCHED) + size_of(bar, ACTIVATIONS) == placement.reserve_bytes[index]
        assert size_of(bar, ACTIVATIONS) == 3 * GIB
        assert size_of(bar, LOW, waiting=True) <= placement.weight_bytes(index)
        assert sum(part.size_bytes for part in bar.parts) <= bar.limit_bytes <= bar.total_bytes - bar.taken_bytes
    host = bars["system memory"]
    assert size_of(host, HIGH) == size_of(host, LOW, waiting=True) == placement.weight_bytes(HOST)
    assert size_of(host, FRAMES) == host_bytes(P480, vae_on_host=False)
    assert (host.total_bytes, host.limit_bytes, host.taken_bytes) == (64 * GIB, 54 * GIB, 8 * GIB)


def test_fetched_blocks_have_two_rooms_in_parallel(wan_14b: WanTransformer3DModel) -> None:
    placement = placed(wan_14b, Precision(torch.bfloat16, torch.bfloat16), {0: 15, 1: 11})
    block = placement.sizes["blocks.0"]
    assert all(size_of(bar, FETCHED) == 2 * block for label, bar in bars_of(placement).items() if label != "system memory")


def test_the_waiting_expert_fills_what_the_working_one_leaves(wan_14b: WanTransformer3DModel) -> None:
    """In int8 on large cards both stay; on small ones only what has room."""
    int8 = Precision(torch.bfloat16, torch.int8)
    placement = placed(wan_14b, int8, {0: 15.5, 1: 11.5}, activation_gib=1)
    for index, bar in enumerate(list(bars_of(placement).values())[:2]):
        room = bar.limit_bytes - CONTEXT_BYTES - placement.predicted_peak_bytes(index)
        assert size_of(bar, LOW, waiting=True) == min(room, placement.weight_bytes(index))
    small = bars_of(placed(wan_14b, int8, {0: 7, 1: 7}))["GPU 0"]
    assert sum(part.size_bytes for part in small.parts) <= small.limit_bytes


def test_the_larger_expert_is_the_one_that_is_drawn_at_work(wan_14b: WanTransformer3DModel) -> None:
    int8, bf16 = (placed(wan_14b, Precision(torch.bfloat16, dtype), {0: 15, 1: 11}) for dtype in (torch.int8, torch.bfloat16))
    assert bf16.predicted_peak_bytes(0) > int8.predicted_peak_bytes(0)
    bar = bars_of(int8, other=bf16)["GPU 0"]
    assert size_of(bar, LOW) == bf16.weight_bytes(0)
    assert size_of(bar, HIGH) == 0 < size_of(bar, HIGH, waiting=True)


def test_the_vae_is_where_there_is_most_room(wan_14b: WanTransformer3DModel, precision: Precision) -> None:
    placement = placed(wan_14b, precision, {0: 15, 1: 11})
    bars = bars_of(placement)
    whole = vae_bytes(P480, decode=True, element_bytes=4, tiled=False, fragmentation=MODEL_CASE.fragmentation)
    assert bars["GPU 0"].vae_bytes == whole
    assert bars["GPU 1"].vae_bytes == bars["system memory"].vae_bytes == 0
    assert not any(bar.vae_bytes for bar in bars_of(placement, own_vae=False).values())


def test_measured_peaks_and_gpus_that_are_left_out(wan_14b: WanTransformer3DModel, precision: Precision) -> None:
    bars = bars_of(placed(wan_14b, precision, {0: 15, 1: -1}), measured={0: 9 * GIB})
    assert bars["GPU 0"].measured_bytes == 9 * GIB
    assert bars["GPU 1"] == Bar("GPU 1 · Imagined 12 GB", 12 * GIB, 0, False, GIB, left_out=True)
    assert bars["system memory"].measured_bytes is None


def test_a_machine_without_a_gpu(wan_14b: WanTransformer3DModel, precision: Precision) -> None:
    cpu = DeviceInfo(0, "CPU", "cpu", 64 * GIB, 50 * GIB, is_gpu=False)
    placement = placed(wan_14b, precision, {}, where=Machine((cpu,), 50 * GIB), parallel=False)
    (bar,) = memory_bars({HIGH: placement}, Machine((cpu,), 50 * GIB), P480, host_weight_bytes=0, own_vae=True, measured={0: 0})
    assert bar.label == "CPU" and bar.measured_bytes is None
    assert [part.kind for part in bar.parts] == [HIGH, ACTIVATIONS]


def test_what_the_page_gets(wan_14b: WanTransformer3DModel, precision: Precision) -> None:
    bars = memory_bars(
        {HIGH: placed(wan_14b, precision, {0: 15, 1: 11})}, MODEL_CASE, P480, host_weight_bytes=GIB, own_vae=True, measured={0: GIB}
    )
    first, second, host = as_json(bars)
    assert first["total_gib"] == 16 and first["limit_gib"] == 15 and first["taken_gib"] == 1 and first["measured_gib"] == 1
    assert second["measured_gib"] is None and second["left_out"] is False
    assert host["label"] == "system memory"
    assert first["parts"][0] == {"kind": CONTEXT, "gib": 1.0, "waiting": False}
