"""One expert as one file, safetensors or GGUF, in any of the forms people have: recognise it, check it, describe it.

Wan's own names and diffusers', with and without a prefix; float32, float16, bfloat16; fp8 and int8 with and without scales. What makes the
model, its configuration, is read off the tensors: no network, no config.json.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .gguf_file import MAGIC as GGUF_MAGIC
from .gguf_file import check_widenable, read_gguf_header
from .recognise import CHOOSE_EXPERT, EXPERT, UMT5, UMT5_GGUF, recognise, refusal
from .safetensors_header import read_header_and_metadata
from .stored import FEW_BITS, LATENT_CHANNELS, ComponentFiles, StoredTensor
from .wan_names import PREFIXES, block_number, diffusers_name, without_prefix

PICKLED = (".pt", ".pt2", ".pth", ".ckpt", ".bin", ".pkl")
# torch's files are ZIP archives of pickles.
_ZIP_MAGIC = b"PK\x03\x04"
HEAD_DIM = 128

_SCALES = ("scale_weight", "weight_scale")
# Scales of activations, which are not quantized here, and marks of the format.
_IGNORED = ("scale_input", "input_scale", "comfy_quant", "scaled_fp8")
_SCALE_DTYPES = ("F32", "F16", "BF16")
_DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8")
# ComfyUI's names of what is one number, or one a row, times the values.
_FORMATS = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fn_rowwise": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8_tensorwise": "I8",
    "int8_rowwise": "I8",
}
_MARK_BYTES = 4096
_CHOOSE_FORM = "Choose a bf16, fp16, fp8_scaled or GGUF version of the model."

_EMBEDDER = "condition_embedder"
_OUTSIDE = (
    *(f"{module}.{kind}" for module in ("patch_embedding", "proj_out", f"{_EMBEDDER}.time_proj") for kind in ("weight", "bias")),
    *(
        f"{_EMBEDDER}.{embedder}.linear_{number}.{kind}"
        for embedder in ("time_embedder", "text_embedder")
        for number in (1, 2)
        for kind in ("weight", "bias")
    ),
    "scale_shift_table",
)
_IN_BLOCK = (
    *(
        f"{attention}.{module}.{kind}"
        for attention in ("attn1", "attn2")
        for module in ("to_q", "to_k", "to_v", "to_out.0")
        for kind in ("weight", "bias")
    ),
    *(f"{attention}.{norm}.weight" for attention in ("attn1", "attn2") for norm in ("norm_q", "norm_k")),
    *(f"{module}.{kind}" for module in ("norm2", "ffn.net.0.proj", "ffn.net.2") for kind in ("weight", "bias")),
    "scale_shift_table",
)


def open_expert_file(path: Path) -> ComponentFiles:
    """Check a file with a Wan 2.2 I2V A14B expert and describe it.

    Raises:
        CheckpointError: it is something else, damaged, incomplete, or stored in a way that can't be read; says what to choose instead.
        UnsupportedError: a GGUF file, and the ``gguf`` package is not installed.
    """
    is_gguf = _is_gguf(path)
    stored, metadata = (read_gguf_header(path), {}) if is_gguf else read_header_and_metadata(path)
    part = re.search(r"-(\d+)-of-(\d+)\b", path.stem)
    if part is not None and int(part[2]) > 1:
        raise CheckpointError(
            f"{path.name} is part {int(part[1])} of {int(part[2])} of a model. Choose a model in one file, or as model the folder of one in "
            "diffusers format."
        )
    kind = recognise(stored)
    if kind is not EXPERT:
        raise refusal(path.name, UMT5_GGUF if is_gguf and kind is UMT5 else kind)
    own = _without_others(stored)
    _check_formats(path, own, metadata)
    tensors = _with_scales(path.name, own)
    if is_gguf:
        check_widenable(path.name, tensors)
        tensors = {name: _with_leading_one(name, tensor) for name, tensor in tensors.items()}
    _check_names(path.name, tensors)
    return ComponentFiles(path.name, _config(path.name, tensors), tensors)


def _is_gguf(path: Path) -> bool:
    """Which of the two formats a file has; others are refused without being read."""
    suffix = path.suffix.lower()
    if suffix in PICKLED:
        raise CheckpointError(
            f"{path.name} is a pickled file ({suffix}), which can run code. Use a .safetensors or .gguf version of the model."
        )
    if os.path.isdir(path):
        raise CheckpointError(f"{path.name} is a folder, not a file. Choose it as model, if it is a model in diffusers format.")
    try:
        with path.open("rb") as file:
            begin = file.read(4)
    except (OSError, ValueError) as error:  # the latter of names that can be none
        raise CheckpointError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}. Check the file and its permissions."
        ) from error
    if begin == _ZIP_MAGIC:
        raise CheckpointError(f"{path.name} is a ZIP archive or a pickled file, which can run code. Use a .safetensors or .gguf version.")
    if begin == GGUF_MAGIC or suffix == ".gguf":
        return True
    if suffix in (".safetensors", ".sft"):
        return False
    raise CheckpointError(f"{path.name} is neither a .safetensors nor a .gguf file. {CHOOSE_EXPERT}")


def _without_others(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The transformer's tensors without prefix; a checkpoint with a prefix may hold a text encoder and a VAE beside it."""
    for prefix in PREFIXES:
        own = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
        if own:
            return own
    return dict(stored)


