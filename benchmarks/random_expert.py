"""One expert of the real 14B shape with random weights that no file holds, as this pack and as diffusers load it.

Weights follow from their names, so that every process and device draws the same ones.
"""

from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from wan_sharded.engine.checkpoints.lora import LoraChoice, LoraFile, LowRank
from wan_sharded.engine.weights.drawn import NOWHERE, WAN_14B, DrawnReader, draw, drawn, drawn_component
from wan_sharded.engine.weights.expert import Expert
from wan_sharded.engine.weights.precision import Precision


def random_expert(device: torch.device, *, num_layers: int = 40, precision: Precision | None = None, **changes: Any) -> Expert:
    """This pack's expert, its weights nowhere yet; ``bring`` draws them on ``device``."""
    files = drawn_component(num_layers=num_layers, **changes)
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
