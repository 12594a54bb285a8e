"""Checkpoints that are only described: what a model's files would hold, with no files."""

from pathlib import Path

import torch
from torch import nn
from wan_sharded.engine.checkpoints.stored import ComponentFiles, StoredTensor
from wan_sharded.engine.planning.placement import parts_of
from wan_sharded.engine.weights.adapters import Adapters
from wan_sharded.engine.weights.keeping import Keeper
from wan_sharded.engine.weights.packing import Layout
from wan_sharded.engine.weights.precision import Precision, parameter_forms
from wan_sharded.engine.weights.reading import TensorReader

BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}


def described(model: nn.Module, dtype: str = "BF16", name: str = "described/transformer") -> ComponentFiles:
    """A model's parameters as files would have them."""
    tensors = {
        key: StoredTensor(Path("nowhere"), key, dtype, tuple(p.shape), 0, p.numel() * BYTES[dtype]) for key, p in model.named_parameters()
    }
    return ComponentFiles(name, dict(getattr(model, "config", {})), tensors)


def part_sizes(model: nn.Module, precision: Precision) -> dict[str, int]:
    """Bytes of every part in memory, in the order they compute."""
    files = described(model)
    keeper = Keeper(model, files, precision, TensorReader())
    sizes = {}
    for part in parts_of(model):
        names = [name for name in files.tensors if name == part or name.startswith(f"{part}.")]
        sizes[part] = Layout(keeper.specs(part, names, Adapters())[0]).total_bytes
    return sizes


def dtypes_of(model: nn.Module, precision: Precision) -> dict[str, torch.dtype]:
    """The dtype of every parameter's values in memory."""
    return {name: form.dtype for name, form in parameter_forms(model, described(model).tensors, precision).items()}
