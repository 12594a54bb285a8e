"""Workers that share a device, experts from a model in memory, and buffers full of what nobody may read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from tiny_checkpoint import randomize
from wan_sharded.engine.checkpoints.diffusers_folder import open_diffusers_folder, weight_files
from wan_sharded.engine.checkpoints.safetensors_header import read_header
from wan_sharded.engine.checkpoints.stored import HIGH_NOISE, ComponentFiles
from wan_sharded.engine.parallel.crew import Crew, Share
from wan_sharded.engine.parallel.workers import Worker
from wan_sharded.engine.weights.expert import Expert
from wan_sharded.engine.weights.precision import Precision

CPU = torch.device("cpu")
F32 = Precision(torch.float32, torch.float32)
# 5 heads of 16; three blocks, the second of which is timed.
SMALL = {"num_attention_heads": 5, "attention_head_dim": 16, "text_dim": 32, "freq_dim": 32, "ffn_dim": 96, "num_layers": 3}


def saved_model(folder: Path, **changes: Any) -> tuple[WanTransformer3DModel, ComponentFiles]:
    """A small Wan transformer of any kind, and its files."""
    model = WanTransformer3DModel(**{**SMALL, "in_channels": 4, "out_channels": 4, **changes}).eval()
    randomize(model, torch.Generator().manual_seed(8))
    model.save_pretrained(folder)
    tensors = {name: entry for file in weight_files(folder) for name, entry in read_header(file).items()}
    return model, ComponentFiles(folder.name, dict(model.config), tensors)


def expert_of(files: ComponentFiles | Path, precision: Precision = F32, *, part: str = HIGH_NOISE) -> Expert:
    """An expert, none of it read yet, of a checkpoint or of a component's files."""
    return Expert(
        "high noise expert", files if isinstance(files, ComponentFiles) else open_diffusers_folder(files).experts[part], precision
    )


def on_cpu(expert: Expert, *, packed: bool | None = None) -> Expert:
    for part in expert.parts:
        expert.bring(part, CPU, CPU, packed=packed)
    return expert


def crew_of(
    workers: Sequence[Worker], speeds: Sequence[float] | None = None, *, main: int = 0, range_tokens: int = 0, timed: bool = True
) -> Crew:
    """A crew with speeds that count as measured; with ``timed`` off, the first forward measures them."""
    for worker in workers:
        worker.is_timed = timed
    shares = [
        Share(worker, speed, range_tokens=range_tokens) for worker, speed in zip(workers, speeds or [1.0] * len(workers), strict=True)
    ]
    return Crew(shares, workers[main])


def cpu_workers(count: int) -> list[Worker]:
    return [Worker(index, CPU) for index in range(count)]


def inputs(
    *,
    seed: int = 4,
    batch: int = 1,
    channels: int = 4,
    frames: int = 3,
    size: tuple[int, int] = (10, 14),
    per_token_timestep: bool = False,
    image_dim: int | None = None,
    text_tokens: int = 20,
) -> dict[str, Any]:
    """A forward's arguments; 105 tokens unless told."""
    generator = torch.Generator().manual_seed(seed)
    tokens = frames * (size[0] // 2) * (size[1] // 2)
    given = {
        "hidden_states": torch.randn(batch, channels, frames, *size, generator=generator),
        "timestep": torch.rand(batch, tokens, generator=generator) * 900 if per_token_timestep else torch.full((batch,), 700.0),
        "encoder_hidden_states": torch.randn(batch, text_tokens, 32, generator=generator),
    }
    if image_dim:
        given["encoder_hidden_states_image"] = torch.randn(batch, 7, image_dim, generator=generator)
    return given


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def poison(crew: Crew) -> None:
    """Nothing may read what the next forward has not written."""
    for exchange in crew._exchanges.values():
        for room in (*exchange.keys, *exchange.values):
            room.fill_(float("nan"))
    for slots in crew._slots.values():
        for slot in slots:
            slot.flat.fill_(255)
