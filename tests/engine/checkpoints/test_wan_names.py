"""Wan's own names and diffusers': one by one, and all of a real file's against diffusers' model."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from wan_files import SMALL, i2v_21, i2v_expert
from wan_sharded.engine.checkpoints.wan_names import block_number, diffusers_name, without_prefix

PAIRS = {
    "patch_embedding.weight": "patch_embedding.weight",
    "time_embedding.0.bias": "condition_embedder.time_embedder.linear_1.bias",
    "time_embedding.2.weight": "condition_embedder.time_embedder.linear_2.weight",
    "time_projection.1.weight": "condition_embedder.time_proj.weight",
    "text_embedding.0.weight": "condition_embedder.text_embedder.linear_1.weight",
    "text_embedding.2.bias": "condition_embedder.text_embedder.linear_2.bias",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "img_emb.proj.0.weight": "condition_embedder.image_embedder.norm1.weight",
    "img_emb.proj.1.bias": "condition_embedder.image_embedder.ff.net.0.proj.bias",
    "img_emb.proj.3.weight": "condition_embedder.image_embedder.ff.net.2.weight",
    "img_emb.proj.4.weight": "condition_embedder.image_embedder.norm2.weight",
    "head.modulation": "scale_shift_table",
    "head.head.weight": "proj_out.weight",
    "blocks.0.modulation": "blocks.0.scale_shift_table",
    "blocks.12.self_attn.q.weight": "blocks.12.attn1.to_q.weight",
    "blocks.39.cross_attn.o.bias": "blocks.39.attn2.to_out.0.bias",
    "blocks.1.cross_attn.k_img.weight": "blocks.1.attn2.add_k_proj.weight",
    "blocks.1.cross_attn.v_img.bias": "blocks.1.attn2.add_v_proj.bias",
    "blocks.1.cross_attn.norm_k_img.weight": "blocks.1.attn2.norm_added_k.weight",
    "blocks.1.self_attn.norm_k.weight": "blocks.1.attn1.norm_k.weight",
    "blocks.1.norm3.weight": "blocks.1.norm2.weight",
    "blocks.1.ffn.0.weight": "blocks.1.ffn.net.0.proj.weight",
    "blocks.1.ffn.2.bias": "blocks.1.ffn.net.2.bias",
}


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("original", PAIRS)
def test_one_name(original: str, prefix: str) -> None:
    assert diffusers_name(prefix + original) == PAIRS[original]


@pytest.mark.parametrize("ours", PAIRS.values())
def test_diffusers_names_stay(ours: str) -> None:
    assert diffusers_name(ours) == ours


@pytest.mark.parametrize(
    ("module", "ours"),
    {
        "blocks.7.self_attn.v": "blocks.7.attn1.to_v",
        "blocks.7.cross_attn": "blocks.7.attn2",
        "blocks.7": "blocks.7",
        "diffusion_model.blocks.7.ffn.0.lora_A.weight": "blocks.7.ffn.net.0.proj.lora_A.weight",
        "head.head": "proj_out",
        "blocks.7.norm3.diff": "blocks.7.norm2.diff",
        "time_projection.1.alpha": "condition_embedder.time_proj.alpha",
    }.items(),
)
def test_modules_and_what_loras_put_behind_them(module: str, ours: str) -> None:
    assert diffusers_name(module) == ours


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn1.qkv.weight",  # begins with q
        "blocks.0.ffn.20.weight",
        "blocks.0.norm33.weight",
        "time_embedding.10.weight",
        "my_head.head.weight",
        "vace_blocks.0.modulation",
        "blocks.first.self_attn.q",
        "blocks.\u0663.self_attn.q",  # a digit, but none of ours
        "encoder.blocks.0.self_attn.q",
        "",
        ".",
        "blocks.",
    ],
)
def test_whole_segments_only(name: str) -> None:
    assert diffusers_name(name) == name


def test_every_name_and_shape_of_a_real_file() -> None:
    """The published file's 1,095 tensors are the parameters of diffusers' model, each once, of its shape."""
    described = i2v_expert()
    assert len(described) == 1095
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=40, attention_head_dim=128, in_channels=36, out_channels=16, ffn_dim=13824, num_layers=40
        )
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {diffusers_name(name): shape for name, (_, shape) in described.items()} == parameters
    assert {diffusers_name(name) for name in parameters} == parameters.keys()


def test_every_name_of_wan_21() -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=1, in_channels=36, text_dim=32, ffn_dim=256, num_layers=2, image_dim=1280, added_kv_proj_dim=128
        )
    names = {name for name, _ in model.named_parameters()}
    assert {diffusers_name(name) for name in i2v_21(**SMALL)} <= names


def test_parts_of_names() -> None:
    assert without_prefix("model.diffusion_model.head.head") == "head.head"
    assert without_prefix("blocks.0.diffusion_model.x") == "blocks.0.diffusion_model.x"
    assert [block_number(name) for name in ("blocks.12.x", "blocks.12", "blocks.x", "a.blocks.1", "blocks", "")] == [
        "12",
        "12",
        *[None] * 4,
    ]
