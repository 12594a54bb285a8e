"""What a checkpoint file holds, in words, by the names and shapes of its tensors. Reads no files.

Called by the readers of single files, so that a wrong choice is answered with what it is and where it belongs. Works for every width and
number of blocks: what tells models apart is which layers they have and how many channels they take.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import CheckpointError
from .stored import INPUT_CHANNELS, LATENT_CHANNELS, StoredTensor
from .wan_names import block_number, diffusers_name

CHOOSE_EXPERT = "Choose a Wan 2.2 I2V A14B expert, such as wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors."
# Wan 2.2 TI2V 5B's VAE and transformer.
_LATENT_CHANNELS_5B = 48


@dataclass(frozen=True)
class Kind:
    """What a file is.

    Attributes:
        what: "a LoRA", to be read behind "is".
        remedy: a sentence that says where it belongs, or what to choose instead.
    """

    what: str
    remedy: str = CHOOSE_EXPERT


EXPERT = Kind("a Wan 2.2 I2V A14B expert", "Choose it as high_noise_model or low_noise_model.")
LORA = Kind("a LoRA", "Put it into a Wan Sharded LoRA node behind the loader.")
UMT5 = Kind("a UMT5 text encoder", "Choose it as text_encoder.")
UMT5_GGUF = Kind(
    "a UMT5 text encoder in GGUF",
    "Choose one in safetensors as text_encoder, such as umt5_xxl_fp8_e4m3fn_scaled.safetensors.",
)
OTHER_T5 = Kind(
    "a T5 text encoder of another model", "Wan's is UMT5, such as umt5_xxl_fp8_e4m3fn_scaled.safetensors, chosen as text_encoder."
)
CLIP_VISION = Kind("a CLIP vision model", "Wan 2.2 I2V A14B needs none; leave it out.")
VAE = Kind("the video VAE of Wan 2.1, which Wan 2.2 I2V A14B uses too", "Choose it as vae.")
VAE_5B = Kind("the video VAE of Wan 2.2 TI2V 5B", "Wan 2.2 I2V A14B uses the one of Wan 2.1, such as wan_2.1_vae.safetensors.")
NOT_WAN = Kind("a model of another family")
EMPTY = Kind("a file without tensors", "Download it again.")

_LORA_WORDS = frozenset({
    "lora_A", "lora_B", "lora_up", "lora_down", "lora", "lora_magnitude_vector", "hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w2",
    "lokr_w1_a", "lokr_w2_a", "oft_blocks", "diff", "diff_b", "dora_scale",
})  # fmt: skip
_LORA_BEGINNINGS = ("lora_unet_", "lora_te", "lora_transformer_")
# A layer, or a part of a name, that only this relative of the I2V expert has.
_RELATIVES = {
    "vace_blocks": "a Wan VACE model",
    "vace_patch_embedding": "a Wan VACE model",
    "face_adapter": "a Wan Animate model",
    "motion_encoder": "a Wan Animate model",
    "casual_audio_encoder": "a Wan S2V (speech to video) model",
    "audio_injector": "a Wan S2V (speech to video) model",
    "audio_proj": "a Wan model for talking people, such as HuMo or InfiniteTalk",
    "control_adapter": "a Wan Fun Camera model",
    "ref_conv": "a Wan Fun Control model",
}


def recognise(tensors: Mapping[str, StoredTensor]) -> Kind:
    """What a file is.

    Args:
        tensors: all of the file's, by their names there, with any prefix.
    """
    if not tensors:
        return EMPTY
    if _is_lora(tensors):
        return LORA
    names = {diffusers_name(key): stored for key, stored in tensors.items()}
    if any(block_number(name) is not None and name.endswith(".attn1.norm_q.weight") for name in names):
        return _wan_transformer(names)
    return _text_encoder(tensors) or _vae(tensors) or _image_encoder(tensors) or NOT_WAN


def refusal(name: str, kind: Kind) -> CheckpointError:
    """The error for a file that was chosen as an expert."""
    return CheckpointError(f"{name} is {kind.what}, not a Wan 2.2 I2V A14B expert. {kind.remedy}")


def _is_lora(keys: Mapping[str, StoredTensor]) -> bool:
    return any(key.startswith(_LORA_BEGINNINGS) or not _LORA_WORDS.isdisjoint(key.split(".")) for key in keys)


def _wan_transformer(names: Mapping[str, StoredTensor]) -> Kind:
    """Which of Wan's transformers it is, by diffusers' names."""
    segments = {segment for name in names for segment in name.split(".")}
    for segment, what in _RELATIVES.items():
        if segment in segments:
            return Kind(what)
    if "image_embedder" in segments or "add_k_proj" in segments:
        return Kind("a Wan 2.1 image-to-video model (it looks at the picture through CLIP)")
    patch_embedding = names.get("patch_embedding.weight")
    if patch_embedding is None:
        return Kind("a part of a Wan model", "Choose a whole model in one file, or the folder of a model in diffusers format as model.")
    if len(patch_embedding.shape) != 5:
        return Kind(f"a Wan model with a patch_embedding of shape {list(patch_embedding.shape)}, which should have five sizes")
    channels = patch_embedding.shape[1]
    if channels == INPUT_CHANNELS:
        return EXPERT
    if channels == LATENT_CHANNELS:
        return Kind("a Wan text-to-video model (Wan 2.2 T2V A14B or Wan 2.1 T2V)")
    if channels == _LATENT_CHANNELS_5B:
        return Kind("Wan 2.2 TI2V 5B")
    return Kind(f"another Wan model (it takes {channels} channels, an I2V expert {INPUT_CHANNELS})")


def _text_encoder(tensors: Mapping[str, StoredTensor]) -> Kind | None:
    """UMT5, which unlike T5 has position biases in every block, in transformers', GGUF's and Wan's own spelling."""
    spellings = {
        "encoder.block.0.layer.0.SelfAttention.q.weight": "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
        "enc.blk.0.attn_q.weight": "enc.blk.1.attn_rel_b.weight",
        "blocks.0.attn.q.weight": "blocks.1.pos_embedding.embedding.weight",
    }
    for query, bias in spellings.items():
        begin = _before(tensors, query)
        if begin is not None:
            return UMT5 if f"{begin}{bias}" in tensors else OTHER_T5
    return None


def _vae(tensors: Mapping[str, StoredTensor]) -> Kind | None:
    """Wan's VAEs, by the last layer before the decoder in Wan's own and in diffusers' spelling: [channels, channels, 1, 1, 1]."""
    own = {"decoder.middle.0.residual.0.gamma": "conv2.weight", "decoder.mid_block.resnets.0.norm1.gamma": "post_quant_conv.weight"}
    for marker, last in own.items():
        begin = _before(tensors, marker)
        conv = tensors.get(f"{begin}{last}") if begin is not None else None
        if conv is not None and len(conv.shape) == 5:
            return {LATENT_CHANNELS: VAE, _LATENT_CHANNELS_5B: VAE_5B}.get(conv.shape[0])
    return None


def _image_encoder(tensors: Mapping[str, StoredTensor]) -> Kind | None:
    return None if _before(tensors, "vision_model.embeddings.patch_embedding.weight") is None else CLIP_VISION


def _before(keys: Iterable[str], name: str) -> str | None:
    """The prefix with which a name occurs, "" or something with a full stop at its end."""
    return next((key.removesuffix(name) for key in keys if key == name or key.endswith(f".{name}")), None)
