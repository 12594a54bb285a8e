"""Devices as plain values. Filled by :mod:`engine.probe`, or by a test for an imagined machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field

GIB = 1024**3


@dataclass(frozen=True)
class DeviceInfo:
    """One device that can compute.

    Attributes:
        index: visible index, in PCI bus order; what the sliders and ``max_memory`` count by.
        name: the driver's name, shortened for people ("RTX 5060 Ti").
        torch_device: what torch calls it ("cuda:0", "cpu").
        total_bytes: memory of the device.
        free_bytes: what is free now, counting what this process's allocator holds but does not use.
        compute_capability: CUDA (major, minor), or ``None``.
        is_gpu: whether weights have to be brought to it, and its memory is its own.
        speed_tflops: measured at matrix products, or ``None``.
        link_bytes_per_s: measured from system memory, or ``None``.
    """

    index: int
    name: str
    torch_device: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int] | None = None
    is_gpu: bool = True
    speed_tflops: float | None = None
    link_bytes_per_s: float | None = None

    @property
    def label(self) -> str:
        """What people read: ``GPU 0 · RTX 5060 Ti 16 GB``, ``CPU``."""
        if not self.is_gpu:
            return "CPU"
        return f"GPU {self.index} · {self.name} {round(self.total_bytes / GIB)} GB"


@dataclass(frozen=True)
class Links:
    """How fast bytes travel where several GPUs work together, beside each one's own link. What was not measured is missing.

    Attributes:
        direct: (source, target) by visible index -> bytes per second, where GPUs reach each other's memory.
        together_bytes_per_s: from and to system memory, all GPUs copying both ways at once, every copy counted; or ``None``.
    """

    direct: Mapping[tuple[int, int], float] = field(default_factory=dict)
    together_bytes_per_s: float | None = None


@dataclass(frozen=True)
class Machine:
    """Everything a plan may use.

    Attributes:
        devices: the visible GPUs, or the CPU alone where there is none.
        host_available_bytes: system memory that could be used without swapping.
        warnings: sentences for people, such as GPUs the server hides.
        fragmentation: what the allocator holds at a peak, over what is allocated.
        host_total_bytes: all system memory, or 0 where that is not known.
        links: between the GPUs.
    """

    devices: tuple[DeviceInfo, ...]
    host_available_bytes: int
    warnings: tuple[str, ...] = ()
    fragmentation: float = 1.1
    host_total_bytes: int = 0
    links: Links = Links()


def gib(value_bytes: float) -> str:
    """``7.3 GiB`` for people."""
    return f"{value_bytes / GIB:.1f} GiB"
