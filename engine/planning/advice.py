"""What a user could move or change where a plan is slower than it need be: sentences for the node. Pure."""

from collections.abc import Mapping

from .budgets import Budget
from .devices import Machine, gib
from .forecast import Forecast
from .placement import HOST, Placement
from .remedies import Fits, enough_sliders


def advice(
    placement: Placement,
    machine: Machine,
    sliders_gib: Mapping[int, float],
    *,
    offload: str,
    few_bits: bool,
    expected: Forecast | None,
    all_on_gpus: Fits,
) -> tuple[str, ...]:
    """What holds a run up and what to do about it; nothing where nothing does.

    Args:
        placement: of the expert that works first.
        machine: all devices.
        sliders_gib: GiB per visible index; below 0 = left out.
        offload: "auto", "cpu" or "none".
        few_bits: whether the weights are kept in 8 bits or fewer already.
        expected: of one forward, where speeds are known.
        all_on_gpus: whether no block would wait in system memory with other budgets.
    """
    return (
        *_left_out(machine, sliders_gib),
        *_on_host(placement, offload=offload, few_bits=few_bits, all_on_gpus=all_on_gpus),
        *_slow_link(placement.budgets, expected, few_bits=few_bits),
    )


def _left_out(machine: Machine, sliders_gib: Mapping[int, float]) -> list[str]:
    gone = [device for device in machine.devices if device.is_gpu and sliders_gib.get(device.index, 0) < 0]
    return [f"{device.label} is left out: its slider is below 0." for device in gone]


def _on_host(placement: Placement, *, offload: str, few_bits: bool, all_on_gpus: Fits) -> list[str]:
    blocks = [part for part in placement.offloaded if part.startswith("blocks.")]
    if not blocks:
        return []
    wait = "waits" if len(blocks) == 1 else "wait"
    what = f"{len(blocks)} block{'s' if len(blocks) > 1 else ''} ({gib(placement.weight_bytes(HOST))}) {wait} in system memory"
    if offload == "cpu":
        return [f"{what}, because offload is 'cpu'. With 'auto', those that fit stay on the GPUs."]
    enough = enough_sliders(placement.budgets, all_on_gpus)
    if enough:
        return [f"{what} and must be fetched for every forward. All are on the GPUs with {enough}."]
    smaller = "a smaller or shorter video leaves more room for them"
    if not few_bits:
        smaller = f"fp8_e4m3fn or int8 as weight_dtype takes about half, and {smaller}"
    return [f"{what} and must be fetched for every forward. No position of the sliders changes that with what is free now; {smaller}."]


def _slow_link(budgets: tuple[Budget, ...], expected: Forecast | None, *, few_bits: bool) -> list[str]:
    if expected is None or not (expected.slow_link or expected.slow_together):
        return []
    ways = ["Put that card into a faster slot"] if expected.slow_link else []
    if not few_bits:
        ways.append("choose fp8_e4m3fn or int8 as weight_dtype, so that half as much of the weights travels")
    if len(budgets) > 1:
        which = "its slider" if expected.slow_link else "the slider of a GPU"
        ways.append(f"set {which} below 0 to leave it out, and compare")
    listed = ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])}, or {ways[-1]}"
    if expected.slow_link:
        return [f"{expected.slow_link.label} waits for its link longer than it computes. {listed}."]
    return [f"The GPUs wait for their copies from and to system memory longer than they compute. {listed[0].upper()}{listed[1:]}."]
