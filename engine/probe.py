"""The one place that asks torch and the system what hardware there is. Gives plain values."""

import os
import shutil
import subprocess
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

from . import usable
from .planning.devices import DeviceInfo, Links, Machine
from .planning.footprint import FRAGMENTATION, FRAGMENTATION_ASYNC, FRAGMENTATION_NATIVE
from .speeds import measured_copy, measured_speeds, measured_together
from .system_memory import system_memory
from .transformer.low_precision import multiplied_rows, quantized_rows


def short_name(name: str) -> str:
    """The driver's name without the maker: "NVIDIA GeForce RTX 3060" -> "RTX 3060"."""
    for word in ("NVIDIA ", "GeForce ", "AMD ", "Radeon "):
        name = name.replace(word, "")
    return name.strip()


@dataclass(frozen=True)
class VisibleGpu:
    """A GPU this process may use: torch's own index, the short name, total bytes."""

    torch_index: int
    name: str
    total_bytes: int


@lru_cache(maxsize=1)
def visible_gpus() -> tuple[VisibleGpu, ...]:
    """The usable GPUs in PCI bus order. Cached: schemas ask at every request, and GPUs don't come and go.

    torch counts the fastest GPU first unless ``CUDA_DEVICE_ORDER`` was set before CUDA started, which inside ComfyUI is
    too early for a node pack; so the order is made here.
    """
    if not torch.cuda.is_available():
        return ()
    found = [(torch.cuda.get_device_properties(i), i) for i in range(torch.cuda.device_count())]
    found = [(properties, i) for properties, i in found if _has_kernels(i)]
    if os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        found.sort(key=lambda pair: tuple(getattr(pair[0], f"pci_{part}_id", 0) for part in ("domain", "bus", "device")))
    return tuple(VisibleGpu(index, short_name(properties.name), int(properties.total_memory)) for properties, index in found)


def _has_kernels(torch_index: int) -> bool:
    return usable.has_kernels(torch.cuda.get_device_capability(torch_index), torch.cuda.get_arch_list())


@lru_cache(maxsize=1)
def unusable_gpus() -> tuple[str, ...]:
    """Names of GPUs that this torch shows, but has no kernels for: too old for it, or too new."""
    if not torch.cuda.is_available():
        return ()
    return tuple(short_name(torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count()) if not _has_kernels(i))


def warnings_without_measuring() -> tuple[str, ...]:
    """What people should know of this machine's GPUs, in sentences; at no cost."""
    unusable = tuple(
        f"{name} is left out: torch {torch.__version__} has no kernels for a GPU of its generation. Another version of torch may have."
        for name in unusable_gpus()
    )
    return (*hidden_gpu_warning(), *unusable, *usable.other_accelerator_warning())


def warnings() -> tuple[str, ...]:
    """The same, and whether copies between GPUs arrive, which is tried once."""
    gpus = [(index, torch.device(f"cuda:{gpu.torch_index}")) for index, gpu in enumerate(visible_gpus())]
    broken = tuple(
        f"What GPU {a} sends to GPU {b} directly arrives changed, though the driver says that they reach each other's memory. It goes through "
        "system memory instead, which is slower; an IOMMU or PCIe access control in the computer's BIOS can be the reason."
        for a, one in gpus
        for b, other in gpus
        if a != b and torch.cuda.can_device_access_peer(one, other) and not usable.copies_arrive(one, other)
    )
    return (*warnings_without_measuring(), *broken)


def probe_machine() -> Machine:
    """The visible GPUs with their free memory now, or the CPU where there is no GPU."""
    memory = system_memory()
    free_by_bus = free_by_driver()
    devices = tuple(_device(index, gpu, free_by_bus) for index, gpu in enumerate(visible_gpus()))
    if not devices:
        devices = (DeviceInfo(0, "CPU", "cpu", memory.total, memory.available, is_gpu=False),)
    return Machine(devices, memory.available, warnings(), fragmentation(), memory.total, links_between(devices))


