"""Tensors from device to device, torchao's quantized ones included.

torchao's tensors refuse ``.to`` under inference mode (torchao 0.18), which is where ComfyUI runs everything. What is
inside them are plain tensors, and those move.
"""

import torch

from .packing import take_apart


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors inside a tensor; of a plain one, itself."""
    return take_apart(tensor)[0]


def moved(tensor: torch.Tensor, device: torch.device, *, copy: bool = False) -> torch.Tensor:
    """The tensor on a device, same kind, same bits.

    Args:
        tensor: plain or quantized.
        device: where to.
        copy: never the same memory, even on the same device.
    """
    pieces, rebuild = take_apart(tensor)
    return rebuild(iter([piece.to(device, copy=copy) for piece in pieces]))
