"""What a user is told to move: the reason is the real one, and what is advised does it."""

import re
from dataclasses import replace

import pytest
from diffusers import WanTransformer3DModel
from imagined_machine import gpu, machine
from stored_like import part_sizes
from wan_sharded.engine.planning.advice import advice
from wan_sharded.engine.planning.budgets import Budget, budgets_for
from wan_sharded.engine.planning.devices import GIB, Links, Machine
from wan_sharded.engine.planning.footprint import VideoShape
from wan_sharded.engine.planning.forecast import Work, forecast
from wan_sharded.engine.planning.placement import HOST, Placement, place_expert
from wan_sharded.engine.weights.precision import Precision

WORK = Work.of(VideoShape(832, 480, 81), width=5120, ffn_width=13_824, blocks=40, element_bytes=2)


class Case:
    """A 14B expert on a machine, and what is said about it."""

    def __init__(
        self, model: WanTransformer3DModel, precision: Precision, where: Machine, sliders: dict[int, float], offload: str = "auto"
    ):
        self.model, self.precision, self.where, self.sliders, self.offload = model, precision, where, sliders, offload

    def placed(self, budgets: tuple[Budget, ...] | None = None) -> Placement:
        return place_expert(
            part_sizes(self.model, self.precision),
            budgets or budgets_for(self.where, self.sliders)[0],
            device_map="balanced",
            offload=self.offload,
            activation_bytes=3 * GIB,
            host_bytes=56 * GIB,
            parallel=True,
        )

    def said(self) -> tuple[str, ...]:
        placement = self.placed()
        return advice(
            placement,
            self.where,
            self.sliders,
            offload=self.offload,
            few_bits=self.precision.quantized,
            expected=forecast(placement, {budget.device.index: budget.device for budget in placement.budgets}, WORK, self.where.links),
            all_on_gpus=lambda budgets: not self.placed(budgets).weight_bytes(HOST),
        )


def test_nothing_is_said_where_all_is_well(wan_14b: WanTransformer3DModel, precision: Precision) -> None:
    assert Case(wan_14b, precision, machine(gpu(0, 80), gpu(1, 80)), {}).said() == ()


def test_the_slider_that_would_bring_all_blocks_home_does(wan_14b: WanTransformer3DModel, precision: Precision) -> None:
    where = machine(gpu(0, 48), gpu(1, 12))
    case = Case(wan_14b, precision, where, {0: 6.5, 1: 6.5})
    (words,) = case.said()
    found = re.fullmatch(
        r"\d+ blocks \([\d.]+ GiB\) wait in system memory and must be fetched for every forward\. "
        r"All are on the GPUs with the slider of GPU 0 · Imagined 48 GB at ([\d.]+) or more\.",
        words,
    )
    assert found, words
    value = float(found[1])
    assert not Case(wan_14b, precision, where, {0: value, 1: 6.5}).placed().weight_bytes(HOST)
    assert Case(wan_14b, precision, where, {0: value - 0.5, 1: 6.5}).placed().weight_bytes(HOST)


def test_where_no_slider_helps_something_smaller_is_advised(wan_14b: WanTransformer3DModel, precision: Precision) -> None:
    (words,) = Case(wan_14b, precision, machine(gpu(0, 10)), {}).said()
    assert "No position of the sliders changes that with what is free now" in words and "a smaller or shorter video" in words
    assert ("fp8_e4m3fn or int8" in words) == (not precision.quantized)


def test_offload_cpu_is_named_as_the_reason(wan_14b: WanTransformer3DModel, precision: Precision) -> None:
    (words,) = Case(wan_14b, precision, machine(gpu(0, 80)), {}, offload="cpu").said()
    assert words.startswith("40 blocks (") and words.endswith(
        " wait in system memory, because offload is 'cpu'. With 'auto', those that fit stay on the GPUs."
    )


def test_a_gpu_with_its_slider_below_zero_is_named(wan_14b: WanTransformer3DModel, precision: Precision) -> None:
    case = Case(wan_14b, precision, machine(gpu(0, 80), gpu(1, 12)), {1: -1})
    assert case.said() == ("GPU 1 · Imagined 12 GB is left out: its slider is below 0.",)


@pytest.mark.parametrize("count", [1, 2])
def test_a_slow_link(wan_14b: WanTransformer3DModel, precision: Precision, count: int) -> None:
    gpus = [replace(gpu(i, 80), speed_tflops=100.0, link_bytes_per_s=0.2e9 if i else 25e9) for i in range(2)][2 - count :]
    where = machine(*gpus)
    words = Case(wan_14b, precision, where, {}, offload="cpu" if count == 1 else "auto").said()[-1]
    assert words.startswith("GPU 1 · Imagined 80 GB waits for its link longer than it computes. Put that card into a faster slot")
    assert ("fp8_e4m3fn or int8" in words) == (not precision.quantized)
    assert ("below 0 to leave it out" in words) == (count == 2)


def test_gpus_that_hold_each_other_up_in_system_memory(wan_14b: WanTransformer3DModel, precision: Precision) -> None:
    gpus = [replace(gpu(i, 80), speed_tflops=100.0, link_bytes_per_s=25e9) for i in range(2)]
    where = replace(machine(*gpus), links=Links(together_bytes_per_s=1e9))
    words = Case(wan_14b, precision, where, {}).said()[-1]
    lower = "set the slider of a GPU below 0 to leave it out, and compare."
    advised = (
        f"S{lower[1:]}"
        if precision.quantized
        else f"Choose fp8_e4m3fn or int8 as weight_dtype, so that half as much of the weights travels, or {lower}"
    )
    assert words == f"The GPUs wait for their copies from and to system memory longer than they compute. {advised}"