def _device(index: int, gpu: VisibleGpu, free_by_bus: Mapping[int, int]) -> DeviceInfo:
    speed, link = measured_speeds(gpu.torch_index)
    free, _ = torch.cuda.mem_get_info(gpu.torch_index)
    bus = getattr(torch.cuda.get_device_properties(gpu.torch_index), "pci_bus_id", -1)
    free = min(free, free_by_bus.get(bus, free))
    unused = torch.cuda.memory_reserved(gpu.torch_index) - torch.cuda.memory_allocated(gpu.torch_index)
    capability = torch.cuda.get_device_capability(gpu.torch_index)
    torch_device = f"cuda:{gpu.torch_index}"
    return DeviceInfo(index, gpu.name, torch_device, gpu.total_bytes, int(free + unused), capability, True, speed, link)


def free_by_driver(*, windows: bool = os.name == "nt") -> dict[int, int]:
    """PCI bus -> free bytes of a GPU as the driver's tool has it, on Windows; nothing elsewhere.

    There CUDA leaves out what other programs hold, and what goes beyond is not refused but put into system memory, many times slower.
    """
    lines = _nvidia_smi("pci.bus_id,memory.free", "noheader,nounits") if windows else ()
    free: dict[int, int] = {}
    for line in lines:
        place, _, mib = line.partition(",")
        if place.count(":") == 2 and mib.strip().isdigit():  # 00000000:01:00.0, 10240
            free[int(place.split(":")[1], 16)] = int(mib) * 1024**2
    return free


def links_between(devices: Iterable[DeviceInfo]) -> Links:
    """How fast bytes travel where these GPUs work together; measured once."""
    gpus = [device for device in devices if device.is_gpu]
    if len(gpus) < 2:
        return Links()
    ends = {device.index: torch.device(device.torch_device) for device in gpus}
    pairs = [(a, b) for a in ends for b in ends if a != b and reach_each_other(ends[a], ends[b])]
    direct = {(a, b): speed for a, b in pairs if (speed := measured_copy(ends[a], ends[b]))}
    own = [(ends[device.index], device.link_bytes_per_s) for device in gpus]
    known = [(device, speed) for device, speed in own if speed]
    return Links(direct, measured_together(known) if len(known) == len(gpus) else None)


@lru_cache(maxsize=64)
def multiplies_few_bits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU multiplies int8 or float8 matrices as they are, faster than in half precision; asked of the GPU itself, once."""
    least = {torch.int8: (8, 0), torch.float8_e4m3fn: (8, 9)}
    if device.type != "cuda" or dtype not in least or torch.cuda.get_device_capability(device) < least[dtype]:
        return False
    x = torch.ones(32, 64, device=device, dtype=torch.bfloat16)
    weight, scale = quantized_rows(torch.ones(48, 64, device=device), dtype)
    try:
        result = multiplied_rows(x, weight, scale, None)
        return bool(((result - 64).abs() < 1).all())
    except (RuntimeError, NotImplementedError):
        return False


def is_cuda(torch_device: str) -> bool:
    """Whether CUDA's functions apply to a device; not to the CPU, nor to a device a test imagines."""
    return torch.device(torch_device).type == "cuda"


def multiprocessors(torch_device: str) -> int:
    """How many of them a GPU has; 1 for the CPU."""
    return int(torch.cuda.get_device_properties(torch_device).multi_processor_count) if is_cuda(torch_device) else 1


def reach_each_other(one: torch.device, other: torch.device) -> bool:
    """Whether two devices can copy to each other's memory directly; no two GeForce cards can."""
    both = is_cuda(str(one)) and is_cuda(str(other))
    return not both or one == other or (bool(torch.cuda.can_device_access_peer(one, other)) and usable.copies_arrive(one, other))


def allocated_bytes(torch_device: str) -> int:
    """What this process's tensors take on a device now; 0 for the CPU."""
    return _allocator_bytes(torch_device, "allocated_bytes") if is_cuda(torch_device) else 0


def _allocator_bytes(torch_device: str, what: str) -> int:
    """What torch's allocator says of a GPU, without putting all else that it says in order, which takes a few times as long."""
    stats = torch.cuda.memory_stats_as_nested_dict(torch_device)
    return int(stats[what]["all"]["current"]) if stats else 0


