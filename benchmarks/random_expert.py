"""One expert of the real 14B shape with random weights that no file holds, as this pack and as diffusers load it.

Weights follow from their names, so that every process and device draws the same ones.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from wan_sharded.engine.checkpoints.lora import LoraChoice, LoraFile, LowRank
from wan_sharded.engine.checkpoints.stored import ComponentFiles, StoredTensor
from wan_sharded.engine.weights.expert import Expert
from wan_sharded.engine.weights.precision import Precision
from wan_sharded.engine.weights.reading import TensorReader

WAN_14B = {"in_channels": 36, "out_channels": 16, "text_dim": 4096}
NOWHERE = Path("drawn")


def draw(name: str, shape: Any, device: Any, dtype: torch.dtype) -> torch.Tensor:
    """Values that keep signals of ordinary size: matrices by their fan-in, norms near one, biases small."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32)
    if "norm" in name:
        values = 1 + 0.1 * values
    elif len(shape) > 1:
        values /= max(1, torch.Size(shape)[1:].numel()) ** 0.5
    else:
        values *= 0.02
    return values.to(torch.bfloat16).to(dtype)  # the same numbers in every precision


class DrawnReader(TensorReader):
    """In the place of files."""

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device

    def mapped(self, stored: StoredTensor) -> torch.Tensor:
        return draw(stored.key, stored.shape, self._device, torch.bfloat16).cpu()

    def on_device(self, stored: StoredTensor, device: torch.device) -> torch.Tensor:
        return draw(stored.key, stored.shape, self._device, torch.bfloat16).to(device)

    def read_into(self, wanted: Sequence[tuple[StoredTensor, torch.Tensor]]) -> None:
        for stored, target in wanted:
            target.copy_(draw(stored.key, stored.shape, self._device, torch.bfloat16).reshape(-1).view(torch.uint8))


def drawn(name: str, shape: Any) -> StoredTensor:
    return StoredTensor(NOWHERE, name, "BF16", tuple(shape), 0, 2 * torch.Size(shape).numel())


def random_expert(device: torch.device, *, num_layers: int = 40, precision: Precision | None = None, **changes: Any) -> Expert:
    """This pack's expert, its weights nowhere yet; ``bring`` draws them on ``device``."""
    config = {**WAN_14B, "num_layers": num_layers, **changes}
    with init_empty_weights():
        model: Any = WanTransformer3DModel(**config)
    tensors = {name: drawn(name, p.shape) for name, p in model.named_parameters()}
    files = ComponentFiles("random/transformer", dict(model.config), tensors)
    return Expert("random expert", files, precision or Precision(torch.bfloat16, torch.bfloat16), reader=DrawnReader(device))


def random_lora(expert: Expert, rank: int = 64, strength: float = 1.0) -> LoraChoice:
    """A LoRA for all of the blocks' matrices, as the 4-step ones are."""
    matrices = [name for name in expert.files.tensors if name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name]
    shapes = {name.removesuffix(".weight"): expert.files.tensors[name].shape for name in matrices}
    pairs = {
        name: LowRank(drawn(f"{name}.down", (rank, shape[1])), drawn(f"{name}.up", (shape[0], rank)), 0.125)
        for name, shape in shapes.items()
    }
    return LoraChoice(LoraFile(NOWHERE, "random", pairs, {}), strength)


def diffusers_model(device: Any, *, num_layers: int = 40, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """diffusers' own model with the same weights, each part on the device that ``device(name)`` gives, or all on one."""
    with init_empty_weights(include_buffers=False):
        model: Any = WanTransformer3DModel(**{**WAN_14B, "num_layers": num_layers, **changes}).eval().requires_grad_(False)
    kept = set(model._keep_in_fp32_modules)
    for name, parameter in list(model.named_parameters()):
        where = device(name) if callable(device) else device
        owner = model.get_submodule(name.rpartition(".")[0])
        wanted = torch.float32 if kept.intersection(name.split(".")) else dtype
        owner._parameters[name.rpartition(".")[2]] = torch.nn.Parameter(draw(name, parameter.shape, where, wanted), requires_grad=False)
    if not callable(device):
        model.rope.to(device)
    return model


def random_inputs(
    width: int, height: int, frames: int, device: Any, dtype: torch.dtype, seed: int = 0, channels: int = 36, text_dim: int = 4096
) -> dict[str, torch.Tensor]:
    """Fresh random inputs of one forward, batch 1."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, channels, (frames - 1) // 4 + 1, height // 8, width // 8, generator=generator)
    text = torch.randn(1, 512, text_dim, generator=generator)
    return {
        "hidden_states": latents.to(device, dtype),
        "timestep": torch.tensor([900 - seed % 800], device=device),
        "encoder_hidden_states": text.to(device, dtype),
    }
