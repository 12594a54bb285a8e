"""Single files of the text encoder are recognised by what is inside, and what can't be used is named with what to choose instead."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import make_text_encoder
from tiny_encoder_files import FORMS, write_umt5_file, write_vae_file
from transformers import UMT5Config, UMT5EncoderModel
from wan_sharded.engine.checkpoints.umt5_file import _expected, is_text_encoder_file, open_umt5_file, read_stored_bytes
from wan_sharded.engine.errors import CheckpointError

Tensors = dict[str, torch.Tensor]
SPIECE = b"a tokenizer"
BIAS = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
QUERY = "encoder.block.0.layer.0.SelfAttention.q"


@pytest.fixture(scope="module")
def encoder() -> UMT5EncoderModel:
    return make_text_encoder(64, torch.Generator().manual_seed(0))


@pytest.fixture
def write(encoder: UMT5EncoderModel, tmp_path: Path) -> Callable[..., Path]:
    """A file of a form, with a change: ``write("fp16", lambda tensors: tensors.pop("shared.weight"))``."""

    def make(form: str, change: Callable[[Tensors], object] | None = None, name: str = "umt5.safetensors", **metadata: str) -> Path:
        file = tmp_path / name
        write_umt5_file(file, encoder, SPIECE, form)
        if change or metadata:
            tensors = load_file(file)
            if change:
                change(tensors)
            save_file(tensors, file, metadata=metadata or None)
        return file

    return make


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_described(encoder: UMT5EncoderModel, write: Callable[..., Path], form: str) -> None:
    file = open_umt5_file(write(form))
    parameters = {name: tuple(p.shape) for name, p in encoder.named_parameters() if name != "encoder.embed_tokens.weight"}
    assert {name: stored.shape for name, stored in file.tensors.items()} == parameters
    assert UMT5Config(**file.config).to_dict() == UMT5Config(**encoder.config.to_dict()).to_dict()
    assert file.tokenizer is not None and read_stored_bytes(file.tokenizer) == SPIECE
    scaled = {name for name, stored in file.tensors.items() if stored.scale is not None}
    assert len(scaled) == (2 * 7 if "scaled" in form else 0)
    assert file.has_fp8 == form.startswith("fp8")
    assert file.wide_dtype == {"fp16": "F16", "bf16": "BF16", "fp8_scaled_old": "F16", "fp8_scaled_new": "F16"}.get(form, "F32")
    assert is_text_encoder_file(file.path)


def test_the_published_encoders_shapes() -> None:
    """As google/umt5-xxl's config.json has them, from its tensors' shapes as in umt5_xxl_fp16.safetensors."""
    config = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    expected = dict(_expected(config.to_dict()))
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters() if name != "encoder.embed_tokens.weight"}
    assert expected == parameters
    assert len([name for name, shape in expected.items() if len(shape) == 2]) == 24 * 8 + 1


def test_a_table_under_its_other_name(write: Callable[..., Path]) -> None:
    file = open_umt5_file(write("bf16", lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors.pop("shared.weight")})))
    assert file.tensors["shared.weight"].key == "encoder.embed_tokens.weight"


def test_a_file_without_tokenizer_needs_one_beside_it(encoder: UMT5EncoderModel, tmp_path: Path) -> None:
    write_umt5_file(tmp_path / "bare.safetensors", encoder, None, "bf16")
    assert open_umt5_file(tmp_path / "bare.safetensors").tokenizer is None
    assert not is_text_encoder_file(tmp_path / "bare.safetensors")


def per_row(tensors: Tensors) -> None:
    tensors[f"{QUERY}.weight_scale"] = torch.ones(32, 1)


def test_scales_may_be_per_row_and_in_few_bits(write: Callable[..., Path]) -> None:
    scale = open_umt5_file(write("fp8_scaled_new", per_row)).tensors[f"{QUERY}.weight"].scale
    assert scale is not None and scale.shape == (32, 1)

    def half(tensors: Tensors) -> None:
        tensors[f"{QUERY}.scale_weight"] = tensors[f"{QUERY}.scale_weight"].half()

    scale = open_umt5_file(write("fp8_scaled_old", half)).tensors[f"{QUERY}.weight"].scale
    assert scale is not None and scale.dtype == "F16"


def test_what_else_a_file_holds_is_left_alone(write: Callable[..., Path]) -> None:
    def more(tensors: Tensors) -> None:
        tensors[f"{QUERY}.scale_input"] = torch.ones(())
        tensors["logit_scale"] = torch.ones(())
        tensors["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.ones(2, 2)

    def what_is_read(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (stored.dtype, stored.shape) for name, stored in open_umt5_file(path).tensors.items()}

    assert what_is_read(write("fp8_scaled_old", more)) == what_is_read(write("fp8_scaled_old"))
    layers = json.dumps({"layers": {QUERY: {"format": "float8_e4m3fn"}}})
    assert open_umt5_file(write("fp8_scaled_old", _quantization_metadata=layers)).has_fp8


def rename_to_wans(tensors: Tensors) -> None:
    for key in list(tensors):
        name = key.replace("shared.", "token_embedding.").replace("encoder.block.", "blocks.").replace("layer.0.SelfAttention.", "attn.")
        tensors[name] = tensors.pop(key)
    tensors["blocks.1.pos_embedding.embedding.weight"] = torch.ones(32, 4)


def into_a_checkpoint(tensors: Tensors) -> None:
    for key in list(tensors):
        tensors[f"text_encoders.umt5xxl.transformer.{key}"] = tensors.pop(key)


def only(**tensors: torch.Tensor) -> Callable[[Tensors], None]:
    def change(all_tensors: Tensors) -> None:
        all_tensors.clear()
        all_tensors.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})

    return change


FOREIGN: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "T5": (lambda tensors: tensors.pop(BIAS), "is a T5 text encoder of another model"),
    "UMT5 with Wan's own names": (rename_to_wans, "under other names than ComfyUI's"),
    "inside a checkpoint": (into_a_checkpoint, "under other names than ComfyUI's"),
    "CLIP": (only(text_model__encoder__layers__0__mlp__fc1__weight=torch.ones(2, 2)), "is a CLIP text encoder"),
    "a language model": (only(model__layers__0__self_attn__k_proj__weight=torch.ones(2, 2)), "is a language model"),
    "a LoRA": (only(**{"blocks__0__self_attn__q__lora_A__weight": torch.ones(2, 2)}), "is a LoRA"),
    "anything": (only(weight=torch.ones(2, 2)), "holds no text encoder that is known here"),
    "nothing": (only(), "not Wan's text encoder"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_another_model_is_named(write: Callable[..., Path], kind: str) -> None:
    change, words = FOREIGN[kind]
    file = write("fp16", change, "foreign.safetensors")
    with pytest.raises(CheckpointError, match="foreign.safetensors") as caught:
        open_umt5_file(file)
    assert words in str(caught.value) and "Choose umt5_xxl_fp8_e4m3fn_scaled.safetensors as text_encoder" in str(caught.value)
    assert not is_text_encoder_file(file)


def test_a_vae_is_named(tmp_path: Path) -> None:
    from tiny_checkpoint import make_vae

    write_vae_file(tmp_path / "vae.safetensors", make_vae(torch.Generator().manual_seed(0), num_res_blocks=2))
    with pytest.raises(CheckpointError, match=r"vae.safetensors is the video VAE of Wan 2\.1"):
        open_umt5_file(tmp_path / "vae.safetensors")


def put(key: str, value: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({key: value})


def text(content: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)


DAMAGED: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "a tensor is missing": ("fp16", lambda tensors: tensors.pop(f"{QUERY}.weight".replace(".q", ".k")), "lacks 1 tensors, such as"),
    "the first gate is missing": (
        "fp16",
        lambda tensors: tensors.pop("encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
        "has not the tensors of a UMT5 encoder",
    ),
    "a block is missing": ("fp16", put("encoder.block.2.layer.0.SelfAttention.relative_attention_bias.weight", torch.ones(32, 4)), "lacks"),
    "another shape": ("fp16", put(f"{QUERY}.weight".replace(".q", ".v"), torch.ones(32, 33)), "is [32, 33], but should be [32, 32]"),
    "one size": ("fp16", put("shared.weight", torch.ones(64)), "has not the tensors of a UMT5 encoder"),
    "no heads": ("fp16", put("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", torch.ones(32, 0)), "has not the"),
    "whole numbers": ("fp16", put(f"{QUERY}.weight", torch.ones(32, 32, dtype=torch.int8)), "is stored as I8"),
    "a scale of another shape": ("fp8_scaled_old", put(f"{QUERY}.scale_weight", torch.ones(3)), "a scale, is F32 [3]"),
    "a scale of whole numbers": ("fp8_scaled_old", put(f"{QUERY}.scale_weight", torch.ones((), dtype=torch.int32)), "a scale, is I32"),
    "a scale is missing": ("fp8_scaled_new", lambda tensors: tensors.pop(f"{QUERY}.weight_scale"), "without which"),
    "another format": ("fp8_scaled_new", put(f"{QUERY}.comfy_quant", text('{"format": "nvfp4"}')), "is quantized as nvfp4"),
    "no format": ("fp8_scaled_new", put(f"{QUERY}.comfy_quant", text("{}")), "is quantized as None"),
    "a damaged format": ("fp8_scaled_new", put(f"{QUERY}.comfy_quant", text("{")), "says in a damaged way how it is quantized"),
    "a format that is a list": ("fp8_scaled_new", put(f"{QUERY}.comfy_quant", text("[]")), "says in a damaged way how it is quantized"),
    "a tokenizer of numbers": ("fp16", put("spiece_model", torch.ones(3)), "its tokenizer, is F32 [3]"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_named(write: Callable[..., Path], damage: str) -> None:
    form, change, words = DAMAGED[damage]
    with pytest.raises(CheckpointError, match="damaged.safetensors") as caught:
        open_umt5_file(write(form, change, "damaged.safetensors"))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "layers",
    [
        '{"layers": {"' + QUERY + '": {"format": {"a": 1}}}}',
        '{"layers": {"' + QUERY + '": {"format": [1]}}}',
        "[1]",
        '{"layers": 3}',
        '{"layers": {"' + QUERY + '": {"format": "int8"}}}',
        "{",
    ],
)
def test_metadata_of_another_quantization(write: Callable[..., Path], layers: str) -> None:
    with pytest.raises(CheckpointError, match=r"umt5.safetensors (is quantized as (int8|\[1\]|\{'a': 1\})|says in a damaged way)"):
        open_umt5_file(write("fp16", _quantization_metadata=layers))


@pytest.fixture
def useless(write: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    whole = write("fp8_scaled_old").read_bytes()
    contents = {
        "empty.safetensors": b"",
        "short.safetensors": whole[:-100],
        "long.safetensors": whole + b"0",
        "other.safetensors": b"PK" * 50,
    }

    def make(name: str) -> Path:
        (tmp_path / name).write_bytes(contents.get(name, whole))
        return tmp_path / name

    yield make


@pytest.mark.parametrize("name", ["empty.safetensors", "short.safetensors", "long.safetensors", "other.safetensors"])
def test_what_is_no_whole_file(useless: Callable[[str], Path], name: str) -> None:
    with pytest.raises(CheckpointError, match=name) as caught:
        open_umt5_file(useless(name))
    assert "Download it again" in str(caught.value)
    assert not is_text_encoder_file(useless(name))


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "ckpt", "PTH"])
def test_pickles_are_refused_by_name(useless: Callable[[str], Path], suffix: str) -> None:
    with pytest.raises(CheckpointError, match=f"models_t5_umt5-xxl-enc-bf16.{suffix} holds pickled weights .* can run code"):
        open_umt5_file(useless(f"models_t5_umt5-xxl-enc-bf16.{suffix}"))


def test_gguf_is_refused_with_another_way(useless: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match="umt5.Q8_0.gguf is a GGUF file") as caught:
        open_umt5_file(useless("umt5.Q8_0.gguf"))
    assert "connect positive_conditioning" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone.safetensors"):
        open_umt5_file(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_umt5_file(tmp_path)
    assert not is_text_encoder_file(tmp_path / "gone.safetensors")


def test_a_tokenizer_that_is_gone_meanwhile(write: Callable[..., Path]) -> None:
    file = open_umt5_file(write("fp16"))
    assert file.tokenizer is not None
    file.path.write_bytes(file.path.read_bytes()[: file.tokenizer.offset + 3])
    with pytest.raises(CheckpointError, match="has become shorter"):
        read_stored_bytes(file.tokenizer)
    shutil.move(file.path, file.path.with_suffix(".moved"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_stored_bytes(file.tokenizer)


def unscaled(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("scale_weight")]:
        del tensors[name]


def test_scales_that_are_missing_under_either_mark(write: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"lacks encoder.block.0.layer.0.SelfAttention.q.weight_scale, without which"):
        open_umt5_file(write("fp8_scaled_old", unscaled))
    layers = json.dumps({"layers": {QUERY: {"format": "float8_e4m3fn"}}})

    def only_in_metadata(tensors: Tensors) -> None:
        unscaled(tensors)
        del tensors["scaled_fp8"]

    with pytest.raises(CheckpointError, match=rf"lacks {QUERY}.weight_scale, without which"):
        open_umt5_file(write("fp8_scaled_old", only_in_metadata, _quantization_metadata=layers))
    assert open_umt5_file(write("fp8_scaled_old", only_in_metadata)).has_fp8, "plain fp8"


def test_a_mark_of_another_type(write: Callable[..., Path]) -> None:
    layers = json.dumps({"layers": {QUERY: {"format": "float8_e5m2"}}})
    with pytest.raises(CheckpointError, match="is F8_E4M3, but marked as F8_E5M2"):
        open_umt5_file(write("fp8_scaled_old", _quantization_metadata=layers))
