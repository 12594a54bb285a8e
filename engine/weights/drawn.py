"""Experts whose weights no file holds: random ones, drawn where they are wanted. For measuring without a model.

Weights follow from their names, so that every process and device draws the same ones.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel

from ..checkpoints.stored import INPUT_CHANNELS, LATENT_CHANNELS, ComponentFiles, StoredTensor
from .pieces import Stretch
from .reading import Reading, TensorReader

# What sets Wan 2.2 I2V A14B's experts apart from diffusers' default configuration, which is Wan's 14B shape otherwise.
WAN_14B = {"in_channels": INPUT_CHANNELS, "out_channels": LATENT_CHANNELS, "text_dim": 4096}
NOWHERE = Path("drawn")
_SIZES = {"F32": 4, "BF16": 2}


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
    """In the place of files.

    Args:
        device: that draws.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device

    def all_mapped(self, wanted: Sequence[StoredTensor]) -> dict[StoredTensor, torch.Tensor]:
        return {stored: draw(stored.key, stored.shape, self._device, torch.bfloat16).cpu() for stored in wanted}

    def begin(self, wanted: Sequence[tuple[StoredTensor, torch.Tensor | Stretch]], *, urgent: bool = False) -> Reading:
        for stored, target in wanted:
            Stretch.of(target).view().copy_(draw(stored.key, stored.shape, self._device, torch.bfloat16).reshape(-1).view(torch.uint8))
        return Reading()


def drawn(name: str, shape: Any, dtype: str = "BF16") -> StoredTensor:
    """A tensor that is drawn rather than read; ``dtype`` other than bf16 is for plans only."""
    return StoredTensor(NOWHERE, name, dtype, tuple(shape), 0, _SIZES[dtype] * torch.Size(shape).numel())


def drawn_component(dtype: str = "BF16", **changes: Any) -> ComponentFiles:
    """An expert of the 14B shape as files would describe it.

    Args:
        dtype: as it would be stored, "BF16" or "F32".
        changes: to ``WanTransformer3DModel``'s configuration.
    """
    config: Any = {**WAN_14B, **changes}
    with init_empty_weights():
        model: Any = WanTransformer3DModel(**config)
    tensors = {name: drawn(name, parameter.shape, dtype) for name, parameter in model.named_parameters()}
    return ComponentFiles("random/transformer", dict(model.config), tensors)
