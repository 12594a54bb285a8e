"""A linear layer and the GELU after it in one kernel, which saves reading and writing what stands between them: the largest tensor of a block.

cuBLAS does that when asked, and rounds once where two kernels round twice. Torch's compiler takes the two apart again, so it is an
operation of our own to it.
"""

import torch

_NAME = "wan_sharded::linear_gelu"
# Not to the oldest torch that the pack runs with.
_KNOWN = hasattr(torch.library, "register_fake")


def can_fuse(x: torch.Tensor) -> bool:
    """Whether to: where blocks are compiled, so that plain ones stay equal to diffusers' own to the last bit; on NVIDIA's GPUs, in 16 bits.

    In float32 cuBLAS's GELU is less exact than torch's.
    """
    return _KNOWN and torch.compiler.is_compiling() and x.is_cuda and x.dtype.itemsize == 2 and torch.version.hip is None


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``gelu(linear(x, weight, bias))``, with GELU's tanh form.

    Args:
        x: [..., in], bf16 or fp16, on a GPU.
        weight: [out, in] of its dtype.
        bias: [out].

    Returns:
        [..., out].
    """
    return torch.ops.wan_sharded.linear_gelu.default(x, weight, bias)


def _fused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).unflatten(0, x.shape[:-1])


def _shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


if _KNOWN and not hasattr(torch.ops.wan_sharded, "linear_gelu"):  # another copy of this pack may have been there first
    torch.library.define(_NAME, "(Tensor x, Tensor weight, Tensor bias) -> Tensor")
    torch.library.impl(_NAME, "cuda", _fused)
    torch.library.register_fake(_NAME, _shape)
