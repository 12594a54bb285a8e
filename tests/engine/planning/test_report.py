"""The placement in words."""

import re

import pytest
from diffusers import WanTransformer3DModel
from imagined_machine import gpu, machine
from stored_like import part_sizes
from wan_sharded.engine.planning.budgets import budgets_for
from wan_sharded.engine.planning.devices import GIB, DeviceInfo
from wan_sharded.engine.planning.placement import Placement, place_expert
from wan_sharded.engine.planning.report import block_ranges, placement_report
from wan_sharded.engine.weights.precision import Precision

MODEL_CASE = machine(gpu(0, 16), gpu(1, 12))


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([], ""),
        ([3], "block 3"),
        ([0, 1, 2], "blocks 0-2"),
        ([2, 0, 1, 7, 9, 10], "blocks 0-2, 7, 9-10"),
    ],
    ids=str,
)
def test_block_ranges(numbers: list[int], words: str) -> None:
    assert block_ranges([f"blocks.{number}" for number in numbers] + ["proj_out"]) == words


def placed(model: WanTransformer3DModel, precision: Precision, sliders: dict[int, float]) -> Placement:
    return place_expert(
        part_sizes(model, precision),
        budgets_for(MODEL_CASE, sliders)[0],
        device_map="auto",
        offload="auto",
        activation_bytes=3 * GIB,
        host_bytes=56 * GIB,
    )


def test_every_block_is_accounted_for(wan_14b: WanTransformer3DModel, precision: Precision) -> None:
    placement = placed(wan_14b, precision, {0: 10, 1: 0})
    report = placement_report(
        {"transformer": ("high noise expert", placement)}, precision=str(precision), size="832x480x81", notes=("one", "two")
    )
    homes = re.sub(r", \d other parts?", "", report)
    ranges = [pair.split("-") for words in re.findall(r"blocks? ([\d, -]+)", homes) for pair in re.findall(r"\d+-\d+|\d+", words)]
    numbers = [number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)]
    assert sorted(numbers) == list(range(40))
    assert report.startswith(f"{precision}, planned for 832x480x81; one expert works at a time, the other waits.\nhigh noise expert:\n")
    assert re.search(r"^GPU 0 · Imagined 16 GB: [\d.]+ GiB for the expert at work, slider 10\.0 GiB$", report, re.M)
    assert re.search(r"^GPU 1 · Imagined 12 GB: [\d.]+ GiB for the expert at work, automatic limit 1\d\.\d GiB$", report, re.M)
    assert report.endswith("\nNote: one\nNote: two")


def test_measured_peaks_are_told(wan_14b: WanTransformer3DModel, precision: Precision) -> None:
    placement = placed(wan_14b, precision, {0: 15, 1: 11})
    report = placement_report({"transformer": ("", placement)}, precision="", size="", measured={0: 9 * GIB, 1: 10 * GIB})
    # With what CUDA itself takes, as the slider.
    assert "slider 15.0 GiB, measured 10.0 GiB over the whole run" in report and "slider 11.0 GiB, measured 11.0 GiB over" in report
    predicted = placement.predicted_peak_bytes(0) / GIB + 1
    assert f"{predicted:.1f} GiB for the expert at work, slider 15.0 GiB" in report


def test_labels() -> None:
    assert DeviceInfo(1, "RTX 3060", "cuda:1", int(11.76 * GIB), 0).label == "GPU 1 · RTX 3060 12 GB"
    assert DeviceInfo(0, "CPU", "cpu", 64 * GIB, 0, is_gpu=False).label == "CPU"