# ---- quantized weights


def _check_formats(path: Path, stored: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> None:
    """Check what ComfyUI's marks say about how weights are kept. They lie among the tensors as JSON, or all together in the metadata."""
    formats = _formats_in_metadata(path.name, metadata)
    try:
        with path.open("rb") as file:
            for key in [key for key in stored if key.endswith(".comfy_quant")]:
                mark = stored[key]
                if mark.size_bytes > _MARK_BYTES:
                    raise CheckpointError(f"{path.name}: {key} is {mark.size_bytes} bytes, too long for a mark. Download it again.")
                file.seek(mark.offset)
                formats[key.removesuffix(".comfy_quant")] = _parsed(path.name, key, file.read(mark.size_bytes))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check the file and its permissions.") from error
    for module, described in formats.items():
        if f"{module}.weight" in stored:
            _check_format(path.name, module, described)
            _check_marked(path.name, module, stored, _FORMATS[described["format"] if isinstance(described, dict) else described])
    if "scaled_fp8" in stored:
        matrices = [
            key for key, tensor in stored.items() if tensor.dtype in FEW_BITS and len(tensor.shape) == 2 and key.endswith(".weight")
        ]
        lacking = [key for key in matrices if not _has_scale(stored, key.removesuffix(".weight"))]
        if lacking and lacking == matrices:
            raise CheckpointError(f"{path.name} lacks the scales of its fp8 weights, without which they mean nothing. Download it again.")
        if lacking:
            raise _lacks_scale(path.name, stored[lacking[0]])


def _lacks_scale(name: str, weight: StoredTensor) -> CheckpointError:
    return CheckpointError(f"{name} lacks the scale of {weight.key}, without which it means nothing. Download it again.")


def _has_scale(stored: Mapping[str, StoredTensor], module: str) -> bool:
    return any(f"{module}.{scale}" in stored for scale in _SCALES)


def _formats_in_metadata(name: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    text = metadata.get("_quantization_metadata")
    if text is None:
        return {}
    layers = _parsed(name, "_quantization_metadata", text).get("layers")
    if not isinstance(layers, dict):
        raise CheckpointError(f"{name}: its _quantization_metadata names no layers. Download it again.")
    return {without_prefix(module): described for module, described in layers.items()}


def _parsed(name: str, key: str, text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: {key} is no valid JSON. Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: {key} is no JSON object. Download it again.")
    return value


def _check_format(name: str, module: str, described: Any) -> None:
    described = described if isinstance(described, dict) else {"format": described}
    nested = described.get("params")
    if described.get("convrot") or (isinstance(nested, dict) and nested.get("convrot")):
        raise CheckpointError(f"{name} keeps {module} as rotated (convrot) values, which can't be read here. {_CHOOSE_FORM}")
    if described.get("format") not in list(_FORMATS):
        raise CheckpointError(f"{name} keeps {module} in the format {described.get('format')}, which can't be read here. {_CHOOSE_FORM}")


def _check_marked(name: str, module: str, stored: Mapping[str, StoredTensor], dtype: str) -> None:
    """Check that a weight which is marked as one of so few bits is that, and has its scale."""
    weight = stored[f"{module}.weight"]
    if weight.dtype in FEW_BITS and weight.dtype != dtype:
        raise CheckpointError(f"{name}: {weight.key} is {weight.dtype}, but marked as {dtype}. Download it again.")
    if weight.dtype in FEW_BITS and not _has_scale(stored, module):
        raise _lacks_scale(name, weight)


def _with_scales(name: str, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Diffusers' parameter name -> tensor, with the scale that belongs to it."""
    tensors: dict[str, StoredTensor] = {}
    scales: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        module, _, last = key.rpartition(".")
        if last in _IGNORED:
            continue
        where, ours = (scales, f"{diffusers_name(module)}.weight") if last in _SCALES else (tensors, diffusers_name(key))
        if ours in where:
            raise CheckpointError(f"{name} holds {ours} twice, as {where[ours].key} and {tensor.key}. Download it again.")
        where[ours] = tensor
    for ours, scale in scales.items():
        if ours not in tensors:
            raise CheckpointError(f"{name} has the scale {scale.key}, but not the weight it belongs to. Download it again.")
        tensors[ours] = dataclasses.replace(tensors[ours], scale=_checked_scale(name, tensors[ours], scale))
    for tensor in tensors.values():
        if tensor.gguf_type is None and tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{name}: {tensor.key} is stored as {tensor.dtype}, which can't be read here. {_CHOOSE_FORM}")
        if tensor.dtype == "I8" and tensor.scale is None:
            raise CheckpointError(f"{name}: {tensor.key} is int8 without a scale. {_CHOOSE_FORM}")
    return tensors


def _checked_scale(name: str, weight: StoredTensor, scale: StoredTensor) -> StoredTensor:
    rows = weight.shape[0] if weight.shape else 1
    if scale.dtype not in _SCALE_DTYPES or scale.shape not in ((), (1,), (rows,), (rows, 1)):
        raise CheckpointError(
            f"{name}: {scale.key} is {scale.dtype} {list(scale.shape)}, where one value, or one for each of {rows} rows, can be read. {_CHOOSE_FORM}"
        )
    return scale


def _with_leading_one(name: str, tensor: StoredTensor) -> StoredTensor:
    """llama.cpp drops sizes of one that come last in GGUF's order, first in torch's: those of the tables [1, 6, D] and [1, 2, D]."""
    if name.endswith("scale_shift_table") and len(tensor.shape) == 2:
        return dataclasses.replace(tensor, shape=(1, *tensor.shape))
    return tensor


# ---- the model


def expert_names(num_layers: int) -> set[str]:
    """Diffusers' names of all parameters of an I2V expert."""
    return {*_OUTSIDE, *(f"blocks.{index}.{inside}" for index in range(num_layers) for inside in _IN_BLOCK)}


def _check_names(name: str, tensors: Mapping[str, StoredTensor]) -> None:
    blocks = {number for number in map(block_number, tensors) if number is not None}
    missing_blocks = [str(index) for index in range(len(blocks)) if str(index) not in blocks]
    if missing_blocks:
        raise CheckpointError(f"{name} lacks block {missing_blocks[0]}, but has {len(blocks)} others. Download it again.")
    expected = expert_names(len(blocks))
    missing, unknown = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if missing:
        raise CheckpointError(f"{name} lacks {len(missing)} tensors of a Wan 2.2 I2V A14B expert, such as {missing[0]}. Download it again.")
    if unknown:
        raise CheckpointError(
            f"{name} has {len(unknown)} tensors that no Wan 2.2 I2V A14B expert has, such as {tensors[unknown[0]].key}: it is another model, or "
            f"kept in a way that can't be read here. {CHOOSE_EXPERT}"
        )


def _config(name: str, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The arguments of diffusers' ``WanTransformer3DModel``, by the shapes of the weights."""

    def size(tensor: str, dim: int) -> int:
        shape = tensors[f"{tensor}.weight"].shape
        if len(shape) != 2 or not math.prod(shape):
            raise CheckpointError(f"{name}: {tensors[f'{tensor}.weight'].key} is {list(shape)}, not a matrix. Download it again.")
        return shape[dim]

    width, in_channels, *patch_size = tensors["patch_embedding.weight"].shape
    if width % HEAD_DIM or not width or not math.prod(patch_size):
        raise CheckpointError(
            f"{name}: its patch_embedding is {list(tensors['patch_embedding.weight'].shape)}; the first size of Wan's is a multiple of {HEAD_DIM}. "
            "Download it again."
        )
    out_channels = size("proj_out", 0) / math.prod(patch_size)
    if out_channels != LATENT_CHANNELS:
        raise CheckpointError(f"{name} gives {out_channels:g} channels, a Wan 2.2 I2V A14B expert {LATENT_CHANNELS}. {CHOOSE_EXPERT}")
    return {
        "patch_size": tuple(patch_size),
        "num_attention_heads": width // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "in_channels": in_channels,
        "out_channels": LATENT_CHANNELS,
        "text_dim": size(f"{_EMBEDDER}.text_embedder.linear_1", 1),
        "freq_dim": size(f"{_EMBEDDER}.time_embedder.linear_1", 1),
        "ffn_dim": size("blocks.0.ffn.net.0.proj", 0),
        "num_layers": 1 + max(int(number) for number in map(block_number, tensors) if number is not None),
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }
