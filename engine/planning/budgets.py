"""From sliders to the bytes each device may use. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import InvalidRequestError, PlacementError
from .devices import GIB, DeviceInfo, Machine, gib

# The driver's context and loaded kernels live outside torch's allocator; 0.67 to 0.91 GiB where measured (benchmarks/whole_run.py).
CONTEXT_BYTES = int(1.0 * GIB)
# "0" leaves this share of what is free untouched, for the desktop and for fragmentation.
AUTOMATIC_MARGIN = 0.06


@dataclass(frozen=True)
class Budget:
    """The most this pack may use on one device, everything included.

    Attributes:
        device: the device.
        limit_bytes: the limit, CUDA context included.
        automatic: whether the limit comes from what is free rather than from a slider.
        ceiling_bytes: the highest limit that a slider could give now.
    """

    device: DeviceInfo
    limit_bytes: int
    automatic: bool
    ceiling_bytes: int

    @property
    def usable_bytes(self) -> int:
        """What torch's allocator may take: the limit less the driver's context."""
        return max(0, self.limit_bytes - (CONTEXT_BYTES if self.device.is_gpu else 0))


@dataclass(frozen=True)
class Reserve:
    """What the application around us (ComfyUI) wants left alone, bytes.

    Attributes:
        gpu_bytes: on every GPU whose limit is automatic.
        host_bytes: of system memory, which is not filled up to the last in any case.
    """

    gpu_bytes: int = 0
    host_bytes: int = 2 * GIB


NO_RESERVE = Reserve()


def budgets_for(
    machine: Machine,
    sliders_gib: Mapping[int, float],
    *,
    held_bytes: Mapping[int, int] | None = None,
    reserve: Reserve = NO_RESERVE,
) -> tuple[tuple[Budget, ...], tuple[str, ...]]:
    """The budgets of the devices that take part, and notes for people.

    Args:
        machine: the devices.
        sliders_gib: GiB per visible index; 0 or missing = automatic, -1 = leave out. Entries for absent GPUs are ignored.
        held_bytes: what this pack itself holds on each device now; counts as free.
        reserve: what the application around us wants left alone.

    Raises:
        InvalidRequestError: a slider is neither -1, 0 nor positive.
        PlacementError: every GPU is left out.
    """
    notes: list[str] = []
    budgets: list[Budget] = []
    for device in machine.devices:
        slider = _slider_gib(device, sliders_gib)
        if slider == -1:
            continue
        free = device.free_bytes + (held_bytes or {}).get(device.index, 0)
        budgets.append(_budget(device, slider, min(free, device.total_bytes), reserve.gpu_bytes, notes))
    if not budgets:
        names = ", ".join(device.label for device in machine.devices)
        raise PlacementError(f"Every GPU is left out (slider -1): {names}. Set at least one slider to 0 or to a limit in GiB.")
    return tuple(budgets), tuple(notes)


def _slider_gib(device: DeviceInfo, sliders_gib: Mapping[int, float]) -> float:
    given = sliders_gib.get(device.index, 0.0) if device.is_gpu else 0.0
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if -1 <= value < 0:
        return -1.0  # the node's sliders also stop at -0.5
    if not 0 <= value < math.inf:
        raise InvalidRequestError(
            f"The memory slider of {device.label} is {given}. Use 0 for automatic, -1 to leave the GPU out, or a limit in GiB."
        )
    return value


def _budget(device: DeviceInfo, slider_gib: float, free_bytes: int, reserved_bytes: int, notes: list[str]) -> Budget:
    # Free memory is read with the context already there, so a free byte is a usable byte.
    context = CONTEXT_BYTES if device.is_gpu else 0
    ceiling = min(device.total_bytes, free_bytes + context)
    if slider_gib == 0:
        margin = int(AUTOMATIC_MARGIN * free_bytes) + reserved_bytes if device.is_gpu else 0
        return Budget(device, max(0, free_bytes - margin) + context, automatic=True, ceiling_bytes=ceiling)
    limit = int(slider_gib * GIB)
    if limit > device.total_bytes:
        notes.append(f"{device.label}: the slider asks for {slider_gib:g} GiB, more than it has; using {gib(device.total_bytes)}.")
        limit = device.total_bytes
    if limit > ceiling:
        notes.append(
            f"{device.label}: only {gib(free_bytes)} of the {gib(limit)} its slider allows are free; other programs hold the rest."
        )
        limit = ceiling
    return Budget(device, limit, automatic=False, ceiling_bytes=ceiling)