def reset_peak(torch_device: str) -> None:
    """Begin a new measurement of :func:`peak_bytes`."""
    if is_cuda(torch_device):
        torch.cuda.reset_peak_memory_stats(torch_device)


def peak_bytes(torch_device: str) -> int:
    """The most the allocator has held on a device since :func:`reset_peak`, cached blocks included; 0 for the CPU."""
    return int(torch.cuda.max_memory_reserved(torch_device)) if is_cuda(torch_device) else 0


def synchronize(torch_device: str) -> None:
    """Wait until a device has done what was asked of it."""
    if is_cuda(torch_device):
        torch.cuda.synchronize(torch_device)


def wait_for_stream(torch_device: str) -> None:
    """Wait until a device has done what was asked of it in the caller's current stream."""
    if is_cuda(torch_device):
        torch.cuda.current_stream(torch_device).synchronize()


def fragmentation() -> float:
    """What torch's allocator holds at a peak, over what is allocated; by the kind of allocator in use."""
    if not torch.cuda.is_available():
        return FRAGMENTATION
    if torch.cuda.get_allocator_backend() == "cudaMallocAsync":
        return FRAGMENTATION_ASYNC
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
    return FRAGMENTATION if "expandable_segments:True" in settings else FRAGMENTATION_NATIVE


def trim(torch_device: str, ceiling_bytes: int) -> None:
    """Give unused blocks back if the allocator holds more than it should on a device. Waits for the device if so."""
    if is_cuda(torch_device) and _allocator_bytes(torch_device, "reserved_bytes") > ceiling_bytes:
        torch.cuda.synchronize(torch_device)
        torch.cuda.empty_cache()


@contextmanager
def capped(limits: Mapping[str, int]) -> Generator[None, None, None]:
    """Hold torch's own allocator to limits: it reuses and gives back before it takes more, and raises rather than go over.

    CUDA's pool (ComfyUI's default) only counts what is allocated against such a limit; :func:`trim` is what holds it.

    Args:
        limits: torch device -> bytes, the most to be reserved there.
    """
    devices = [device for device in limits if is_cuda(device)]
    # Older versions of torch can't say what was set; then nothing was.
    read = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    before = {device: read(device) for device in devices}
    try:
        for device in devices:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limits[device] / total), device)
        yield
    finally:
        for device in devices:
            torch.cuda.set_per_process_memory_fraction(before[device], device)


def release_cached(torch_devices: Iterable[str]) -> None:
    """Give the allocator's unused blocks back to the driver."""
    if any(is_cuda(device) for device in torch_devices):
        torch.cuda.empty_cache()


@lru_cache(maxsize=1)
def installed_gpus() -> tuple[str, ...]:
    """Names of the GPUs the driver sees, visible to this process or not; empty where nvidia-smi is missing."""
    return tuple(short_name(line) for line in _nvidia_smi("name", "noheader"))


def _nvidia_smi(query: str, form: str) -> tuple[str, ...]:
    """The driver's tool's answer, line by line; nothing where it is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    no_window = getattr(subprocess, "CREATE_NO_WINDOW", 0)
    command = [tool, f"--query-gpu={query}", f"--format=csv,{form}"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=10, creationflags=no_window)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    lines = [line.strip() for line in listed.stdout.splitlines()] if listed.returncode == 0 else []
    return tuple(line for line in lines if line)


def hidden_gpu_warning() -> tuple[str, ...]:
    """Says so when the driver sees more GPUs than this process may use."""
    installed, visible = installed_gpus(), len(visible_gpus()) + len(unusable_gpus())
    if len(installed) <= visible:
        return ()
    return (
        f"This computer has {len(installed)} GPUs ({', '.join(installed)}) but only {visible} can be used here. "
        "Start ComfyUI with --cuda-device all (newer versions on Windows show only the first GPU otherwise), "
        "and check CUDA_VISIBLE_DEVICES.",
    )
