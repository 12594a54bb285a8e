"""The real shape of a Wan 2.2 14B expert, without its weights."""

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from wan_sharded.engine.weights.precision import Precision

PRECISIONS = {
    "bf16": Precision(torch.bfloat16, torch.bfloat16),
    "fp8_e4m3fn": Precision(torch.bfloat16, torch.float8_e4m3fn),
    "int8": Precision(torch.bfloat16, torch.int8),
}


@pytest.fixture(scope="session")
def wan_14b() -> WanTransformer3DModel:
    """40 blocks, 40 heads of 128, on the meta device: 14.3 billion parameters."""
    with init_empty_weights(include_buffers=False):
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=40,
            attention_head_dim=128,
            in_channels=36,
            out_channels=16,
            text_dim=4096,
            freq_dim=256,
            ffn_dim=13824,
            num_layers=40,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=1024,
        )


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> Precision:
    return PRECISIONS[request.param]
