"""From sliders to bytes: what each position of a slider means, and what is refused."""

import math

import pytest
from imagined_machine import gpu, machine
from wan_sharded.engine.errors import InvalidRequestError, PlacementError
from wan_sharded.engine.planning.budgets import AUTOMATIC_MARGIN, CONTEXT_BYTES, Budget, Reserve, budgets_for
from wan_sharded.engine.planning.devices import GIB, DeviceInfo

TWO = machine(gpu(0, 16, 15), gpu(1, 12, 11))
CPU_ONLY = machine(DeviceInfo(0, "CPU", "cpu", 32 * GIB, 20 * GIB, is_gpu=False))


def limits_gib(budgets: tuple[Budget, ...]) -> dict[int, float]:
    return {budget.device.index: budget.limit_bytes / GIB for budget in budgets}


def test_a_slider_is_the_limit() -> None:
    budgets, notes = budgets_for(TWO, {0: 10, 1: 7.5})
    assert limits_gib(budgets) == {0: 10, 1: 7.5}
    assert not any(budget.automatic for budget in budgets)
    assert notes == ()


def test_the_drivers_context_counts_against_the_slider() -> None:
    """A promise on everything nvidia-smi shows, not on what torch's allocator sees."""
    (budget, _), _ = budgets_for(TWO, {0: 10, 1: 10})
    assert budget.usable_bytes == 10 * GIB - CONTEXT_BYTES


@pytest.mark.parametrize("sliders", [{}, {0: 0, 1: 0}, {0: 0.0}, {7: 12}], ids=str)
def test_automatic_is_what_is_free_less_a_margin(sliders: dict[int, float]) -> None:
    budgets, notes = budgets_for(TWO, sliders)
    assert [budget.automatic for budget in budgets] == [True, True]
    assert [budget.usable_bytes for budget in budgets] == [free * GIB - int(AUTOMATIC_MARGIN * free * GIB) for free in (15, 11)]
    assert notes == ()


def test_the_applications_reserve_is_left_alone() -> None:
    without, _ = budgets_for(TWO, {})
    reserved, _ = budgets_for(TWO, {}, reserve=Reserve(gpu_bytes=GIB))
    assert [a.usable_bytes - b.usable_bytes for a, b in zip(without, reserved, strict=True)] == [GIB, GIB]


def test_what_we_hold_ourselves_counts_as_free() -> None:
    full = machine(gpu(0, 16, 2))
    (without,), _ = budgets_for(full, {})
    (held,), _ = budgets_for(full, {}, held_bytes={0: 10 * GIB})
    assert held.usable_bytes - without.usable_bytes == pytest.approx(10 * GIB * (1 - AUTOMATIC_MARGIN), abs=2)
    (held,), notes = budgets_for(full, {0: 11}, held_bytes={0: 10 * GIB})
    assert held.limit_bytes == 11 * GIB and not notes
    (never_more_than_all,), _ = budgets_for(full, {}, held_bytes={0: 90 * GIB})
    assert never_more_than_all.usable_bytes <= 16 * GIB


@pytest.mark.parametrize("value", [-1, -0.5])
def test_minus_one_leaves_a_gpu_out(value: float) -> None:
    """The node's sliders move by half a GiB, so they stop at -0.5 too."""
    budgets, _ = budgets_for(TWO, {0: value, 1: 11})
    assert limits_gib(budgets) == {1: 11}


def test_more_than_the_gpu_has() -> None:
    """Sliders travel in workflow files from larger machines; they must not stop a smaller one."""
    (budget, _), notes = budgets_for(machine(gpu(0, 16, 16), gpu(1, 12)), {0: 24})
    assert budget.limit_bytes == 16 * GIB
    assert "GPU 0 · Imagined 16 GB: the slider asks for 24 GiB, more than it has; using 16.0 GiB." in notes


def test_more_than_is_free() -> None:
    (budget,), notes = budgets_for(machine(gpu(0, 16, 6)), {0: 12})
    assert budget.limit_bytes == 6 * GIB + CONTEXT_BYTES
    (note,) = notes
    assert "only 6.0 GiB of the 12.0 GiB its slider allows are free" in note


@pytest.mark.parametrize("value", [-1.5, -2, math.nan, math.inf, -math.inf, "much", None], ids=str)
def test_other_values_are_refused(value: float) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        budgets_for(TWO, {1: value})
    message = str(caught.value)
    assert "GPU 1 · Imagined 12 GB" in message and f"is {value}" in message
    assert "0 for automatic, -1 to leave the GPU out, or a limit in GiB" in message


def test_all_gpus_left_out() -> None:
    with pytest.raises(PlacementError) as caught:
        budgets_for(TWO, {0: -1, 1: -1})
    message = str(caught.value)
    assert "GPU 0 · Imagined 16 GB" in message and "GPU 1 · Imagined 12 GB" in message
    assert "Set at least one slider to 0" in message


def test_without_a_gpu_sliders_count_for_nothing() -> None:
    (budget,), notes = budgets_for(CPU_ONLY, {0: -1, 1: 12})
    assert budget.usable_bytes == 20 * GIB and budget.automatic
    assert notes == ()


@pytest.mark.parametrize("value", [0.0, 0.5, 3.0, 15.0, 99.0])
def test_the_ceiling_is_what_a_slider_could_give(value: float) -> None:
    (budget, _), _ = budgets_for(TWO, {0: value})
    (highest, _), _ = budgets_for(TWO, {0: 256})
    assert budget.ceiling_bytes == highest.limit_bytes
