"""Tensors from device to device, torchao's quantized ones included.

torchao's tensors refuse ``.to`` under inference mode (torchao 0.18), which is where ComfyUI runs everything. What is
inside them are plain tensors, and those move.
"""

import torch


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors inside a tensor; of a plain one, itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [inner for name in names for inner in inner_tensors(getattr(tensor, name))]


def moved(tensor: torch.Tensor, device: torch.device, *, copy: bool = False) -> torch.Tensor:
    """The tensor on a device, same kind, same bits.

    Args:
        tensor: plain or quantized.
        device: where to.
        copy: never the same memory, even on the same device.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.to(device, copy=copy)
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = {name: moved(getattr(tensor, name), device, copy=copy) for name in names}
    return type(tensor).__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())  # type: ignore[attr-defined]
