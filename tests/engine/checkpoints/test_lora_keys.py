"""Which weight each program's spelling of a key is about, and which keys are about none of a Wan 2.2 expert's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_loras import expert_shapes, write_lora
from wan_sharded.engine.checkpoints.lora import check_fits, open_lora_file
from wan_sharded.engine.checkpoints.lora_keys import ALPHA, DIFFERENCE, DOWN, UP, Target, target_of

KEYS = {
    "diffusion_model.blocks.12.cross_attn.o.lora_A.weight": Target(DOWN, "blocks.12.attn2.to_out.0"),
    "base_model.model.diffusion_model.blocks.12.cross_attn.o.lora_B.my-name_2.weight": Target(UP, "blocks.12.attn2.to_out.0"),
    "blocks.0.self_attn.q.lora_A": Target(DOWN, "blocks.0.attn1.to_q"),
    "pipe.dit.blocks.3.ffn.2.lora_B.default.weight": Target(UP, "blocks.3.ffn.net.2"),
    "lora_unet_blocks_39_self_attn_o.lora_down.weight": Target(DOWN, "blocks.39.attn1.to_out.0"),
    "lora_unet__blocks_0_cross_attn_k.lora_up.weight": Target(UP, "blocks.0.attn2.to_k"),
    "lycoris_blocks_0_ffn_net_0_proj.lora_up.weight": Target(UP, "blocks.0.ffn.net.0.proj"),
    "lora_transformer_blocks_1_attn1_to_out_0.alpha": Target(ALPHA, "blocks.1.attn1.to_out.0"),
    "lora_unet_time_embedding_0.alpha": Target(ALPHA, "condition_embedder.time_embedder.linear_1"),
    "transformer.condition_embedder.text_embedder.linear_2.lora.up.weight": Target(UP, "condition_embedder.text_embedder.linear_2"),
    "diffusion_model.head.head.diff": Target(DIFFERENCE, "proj_out.weight"),
    "diffusion_model.head.head.diff_b": Target(DIFFERENCE, "proj_out.bias"),
    "diffusion_model.head.diff_m": Target(DIFFERENCE, "scale_shift_table"),
    "diffusion_model.head.modulation.diff": Target(DIFFERENCE, "scale_shift_table"),
    "diffusion_model.blocks.7.diff_m": Target(DIFFERENCE, "blocks.7.scale_shift_table"),
    "diffusion_model.blocks.7.modulation.diff": Target(DIFFERENCE, "blocks.7.scale_shift_table"),
    "diffusion_model.blocks.7.norm3.diff_b": Target(DIFFERENCE, "blocks.7.norm2.bias"),
    "diffusion_model.blocks.7.self_attn.norm_q.diff": Target(DIFFERENCE, "blocks.7.attn1.norm_q.weight"),
    "diffusion_model.blocks.7.self_attn.q.bias.diff": Target(DIFFERENCE, "blocks.7.attn1.to_q.bias"),
    "diffusion_model.blocks.7.self_attn.q.weight.diff": Target(DIFFERENCE, "blocks.7.attn1.to_q.weight"),
    "diffusion_model.patch_embedding.diff": Target(DIFFERENCE, "patch_embedding.weight"),
    "diffusion_model.time_projection.1.diff_b": Target(DIFFERENCE, "condition_embedder.time_proj.bias"),
    "lora_unet_blocks_0_norm3.diff": Target(DIFFERENCE, "blocks.0.norm2.weight"),
}
FOREIGN_KEYS = [
    "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight",  # image layers of Wan 2.1
    "lora_unet_blocks_0_cross_attn_v_img.lora_up.weight",
    "diffusion_model.blocks.0.cross_attn.norm_k_img.diff",
    "diffusion_model.img_emb.proj.1.diff_b",
    "diffusion_model.blocks.0.self_attn.norm_q.diff_b",  # that norm has no bias
    "diffusion_model.blocks.0.modulation.lora_down.weight",
    "diffusion_model.blocks.0.self_attn.diff_m",
    "diffusion_model.blocks.0.self_attn.q.weight",
    "diffusion_model.blocks.0.self_attn.q.lora_down.bias.weight.x",
    "diffusion_model.vace_blocks.0.self_attn.q.lora_down.weight",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    "lora_unet_blocks_1234567_self_attn_q.alpha",
    "lora_unet_blocks_٣_self_attn_q.alpha",
    "blocks.-1.self_attn.q.alpha",
    "diffusion_model.alpha",
    ".alpha",
    "alpha",
    "_" * 5000 + ".alpha",
    "",
]


@pytest.mark.parametrize("key", KEYS)
def test_keys(key: str) -> None:
    assert target_of(key) == KEYS[key]


@pytest.mark.parametrize("key", FOREIGN_KEYS)
def test_keys_of_no_weight(key: str) -> None:
    assert target_of(key) is None


def test_what_matches_nothing_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shapes = expert_shapes(tiny_checkpoint / "transformer")
    file = write_lora(tmp_path / "a.safetensors", shapes, differences=True)
    foreign = [key for key in FOREIGN_KEYS if key]
    save_file({**load_file(file), **{key: torch.zeros(3) for key in foreign}}, file)
    lora = open_lora_file(file)
    assert set(lora.unmatched) == set(foreign)
    check_fits(lora, shapes, "high noise expert")
