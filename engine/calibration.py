"""What this machine is and how fast, and the plan for a size, without a model: text that can be put into a bug report.

    python -m wan_sharded.engine.calibration --width 832 --height 480 --length 81

Names no paths, no computer and no people. The plan is for Wan 2.2 I2V A14B's shape. Called by the bridge and by Python users.
"""

import argparse
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import probe
from .checkpoints.stored import HIGH_NOISE, LOW_NOISE, ModelFiles
from .errors import BusyError, PlacementError, UnsupportedError
from .handle import ModelHandle
from .memory_errors import is_out_of_memory
from .owner import ModelOwner
from .parallel.measure import NEEDED_BYTES, BlockSpeed, measure_block, measure_link
from .pipeline.request import fit_size
from .planning.bars import Bar
from .planning.budgets import NO_RESERVE, Reserve
from .planning.devices import DeviceInfo, Machine, gib
from .planning.footprint import VideoShape
from .reports import plan_bars, plan_report
from .weights.drawn import drawn_component
from .weights.precision import WEIGHT_DTYPES

HOST = "system memory"
MODEL_NAME = "Wan 2.2 I2V A14B, without its weights"
PACKAGES = ("diffusers", "transformers", "accelerate")


@dataclass(frozen=True)
class DeviceSpeed:
    """One device as it was measured.

    Attributes:
        device: what it is, and what is free there.
        block: how fast it computes; ``None`` where it could not be measured, or was not to be.
        why_not: the reason in words.
    """

    device: DeviceInfo
    block: BlockSpeed | None = None
    why_not: str = ""


@dataclass(frozen=True)
class LinkSpeed:
    """From one device to another.

    Attributes:
        source, target: "GPU 0", "system memory".
        bytes_per_s: measured; ``None`` where it was not.
        direct: whether the two GPUs reach each other's memory; copies go through system memory otherwise.
    """

    source: str
    target: str
    bytes_per_s: float | None
    direct: bool


@dataclass(frozen=True)
class Calibration:
    """Everything that was found.

    Attributes:
        devices, links: what there is.
        bars: the plan as bars; empty where it does not fit.
        plan: the plan in words, or why it does not fit.
        text: all of it, for people.
    """

    devices: tuple[DeviceSpeed, ...]
    links: tuple[LinkSpeed, ...]
    bars: tuple[Bar, ...]
    plan: str
    text: str


def calibrate(
    owner: ModelOwner,
    *,
    width: int = 832,
    height: int = 480,
    length: int = 81,
    weight_dtype: str = "default",
    device_map: str = "balanced",
    execution: str = "auto",
    offload: str = "auto",
    max_memory_gib: Mapping[int, float] | None = None,
    measure: bool = True,
    reserve: Reserve = NO_RESERVE,
) -> Calibration:
    """Measure the devices and their links for some seconds, and plan for a size. What is loaded is let go if its room is needed.

    Args:
        owner: of what is loaded in this process.
        width, height, length: of the video; corrected as the sampler does it.
        weight_dtype: "default" counts as bf16 here.
        device_map, execution, offload, max_memory_gib: as for :func:`engine.open_model`.
        measure: compute and copy; else only say what there is.
        reserve: what the application around us wants left alone.

    Raises:
        BusyError: a video is being made, or another calibration is under way.
        InvalidRequestError: a value is outside what Wan can take, or an unknown choice.
    """
    fitted_width, fitted_height, frames, notes = fit_size(width, height, length)
    shape = VideoShape(fitted_width, fitted_height, frames)
    handle = ModelHandle(model_shape(), weight_dtype, device_map, execution, offload, dict(max_memory_gib or {}))
    if not owner.lock.acquire(blocking=False):
        raise BusyError("A video or another measurement is being made. Wait until it is done, or cancel it, and measure again.")
    try:
        machine = probe.probe_machine()
        if measure and any(device.is_gpu and device.free_bytes < NEEDED_BYTES for device in machine.devices):
            owner.release()
            machine = probe.probe_machine()
        devices = tuple(_device_speed(device, measure=measure) for device in machine.devices)
        links = tuple(_links(machine, measure=measure))
        bars, plan = _planned(owner, handle, machine, shape, reserve)
    finally:
        owner.lock.release()
    text = "\n".join(
        [*environment_lines(machine), *map(_device_line, devices), *_link_lines(links, machine), *notes, f"{MODEL_NAME}: {plan}"]
    )
    return Calibration(devices, links, bars, plan, text)


def model_shape() -> ModelFiles:
    """Wan 2.2 I2V A14B as headers of bf16 files would describe it: 14.3 billion parameters an expert, none of them anywhere."""
    files = drawn_component()
    return ModelFiles(MODEL_NAME, {HIGH_NOISE: files, LOW_NOISE: files}, None, None, None, fingerprint="")


