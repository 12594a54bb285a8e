"""Experts as single files: every form says the same as the model they are of, and everything else is refused in words."""

import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_single_files as forms
import torch
from safetensors.torch import load_file
from wan_files import SMALL, Described, fp8_scaled, i2v_21, i2v_expert, is_quantized, write_safetensors
from wan_sharded.engine.checkpoints.safetensors_header import read_header
from wan_sharded.engine.checkpoints.single_file import open_expert_file
from wan_sharded.engine.checkpoints.stored import ComponentFiles, StoredTensor
from wan_sharded.engine.checkpoints.wan_names import diffusers_name
from wan_sharded.engine.errors import CheckpointError

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
}
# Form -> what most of it is stored as, and how far its values may be from the model's, relative to the largest of a tensor.
STORED = {
    "original_fp32": ("F32", 0.0),
    "original_fp16": ("F16", 1e-3),
    "original_bf16": ("BF16", 4e-3),
    "diffusers_bf16": ("BF16", 4e-3),
    "prefixed_bf16": ("BF16", 4e-3),
    "fp8": ("F8_E4M3", 0.07),
    "fp8_e5m2": ("F8_E5M2", 0.13),
    "fp8_scaled_old": ("F8_E4M3", 0.07),
    "fp8_scaled_new": ("F8_E4M3", 0.07),
    "fp8_scaled_metadata": ("F8_E4M3", 0.07),
    "int8_scaled": ("I8", 5e-3),
    "gguf_bf16": ("BF16", 4e-3),
    "gguf_q8_0": ("GGUF:Q8_0", 0.01),
    "gguf_q4_0": ("GGUF:Q4_0", 0.15),
    "gguf_q4_k": ("GGUF:Q4_K", math.inf),  # random bytes
}


def values(stored: StoredTensor) -> torch.Tensor:
    """A tensor's values in float32, by what the description says and nothing else."""
    with stored.file.open("rb") as file:
        file.seek(stored.offset)
        raw = bytearray(file.read(stored.size_bytes))
    if stored.gguf_type is not None:
        import gguf
        import numpy

        kind = gguf.GGMLQuantizationType[stored.gguf_type]
        rows = numpy.frombuffer(raw, numpy.uint8).reshape(stored.shape[0], -1)
        return torch.from_numpy(gguf.quants.dequantize(rows, kind)).reshape(stored.shape)
    tensor = torch.frombuffer(raw, dtype=DTYPES[stored.dtype]).float().reshape(stored.shape)
    return tensor if stored.scale is None else tensor * values(stored.scale)


def test_every_form_is_tested() -> None:
    assert STORED.keys() == set(forms.FORMS)


@pytest.mark.parametrize("part", forms.EXPERTS)
@pytest.mark.parametrize("form", STORED)
def test_every_form_is_the_model(tiny_single_files: Path, form: str, part: str) -> None:
    """The same names, shapes, configuration and values as the folder in diffusers format."""
    files = open_expert_file(tiny_single_files / forms.file_names(form)[part])
    model = tiny_single_files / "diffusers" / part
    expected = load_file(model / "diffusion_pytorch_model.safetensors")
    assert files.name == forms.file_names(form)[part]
    assert {name: stored.shape for name, stored in files.tensors.items()} == {name: tuple(value.shape) for name, value in expected.items()}
    config = json.loads((model / "config.json").read_text())
    assert {key: value for key, value in config.items() if not key.startswith("_")} == json.loads(json.dumps(files.config))
    dtype, tolerance = STORED[form]
    assert files.stored_dtype == dtype
    for name, stored in files.tensors.items():
        if tolerance < math.inf or stored.gguf_type is None:
            close = max(tolerance, 1e-3 if form.startswith("gguf") else 0.0) * expected[name].abs().max()
            assert (values(stored) - expected[name]).abs().max() <= close, name
        else:
            assert 0.1 < values(stored).std() / expected[name].std() < 10, name


