"""Speeds that are measured without a model: a block of Wan's 14B shape with random weights, and the links between devices.

The block is computed by the code that computes a run's blocks, and timed as a run times them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .. import probe
from ..host_memory import host_buffer
from ..planning.devices import GIB, DeviceInfo
from ..planning.footprint import VideoShape
from ..planning.forecast import Work
from ..usable import BF16_CAPABILITY
from ..weights.drawn import DrawnReader, drawn_component
from ..weights.expert import Expert
from ..weights.precision import Precision
from .crew import Crew, Share
from .forward import ParallelForward
from .functions import BlockFunctions
from .links import make_link
from .workers import Worker

# On a GPU: two blocks of the 14B shape in half precision, drawn in float32 one matrix at a time, and some thousand tokens.
NEEDED_BYTES = 3 * GIB
GPU_SHAPE = VideoShape(512, 512, 13)
GPU_BLOCKS: dict[str, Any] = {"num_layers": 2}
# On the CPU something far smaller, which only shows that it works: a full block would take gigabytes and minutes.
CPU_SHAPE = VideoShape(64, 64, 5)
CPU_BLOCKS: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 4, "ffn_dim": 1024, "text_dim": 128}
TEXT_TOKENS = 512
# The first forward warms up, and measures the shares of a crew of one.
FORWARDS = 3
COPIED_BYTES = 128 * 1024**2
COPIES = 4


@dataclass(frozen=True)
class BlockSpeed:
    """One block on one device.

    Attributes:
        tokens: that were computed.
        width: D of the block: 5120 on GPUs.
        seconds: they took.
        tflops: what that is in operations.
    """

    tokens: int
    width: int
    seconds: float
    tflops: float


def measure_block(device: DeviceInfo) -> BlockSpeed:
    """A block's time on a device, alone there. What it allocates is let go.

    Raises:
        torch.OutOfMemoryError: a GPU has less than ``NEEDED_BYTES`` free.
    """
    where, shape, changes = torch.device(device.torch_device), GPU_SHAPE, GPU_BLOCKS
    dtype = torch.bfloat16 if (device.compute_capability or BF16_CAPABILITY) >= BF16_CAPABILITY else torch.float16
    if not device.is_gpu:
        shape, changes, dtype = CPU_SHAPE, CPU_BLOCKS, torch.float32
    try:
        with torch.inference_mode():
            return _measured_block(device, where, shape, changes, dtype)
    finally:
        probe.release_cached([device.torch_device])


def _measured_block(device: DeviceInfo, where: torch.device, shape: VideoShape, changes: dict[str, Any], dtype: torch.dtype) -> BlockSpeed:
    expert = Expert("random expert", drawn_component(**changes), Precision(dtype, dtype), reader=DrawnReader(where))
    try:
        for part in expert.parts:
            expert.bring(part, where, where)
        worker = Worker(device.index, where)
        crew = Crew([Share(worker, 1.0, multiply_few_bits=False)], worker)
        # Plain functions: compiling takes longer than all else here.
        call = ParallelForward(expert, crew, BlockFunctions(expert.math, compilable=False))
        for _ in range(FORWARDS):
            call(**_random_inputs(expert, shape, where, dtype))
        timing = call.latest_timings()[device.index]
    finally:
        for part in expert.parts:
            expert.drop(part)
    config: Any = expert.model.config
    work = Work.of(shape, width=expert.width, ffn_width=config.ffn_dim, blocks=1, element_bytes=dtype.itemsize)
    return BlockSpeed(timing.tokens, expert.width, timing.seconds, work.flops / timing.seconds / 1e12)


def _random_inputs(expert: Expert, shape: VideoShape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    config: Any = expert.model.config
    latents = (1, config.in_channels, shape.latent_frames, shape.height // 8, shape.width // 8)
    return {
        "hidden_states": torch.randn(latents, device=device, dtype=dtype),
        "timestep": torch.tensor([900], device=device),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, config.text_dim, device=device, dtype=dtype),
    }


def measure_link(source: torch.device, target: torch.device) -> float:
    """Bytes per second from one device to another, by the way that a run takes; the host is the CPU device.

    Raises:
        torch.OutOfMemoryError: a GPU has no room for the buffer.
    """
    ends = (source, target)
    try:
        memory = [
            host_buffer(COPIED_BYTES) if device.type == "cpu" else torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
            for device in ends
        ]
        link = make_link(source, target)
        for device in ends:
            probe.synchronize(str(device))  # the link's streams don't wait for who had this memory before

        def copy() -> None:
            link.copy(memory[1], memory[0], ())
            for device in ends:
                probe.synchronize(str(device))

        return COPIED_BYTES / _best_seconds(copy)
    finally:
        probe.release_cached(str(device) for device in ends)


def _best_seconds(action: Callable[[], None]) -> float:
    """The shortest of a few runs by the clock, after a warm-up; both ends of a copy are waited for, which one device's events can't tell."""
    seconds: list[float] = []
    for _ in range(1 + COPIES):
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return max(min(seconds[1:]), 1e-9)
