"""Machines for plans: imagined GPUs, and sliders that leave a wanted number of bytes for weights."""

from collections.abc import Sequence
from pathlib import Path

from wan_sharded.engine.checkpoints.diffusers_folder import open_diffusers_folder
from wan_sharded.engine.checkpoints.stored import EXPERT_WORDS, HIGH_NOISE
from wan_sharded.engine.planning.budgets import CONTEXT_BYTES
from wan_sharded.engine.planning.devices import GIB, DeviceInfo, Machine
from wan_sharded.engine.planning.footprint import VideoShape, transformer_activation_bytes
from wan_sharded.engine.weights.expert import Expert
from wan_sharded.engine.weights.precision import resolve_precision


def gpu(index: int, total_gib: float = 64, free_gib: float | None = None, torch_device: str | None = None) -> DeviceInfo:
    """A GPU nobody has. Its torch device is ``imagined_gpus``' unless given."""
    free = total_gib if free_gib is None else free_gib
    return DeviceInfo(index, "Imagined", torch_device or f"lazy:{index}", int(total_gib * GIB), int(free * GIB))


def machine(*devices: DeviceInfo, host_gib: float = 64) -> Machine:
    return Machine(devices, int(host_gib * GIB))


def imagined_machine(count: int, *, all_cpu: bool = False) -> Machine:
    """``count`` roomy GPUs; with ``all_cpu``, torch knows each of them as the CPU, and none needs ``ImaginedGpus``."""
    return machine(*(gpu(index, torch_device="cpu" if all_cpu else None) for index in range(count)))


class TinyExpert:
    """What a tiny checkpoint's expert takes, and the sliders that make it split."""

    def __init__(self, checkpoint: Path, weight_dtype: str = "fp32"):
        folder = open_diffusers_folder(checkpoint)
        files = folder.experts[HIGH_NOISE]
        self.precision, _ = resolve_precision(weight_dtype, files.stored_dtype, on_gpu=True)
        expert = Expert(EXPERT_WORDS[HIGH_NOISE], files, self.precision)
        config = expert.model.config
        self.width = config.num_attention_heads * config.attention_head_dim
        self.widened_bytes = expert.widened_bytes()
        self.sizes = expert.sizes()
        self.total_bytes = sum(self.sizes.values())
        self.block_bytes = max(size for part, size in self.sizes.items() if part.startswith("blocks."))

    def slider_gib(self, shape: VideoShape, weights_bytes: float) -> float:
        """The slider that leaves so many bytes for weights at a size."""
        activations = transformer_activation_bytes(shape, self.width, self.precision.dtype.itemsize, widened_bytes=self.widened_bytes)
        return (CONTEXT_BYTES + activations + weights_bytes + 8) / GIB

    def sliders(self, shape: VideoShape, rooms_bytes: Sequence[float]) -> dict[int, float]:
        return {index: self.slider_gib(shape, room) for index, room in enumerate(rooms_bytes)}