@pytest.mark.parametrize(
    ("form", "shape"),
    {
        "fp8_scaled_old": (),
        "fp8_scaled_new": (),
        "fp8_scaled_metadata": (),
        "int8_scaled": None,
        "fp8": None,
        "original_bf16": None,
    }.items(),
)
def test_every_matrix_has_its_scale(tiny_single_files: Path, form: str, shape: tuple[int, ...] | None) -> None:
    files = open_expert_file(tiny_single_files / forms.file_names(form)["transformer"])
    for name, stored in files.tensors.items():
        if form in ("fp8", "original_bf16") or len(stored.shape) != 2:
            assert stored.scale is None, name
        else:
            assert stored.scale is not None, name
            assert stored.scale.key.rpartition(".")[0] == stored.key.removesuffix(".weight")
            assert stored.scale.shape == ((stored.shape[0], 1) if form == "int8_scaled" else shape)


# ---- real files


def test_the_published_bf16_file(tmp_path: Path) -> None:
    """All names and shapes of the real 28 GB, in a file that takes no room; the configuration is that of the published config.json."""
    if sys.platform == "win32":
        pytest.skip("files with holes take room here")
    path = tmp_path / "wan2.2_i2v_high_noise_14B_bf16.safetensors"
    try:
        files = open_expert_file(write_safetensors(path, i2v_expert()))
    except OSError as error:
        pytest.skip(f"no files with holes here: {error}")
    finally:
        path.unlink(missing_ok=True)
    assert len(files.tensors) == 1095
    assert files.config == {
        "added_kv_proj_dim": None,
        "attention_head_dim": 128,
        "cross_attn_norm": True,
        "eps": 1e-6,
        "ffn_dim": 13824,
        "freq_dim": 256,
        "image_dim": None,
        "in_channels": 36,
        "num_attention_heads": 40,
        "num_layers": 40,
        "out_channels": 16,
        "patch_size": (1, 2, 2),
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": 4096,
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a file with a name that goes with an expert."""

    def write_it(described: Described, name: str = "wan_high.safetensors", **options: Any) -> Path:
        return write_safetensors(tmp_path / name, described, **options)

    return write_it


def test_the_published_fp8_file(write: Callable[..., Path]) -> None:
    """1,095 tensors, 400 scales and a mark; of smaller sizes here."""
    described = fp8_scaled(**{**SMALL, "blocks": 40})
    described["scaled_fp8"] = ("F8_E4M3", (2,))
    assert len(described) == 1095 + 400 + 1
    files = open_expert_file(write(described))
    assert len(files.tensors) == 1095
    assert sum(stored.scale is not None for stored in files.tensors.values()) == 400
    assert {stored.dtype for stored in files.tensors.values()} == {"F8_E4M3", "F16"}


def refused(path: Path) -> str:
    """The message; it names the file and says what to do."""
    with pytest.raises(CheckpointError) as caught:
        open_expert_file(path)
    message = str(caught.value)
    assert path.name in message
    assert any(word in message for word in ("Choose", "Download", "Use a", "Check", "Put it")), message
    return message


# ---- quantized weights

LAYER = "blocks.0.self_attn.q"


@pytest.mark.parametrize("shape", [(), (1,), (128,), (128, 1)])
@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("weight", ["F8_E4M3", "F8_E5M2", "I8", "BF16"])
def test_scales_of_one_value_or_one_a_row(write: Callable[..., Path], shape: tuple[int, ...], suffix: str, weight: str) -> None:
    described = {**i2v_expert(**SMALL), f"{LAYER}.weight": (weight, (128, 128)), f"{LAYER}.{suffix}": ("F32", shape)}
    scale = open_expert_file(write(described)).tensors["blocks.0.attn1.to_q.weight"].scale
    assert scale is not None
    assert (scale.key, scale.shape) == (f"{LAYER}.{suffix}", shape)


@pytest.mark.parametrize(
    ("dtype", "shape"), [("F32", (2,)), ("F32", (1, 128)), ("F32", (1, 1)), ("F32", (128, 8)), ("F32", (128, 1, 1)), ("F8_E8M0", (128,))]
)
def test_other_scales(write: Callable[..., Path], dtype: str, shape: tuple[int, ...]) -> None:
    message = refused(write({**i2v_expert(**SMALL), f"{LAYER}.weight": ("F8_E4M3", (128, 128)), f"{LAYER}.weight_scale": (dtype, shape)}))
    assert f"{LAYER}.weight_scale" in message
    assert str(list(shape)) in message


def test_some_with_and_some_without_scales(write: Callable[..., Path]) -> None:
    described = fp8_scaled(**SMALL)
    del described["blocks.1.ffn.0.scale_weight"]
    tensors = open_expert_file(write(described)).tensors
    assert tensors["blocks.1.ffn.net.0.proj.weight"].scale is None
    assert tensors["blocks.0.ffn.net.0.proj.weight"].scale is not None


def test_marked_without_any_scale(write: Callable[..., Path]) -> None:
    described = {name: kept for name, kept in fp8_scaled(**SMALL).items() if not name.endswith("scale_weight")}
    assert "lacks the scales of its fp8 weights" in refused(write({**described, "scaled_fp8": ("F8_E4M3", (2,))}))
    # Plain fp8.
    assert open_expert_file(write(described)).tensors["blocks.0.attn1.to_q.weight"].scale is None


def test_one_of_all_scales_is_missing(write: Callable[..., Path]) -> None:
    """Where a file says that its fp8 is scaled; without its scale that matrix would be a thousand times too large."""
    described = {**fp8_scaled(**SMALL), "scaled_fp8": ("F8_E4M3", (2,))}
    open_expert_file(write(described))
    del described["blocks.1.ffn.0.scale_weight"]
    assert "lacks the scale of blocks.1.ffn.0.weight, without which" in refused(write(described))


@pytest.mark.parametrize(
    ("form", "dtype"), [("float8_e4m3fn", "F8_E5M2"), ("float8_e5m2", "F8_E4M3"), ("int8_tensorwise", "F8_E4M3"), ("float8_e4m3fn", "I8")]
)
def test_a_mark_that_is_not_what_is_stored(write: Callable[..., Path], form: str, dtype: str) -> None:
    described, contents = marked({"format": form}, **{f"{LAYER}.weight": (dtype, (128, 128))})
    message = refused(write(described, values=contents))
    assert f"{LAYER}.weight is {dtype}, but marked as" in message


def test_a_mark_without_its_scale(write: Callable[..., Path]) -> None:
    described, contents = marked({"format": "float8_e4m3fn"})
    del described[f"{LAYER}.weight_scale"]
    assert f"lacks the scale of {LAYER}.weight" in refused(write(described, values=contents))


def dtype_of(described: Any) -> str:
    """Of a weight with such a mark."""
    form = str(described.get("format")) if isinstance(described, dict) else ""
    return "I8" if "int8" in form else "F8_E5M2" if "e5m2" in form else "F8_E4M3"


def marked(described: Any, **extra: tuple[str, tuple[int, ...]]) -> tuple[Described, dict[str, bytes]]:
    """An expert whose one quantized module has a mark with this JSON, or with these bytes."""
    text = described if isinstance(described, bytes) else json.dumps(described).encode()
    tensors = {
        f"{LAYER}.weight": (dtype_of(described), (128, 128)),
        f"{LAYER}.weight_scale": ("F32", ()),
        f"{LAYER}.comfy_quant": ("U8", (len(text),)),
    }
    return {**i2v_expert(**SMALL), **tensors, **extra}, {f"{LAYER}.comfy_quant": text}


@pytest.mark.parametrize(
    "described",
    [
        {"format": "float8_e4m3fn"},
        {"format": "float8_e4m3fn", "full_precision_matrix_mult": True, "orig_dtype": "bfloat16"},
        {"format": "float8_e4m3fn_rowwise"},
        {"format": "float8_e5m2"},
        {"format": "int8_tensorwise", "convrot": False, "per_row": True},
        {"format": "int8_rowwise"},
    ],
)
def test_formats_that_can_be_read(write: Callable[..., Path], described: dict[str, Any]) -> None:
    tensors, texts = marked(described)
    assert len(open_expert_file(write(tensors, values=texts)).tensors) == 15 + 2 * 27
    metadata = {"_quantization_metadata": json.dumps({"layers": {f"model.diffusion_model.{LAYER}": described}})}
    stored = fp8_scaled(**SMALL, weight=dtype_of(described))
    assert len(open_expert_file(write(stored, metadata=metadata)).tensors) == 15 + 2 * 27


@pytest.mark.parametrize(
    ("described", "named"),
    [
        ({"format": "nvfp4"}, "nvfp4"),
        ({"format": "mxfp8"}, "mxfp8"),
        ({"format": "int8_blockwise", "group_size": 128}, "int8_blockwise"),
        ({"format": "asym_w4a8_int8"}, "asym_w4a8_int8"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}, "convrot"),
        ({"format": "int8_tensorwise", "params": {"convrot": True}}, "convrot"),
        ({"format": ["float8_e4m3fn"]}, "float8_e4m3fn"),
        ({}, "None"),
    ],
)
@pytest.mark.parametrize("where", ["mark", "metadata", "prefixed metadata"])
def test_formats_that_can_not(write: Callable[..., Path], described: dict[str, Any], named: str, where: str) -> None:
    if where == "mark":
        tensors, texts = marked(described)
        message = refused(write(tensors, values=texts))
    else:
        layer = LAYER if where == "metadata" else f"model.diffusion_model.{LAYER}"
        metadata = {"_quantization_metadata": json.dumps({"layers": {layer: described}})}
        message = refused(write(fp8_scaled(**SMALL), metadata=metadata))
    assert named in message and LAYER in message
    assert "fp8_scaled or GGUF version" in message


def test_formats_of_what_is_not_the_transformer(write: Callable[..., Path]) -> None:
    metadata = {"_quantization_metadata": json.dumps({"layers": {"text_encoders.umt5.q": {"format": "nvfp4"}}})}
    assert open_expert_file(write(fp8_scaled(**SMALL), metadata=metadata)).tensors


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"17", b"\xff\xfe", b"[" * 4000, b'{"format": "float8_e4m3fn"}' + b" " * 4096],
    ids=["empty", "open", "list", "number", "no text", "deep", "long"],
)
def test_marks_that_are_damaged(write: Callable[..., Path], text: bytes) -> None:
    tensors, texts = marked(text)
    assert f"{LAYER}.comfy_quant" in refused(write(tensors, values=texts))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"layers": []}', '{"layers": null}', "[" * 100_000])
def test_metadata_that_is_damaged(write: Callable[..., Path], text: str) -> None:
    assert "_quantization_metadata" in refused(write(i2v_expert(**SMALL), metadata={"_quantization_metadata": text}))


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({f"{LAYER}.weight": ("U8", (128, 64))}, "U8"),
        ({f"{LAYER}.weight": ("F4", (128, 128))}, "F4"),
        ({f"{LAYER}.weight": ("I8", (128, 128))}, "int8 without a scale"),
        ({f"{LAYER}.pre_quant_scale": ("F32", (128,))}, f"{LAYER}.pre_quant_scale"),
        ({f"{LAYER}.weight_scale_2": ("F32", ())}, f"{LAYER}.weight_scale_2"),
        ({"blocks.7.self_attn.q.weight_scale": ("F32", ())}, "blocks.7.self_attn.q.weight_scale"),
        ({f"{LAYER}.weight_scale": ("F32", ()), f"{LAYER}.scale_weight": ("F32", ())}, "twice"),
        ({"blocks.0.attn1.to_q.weight": ("BF16", (128, 128))}, "twice"),
    ],
)
def test_tensors_that_can_not_be_read(write: Callable[..., Path], extra: Described, named: str) -> None:
    assert named in refused(write({**i2v_expert(**SMALL), **extra}))


# ---- incomplete and other models


def without(*beginnings: str, **sizes: int) -> Described:
    return {name: value for name, value in i2v_expert(**{**SMALL, **sizes}).items() if not name.startswith(beginnings)}


@pytest.mark.parametrize(
    ("described", "named"),
    [
        (
            without("blocks.3.ffn.0.weight", blocks=5),
            "lacks 1 tensors of a Wan 2.2 I2V A14B expert, such as blocks.3.ffn.net.0.proj.weight",
        ),
        (without("blocks.3.", blocks=5), "lacks block 3"),
        (without("blocks.0.", blocks=5), "lacks block 0"),
        (without("head."), "such as proj_out.bias"),
        (without("patch_embedding.bias"), "patch_embedding.bias"),
        (without("patch_embedding"), "a part of a Wan model"),
        ({**without(), "blocks.1000000000.self_attn.q.weight": ("BF16", (128, 128))}, "lacks block 2"),
        ({**without(), "blocks.01.self_attn.q.weight": ("BF16", (128, 128))}, "lacks block 2"),
        (
            {**without(), "blocks.0.extra.weight": ("BF16", (1,))},
            "1 tensors that no Wan 2.2 I2V A14B expert has, such as blocks.0.extra.weight",
        ),
        ({**without(), "patch_embedding.weight": ("BF16", (100, 36, 1, 2, 2))}, "multiple of 128"),
        ({**without(), "patch_embedding.weight": ("BF16", (0, 36, 1, 2, 2))}, "multiple of 128"),
        ({**without(), "patch_embedding.weight": ("BF16", (128, 36, 1, 0, 2))}, "patch_embedding"),
        ({**without(), "blocks.0.ffn.0.weight": ("BF16", (256,))}, "blocks.0.ffn.0.weight is [256], not a matrix"),
        ({**without(), "text_embedding.0.weight": ("BF16", (128, 0))}, "text_embedding.0.weight is [128, 0], not a matrix"),
        (without(out=48), "gives 48 channels"),
        (without(channels=16), "text-to-video"),
        (i2v_21(**SMALL), "Wan 2.1 image-to-video"),
        ({"blocks.0.self_attn.q.lora_A.weight": ("BF16", (4, 128))}, "is a LoRA"),
        ({"double_blocks.0.img_attn.qkv.weight": ("BF16", (4, 4))}, "another family"),
        ({}, "without tensors"),
    ],
)
def test_what_is_no_expert(write: Callable[..., Path], described: Described, named: str) -> None:
    assert named in refused(write(described))


def test_a_part_of_several_is_named_by_its_file(write: Callable[..., Path]) -> None:
    message = refused(write(without("head."), name="diffusion_pytorch_model-00002-of-00006.safetensors"))
    assert "part 2 of 6" in message
    assert open_expert_file(write(without(), name="model-00001-of-00001.safetensors")).tensors


def test_an_all_in_one_checkpoint(write: Callable[..., Path]) -> None:
    described = {f"model.diffusion_model.{name}": value for name, value in fp8_scaled(**SMALL).items()}
    described |= {"model.diffusion_model.scaled_fp8": ("F8_E4M3", (2,)), "vae.conv2.weight": ("BF16", (16, 16, 1, 1, 1))}
    described |= {"text_encoders.umt5xxl.spiece_model": ("U8", (10,))}
    tensors = open_expert_file(write(described)).tensors
    assert tensors.keys() == {diffusers_name(name) for name in i2v_expert(**SMALL)}
    assert all((stored.scale is not None) == is_quantized(name, stored.shape) for name, stored in tensors.items())


# ---- files


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".PTH"])
def test_pickled_files_are_not_even_opened(tmp_path: Path, suffix: str) -> None:
    message = refused(tmp_path / f"not there{suffix}")
    assert suffix.lower() in message and "can run code" in message


def test_a_renamed_pickle(tmp_path: Path) -> None:
    path = tmp_path / "wan_high.safetensors"
    torch.save({"a": torch.zeros(2)}, path)
    assert "can run code" in refused(path)


@pytest.mark.parametrize("name", ["wan.txt", "wan", "wan.safetensors.part"])
def test_other_suffixes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x" * 100)
    assert "neither a .safetensors nor a .gguf file" in refused(tmp_path / name)


@pytest.mark.parametrize("name", ["wan.safetensors", "wan.gguf"])
def test_missing_files_and_folders(tmp_path: Path, name: str) -> None:
    assert "cannot be read: No such file" in refused(tmp_path / name)
    (tmp_path / name).mkdir()
    assert "is a folder" in refused(tmp_path / name)


def test_the_content_counts_more_than_the_suffix(tiny_single_files: Path, tmp_path: Path) -> None:
    path = tmp_path / "wan_high.safetensors"
    path.write_bytes((tiny_single_files / forms.file_names("gguf_q8_0")["transformer"]).read_bytes())
    assert open_expert_file(path).stored_dtype == "GGUF:Q8_0"
    (tmp_path / "wan.gguf").write_bytes((tiny_single_files / forms.file_names("original_bf16")["transformer"]).read_bytes())
    assert "does not begin with GGUF" in refused(tmp_path / "wan.gguf")


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "zero bytes": lambda whole: b"",
    "three bytes": lambda whole: whole[:3],
    "half a header": lambda whole: whole[:300],
    "an absurd length": lambda whole: b"\xff" * 8 + whole[8:],
    "no end": lambda whole: whole[:-1],
    "too long": lambda whole: whole + b"\0",
    "an unknown dtype": lambda whole: whole.replace(b'"BF16"', b'"BF17"', 1),
    "overlapping": lambda whole: whole.replace(b'"data_offsets": [36864,', b'"data_offsets": [36862,', 1),
    "an error page": lambda whole: b"<html><body>Not found, sorry about that</body></html>",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage(write: Callable[..., Path], damage: str) -> None:
    path = write(i2v_expert(**SMALL))
    whole = path.read_bytes()
    damaged = DAMAGE[damage](whole)
    assert damaged != whole
    path.write_bytes(damaged)
    assert "ownload" in refused(path)


def test_random_damage(write: Callable[..., Path]) -> None:
    """Whatever happens to the header: a description, or our error."""
    described, texts = marked({"format": "float8_e4m3fn"})
    path = write(described, values=texts)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    dice = random.Random(0)
    outcomes = {True: 0, False: 0}
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(dice.choice([1, 1, 2, 8])):
            damaged[dice.randrange(header)] = dice.choice([*b'0123456789{}[]",:-.abqkvF', dice.randrange(256)])
        path.write_bytes(damaged)
        try:
            files: ComponentFiles | None = open_expert_file(path)
        except CheckpointError as error:
            assert path.name in str(error)
            files = None
        outcomes[files is None] += 1
    assert outcomes[True] > 200


def test_the_scripts_headers_are_real_ones(write: Callable[..., Path]) -> None:
    """The hand-made files of this module can be read by others, too."""
    assert len(read_header(write(i2v_expert(**SMALL)))) == len(load_file(write(i2v_expert(**SMALL)))) == 15 + 2 * 27


@pytest.mark.parametrize("prefix", ["model.model.", "net.", "model.", "diffusion_model."])
def test_what_programs_put_before_the_names(write: Callable[..., Path], prefix: str) -> None:
    """As ComfyUI's own detection strips it."""
    files = open_expert_file(write({f"{prefix}{name}": kept for name, kept in i2v_expert(**SMALL).items()}))
    assert files.tensors.keys() == open_expert_file(write(i2v_expert(**SMALL))).tensors.keys()


@pytest.mark.parametrize("few", ["F8_E4M3", "I8"])
def test_few_bits_count_wherever_they_are(write: Callable[..., Path], few: str) -> None:
    """A file whose feed-forward alone is quantized stays so, though most of it is wide."""
    described = i2v_expert(**SMALL)
    described["blocks.0.self_attn.q.weight"] = (few, described["blocks.0.self_attn.q.weight"][1])
    described["blocks.0.self_attn.q.weight_scale"] = ("F32", ())
    files = open_expert_file(write(described))
    assert files.stored_dtype == few
    assert files.wide_dtype == "BF16", "which is what to compute in"
    assert open_expert_file(write(fp8_scaled(**SMALL))).wide_dtype is None
