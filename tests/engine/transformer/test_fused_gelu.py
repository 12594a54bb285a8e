"""What of the fused layer there is to see without a GPU; that it computes the same is in tests/gpu/test_fused_gelu.py."""

import importlib

import torch
import torch.nn.functional as F
from wan_sharded.engine.transformer import fused_gelu
from wan_sharded.engine.transformer.fused_gelu import can_fuse, linear_gelu
from wan_sharded.engine.transformer.wan_block import _linear_gelu


def test_the_compiler_knows_its_shape() -> None:
    for shape in ((2, 5, 8), (7, 8), (8,)):
        x, weight, bias = (torch.empty(size, device="meta", dtype=torch.bfloat16) for size in (shape, (3, 8), (3,)))
        made = linear_gelu(x, weight, bias)
        assert made.shape == (*shape[:-1], 3) and made.dtype == torch.bfloat16


def test_another_copy_of_the_pack_is_no_harm() -> None:
    importlib.reload(fused_gelu)


def test_the_cpu_computes_as_ever() -> None:
    """Compiled too: there is no such kernel."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((2, 5, 8), (3, 8), (3,)))
    weights = {"proj.weight": weight, "proj.bias": bias}
    expected = F.gelu(F.linear(x, weight, bias), approximate="tanh")

    def fused_here(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        return _linear_gelu(weights, "proj", x), can_fuse(x)

    for function in (fused_here, torch.compile(fused_here, backend="eager", fullgraph=True)):
        got, fused = function(x)
        assert not fused and torch.equal(got, expected)
