"""A linear layer with its GELU in one kernel: on a real GPU as near to the exact result as two kernels, at any size."""

import pytest
import torch
import torch.nn.functional as F
from wan_sharded.engine.parallel.functions import can_compile
from wan_sharded.engine.transformer.fused_gelu import linear_gelu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_as_near_as_two_kernels(dtype: torch.dtype, compiled: bool) -> None:
    if compiled and not can_compile():
        pytest.skip("cannot compile here")

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear_gelu(x * 2, weight, bias) + 1

    function = torch.compile(layer, fullgraph=True, dynamic=True) if compiled else layer
    for batch, tokens, width, out in ((1, 300, 64, 128), (2, 7, 48, 13), (1, 1, 5, 3), (3, 129, 256, 512)):
        x, weight, bias = (torch.randn(shape, device="cuda", dtype=dtype) for shape in ((batch, tokens, width), (out, width), (out,)))
        with torch.inference_mode():
            got = function(x, weight / width**0.5, bias)
            plain = F.gelu(F.linear(x * 2, weight / width**0.5, bias), approximate="tanh") + 1
        exact = F.gelu(F.linear(x.double() * 2, (weight / width**0.5).double(), bias.double()), approximate="tanh") + 1
        errors = [float((found.double() - exact).norm() / exact.norm()) for found in (got, plain)]
        assert got.shape == plain.shape and got.dtype == dtype
        # Of few values, either may be the nearer one.
        bound = 1.05 * errors[1] if got.numel() > 10**5 else torch.finfo(dtype).eps
        assert errors[0] <= bound, (batch, tokens, width, out, errors)
