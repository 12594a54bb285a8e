"""What files are, by their tensors' names and shapes alone."""

import pytest
from wan_files import SMALL, Described, as_stored, fp8_scaled, i2v_21, i2v_expert
from wan_sharded.engine.checkpoints import recognise as kinds
from wan_sharded.engine.checkpoints.recognise import Kind, recognise, refusal
from wan_sharded.engine.checkpoints.wan_names import diffusers_name


def names(*keys: str, shape: tuple[int, ...] = (8, 8)) -> Described:
    return {key: ("BF16", shape) for key in keys}


def prefixed(described: Described, prefix: str) -> Described:
    return {prefix + name: value for name, value in described.items()}


T5 = ("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight", "encoder.final_layer_norm.weight")
UMT5 = (*T5, *(f"encoder.block.{n}.layer.0.SelfAttention.relative_attention_bias.weight" for n in (0, 1)), "spiece_model")
VAE_21 = {**names("decoder.middle.0.residual.0.gamma", "encoder.conv1.weight"), "conv2.weight": ("F32", (16, 16, 1, 1, 1))}
VAE_22 = {**VAE_21, "conv2.weight": ("F32", (48, 48, 1, 1, 1))}
VAE_DIFFUSERS = {**names("decoder.mid_block.resnets.0.norm1.gamma"), "post_quant_conv.weight": ("F32", (16, 16, 1, 1, 1))}
LORA = [f"diffusion_model.blocks.0.self_attn.q.{end}" for end in ("lora_A.weight", "lora_B.weight")]

EXPERTS: dict[str, Described] = {
    "the published expert": i2v_expert(),
    "a tiny one": i2v_expert(**SMALL),
    "fp8 with scales": fp8_scaled(**SMALL),
    "with a prefix": prefixed(i2v_expert(**SMALL), "model.diffusion_model."),
    "in diffusers' names": {diffusers_name(name): value for name, value in i2v_expert(**SMALL).items()},
    "an all-in-one checkpoint": {
        **prefixed(i2v_expert(**SMALL), "model.diffusion_model."),
        **prefixed(names(*UMT5), "text_encoders.umt5xxl.transformer."),
        **prefixed(VAE_21, "vae."),
    },
}

OTHERS: dict[str, tuple[Described, str]] = {
    "T2V": (i2v_expert(channels=16, **SMALL), "text-to-video"),
    "TI2V 5B": (i2v_expert(channels=48, out=48, **SMALL), "TI2V 5B"),
    "Fun Control": ({**i2v_expert(channels=52, **SMALL), **names("ref_conv.weight")}, "Fun Control"),
    "52 channels": (i2v_expert(channels=52, **SMALL), "52 channels"),
    "Wan 2.1 I2V": (i2v_21(**SMALL), "Wan 2.1 image-to-video"),
    "Wan 2.1 I2V in diffusers' names": ({diffusers_name(name): value for name, value in i2v_21(**SMALL).items()}, "Wan 2.1 image-to-video"),
    "VACE": ({**i2v_expert(channels=16, **SMALL), **names("vace_patch_embedding.weight", "vace_blocks.0.before_proj.weight")}, "VACE"),
    "Animate": ({**i2v_21(**SMALL), **names("face_adapter.fuser_blocks.0.k_norm.weight", "pose_patch_embedding.weight")}, "Animate"),
    "S2V": ({**i2v_expert(channels=16, **SMALL), **names("casual_audio_encoder.encoder.final_linear.weight")}, "S2V"),
    "HuMo": ({**i2v_expert(**SMALL), **names("audio_proj.audio_proj_glob_1.layer.bias")}, "HuMo"),
    "Fun Camera": ({**i2v_expert(**SMALL), **names("control_adapter.conv.weight")}, "Fun Camera"),
    "a part": ({name: value for name, value in i2v_expert(**SMALL).items() if name.startswith("blocks.1.")}, "a part of a Wan model"),
    "a flat patch_embedding": ({**i2v_expert(**SMALL), "patch_embedding.weight": ("F16", (128 * 36, 1, 2, 2))}, "five sizes"),
}


@pytest.mark.parametrize("which", EXPERTS)
def test_experts(which: str) -> None:
    assert recognise(as_stored(EXPERTS[which])) is kinds.EXPERT


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_wans_other_transformers(what: str, prefix: str) -> None:
    described, words = OTHERS[what]
    kind = recognise(as_stored(prefixed(described, prefix)))
    assert words in kind.what
    assert "Choose" in kind.remedy


@pytest.mark.parametrize(
    ("described", "kind"),
    [
        (names(*LORA), kinds.LORA),
        (names("transformer.blocks.0.attn1.to_q.lora_A.weight"), kinds.LORA),
        (names("lora_unet_blocks_0_self_attn_q.lora_down.weight", "lora_unet_blocks_0_self_attn_q.alpha"), kinds.LORA),
        (names("diffusion_model.blocks.0.self_attn.q.diff", "diffusion_model.blocks.0.self_attn.q.diff_b"), kinds.LORA),
        (names("blocks.0.self_attn.q.lora_up.weight", "blocks.0.self_attn.norm_q.weight"), kinds.LORA),
        (names("blocks.0.self_attn.q.lokr_w1"), kinds.LORA),
        (names(*UMT5), kinds.UMT5),
        (prefixed(names(*UMT5), "text_encoders.umt5xxl.transformer."), kinds.UMT5),
        (names("token_embd.weight", "enc.blk.0.attn_q.weight", "enc.blk.1.attn_rel_b.weight"), kinds.UMT5),
        (names("blocks.0.attn.q.weight", "blocks.1.pos_embedding.embedding.weight"), kinds.UMT5),
        (names(*T5, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"), kinds.OTHER_T5),
        (names("token_embd.weight", "enc.blk.0.attn_q.weight", "enc.blk.0.attn_rel_b.weight"), kinds.OTHER_T5),
        (VAE_21, kinds.VAE),
        (prefixed(VAE_21, "vae."), kinds.VAE),
        (VAE_DIFFUSERS, kinds.VAE),
        (VAE_22, kinds.VAE_5B),
        (names("vision_model.embeddings.patch_embedding.weight"), kinds.CLIP_VISION),
        (names("double_blocks.0.img_attn.qkv.weight"), kinds.NOT_WAN),
        (names("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"), kinds.NOT_WAN),
        (names("transformer_blocks.0.attn1.to_q.weight", "transformer_blocks.0.attn1.norm_q.weight"), kinds.NOT_WAN),
        (names("blocks.0.attn1.to_q.weight", "blocks.0.attn1.q_norm.weight"), kinds.NOT_WAN),
        (names("transformer_blocks.0.attn.q.weight"), kinds.NOT_WAN),
        ({**VAE_21, "conv2.weight": ("F32", (4, 4, 1, 1, 1))}, kinds.NOT_WAN),
        (names("decoder.middle.0.residual.0.gamma"), kinds.NOT_WAN),
        ({}, kinds.EMPTY),
    ],
)
def test_everything_else(described: Described, kind: Kind) -> None:
    assert recognise(as_stored(described)) is kind


def test_the_refusal_says_what_it_is_and_where_it_belongs() -> None:
    assert str(refusal("detail.safetensors", kinds.LORA)) == (
        "detail.safetensors is a LoRA, not a Wan 2.2 I2V A14B expert. Put it into a Wan Sharded LoRA node behind the loader."
    )