def _planned(owner: ModelOwner, handle: ModelHandle, machine: Machine, shape: VideoShape, reserve: Reserve) -> tuple[tuple[Bar, ...], str]:
    try:
        plan = owner.dry_plan(handle, machine, shape, reserve=reserve)
    except PlacementError as error:
        return (), f"{shape} would not fit: {error}"
    except UnsupportedError as error:
        return (), str(error)
    return plan_bars(plan, own_vae=True), plan_report(plan)


# ---- measuring


def _device_speed(device: DeviceInfo, *, measure: bool) -> DeviceSpeed:
    if not measure:
        return DeviceSpeed(device)
    if device.is_gpu and device.free_bytes < NEEDED_BYTES:
        return DeviceSpeed(
            device, None, f"not measured: that takes {gib(NEEDED_BYTES)}. Unload models or close programs, and measure again"
        )
    try:
        return DeviceSpeed(device, measure_block(device))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return DeviceSpeed(device, None, "not measured: it ran out of memory. Unload models or close programs, and measure again")


def _links(machine: Machine, *, measure: bool) -> list[LinkSpeed]:
    gpus = [device for device in machine.devices if device.is_gpu]
    host = torch.device("cpu")
    places = {_short(device): torch.device(device.torch_device) for device in gpus}
    pairs = [(a, b) for name in places for a, b in ((HOST, name), (name, HOST))]
    pairs += [(a, b) for a in places for b in places if a != b]
    found: list[LinkSpeed] = []
    for source, target in pairs:
        ends = places.get(source, host), places.get(target, host)
        direct = HOST in (source, target) or probe.reach_each_other(*ends)
        found.append(LinkSpeed(source, target, _link_speed(*ends) if measure else None, direct))
    return found


def _link_speed(source: torch.device, target: torch.device) -> float | None:
    try:
        return measure_link(source, target)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


# ---- in words


def environment_lines(machine: Machine) -> list[str]:
    """Versions and system memory; what matters in a bug report, without anything personal."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}" if torch.version.hip else "no CUDA"
    words = [f"{platform.system()}", f"Python {platform.python_version()}", f"torch {torch.__version__}", cuda]
    words += [f"{name} {_version(name)}" for name in PACKAGES]
    if torch.cuda.is_available():
        words.append(f"allocator {torch.cuda.get_allocator_backend()}")
    memory = f"{gib(machine.host_total_bytes)}, {gib(machine.host_available_bytes)} free"
    return [f"Wan Sharded: {', '.join(words)}", f"{HOST}: {memory}", *machine.warnings]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _short(device: DeviceInfo) -> str:
    return f"GPU {device.index}" if device.is_gpu else device.label


def _device_line(found: DeviceSpeed) -> str:
    device, block = found.device, found.block
    words = [f"{gib(device.total_bytes)}, {gib(device.free_bytes)} free"]
    if device.compute_capability:
        words.append(f"compute capability {'.'.join(map(str, device.compute_capability))}")
    if device.speed_tflops:
        words.append(f"matrix products {device.speed_tflops:.1f} TFLOP/s")
    if block:
        words.append(f"a block of width {block.width} on {block.tokens} tokens {block.seconds * 1e3:.1f} ms ({block.tflops:.3g} TFLOP/s)")
    return f"{device.label}: {', '.join([*words, *filter(None, [found.why_not])])}"


def _link_lines(links: Iterable[LinkSpeed], machine: Machine) -> list[str]:
    together = machine.links.together_bytes_per_s
    words = [f"all GPUs from and to {HOST} at once: {together / 1e9:.1f} GB/s"] if together else []
    return [*map(_link_line, links), *words]


def _link_line(link: LinkSpeed) -> str:
    way = "" if link.direct else " through system memory"
    speed = "not measured" if link.bytes_per_s is None else f"{link.bytes_per_s / 1e9:.1f} GB/s"
    return f"{link.source} to {link.target}: {speed}{way}"


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in (("width", 832), ("height", 480), ("length", 81)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--weight-dtype", choices=WEIGHT_DTYPES, default="default")
    parser.add_argument(
        "--sliders", type=float, nargs="*", default=[], metavar="GIB", help="of GPU 0, GPU 1, ...; 0 = automatic, -1 = left out"
    )
    given: Any = parser.parse_args(arguments)
    size = {"width": given.width, "height": given.height, "length": given.length}
    sliders = dict(enumerate(given.sliders))
    print(calibrate(ModelOwner(), **size, weight_dtype=given.weight_dtype, max_memory_gib=sliders).text)


if __name__ == "__main__":
    main()
