"""ComfyUI's single files of the UMT5 text encoder: recognise one, check it, describe it. Reads headers and a few small tensors.

Such a file has transformers' names, UMT5's SentencePiece model in the tensor ``spiece_model``, and matrices that may be fp8 with a scale
each: ``<module>.scale_weight`` beside the marker ``scaled_fp8``, or in newer files ``<module>.weight_scale``, with the format in
``<module>.comfy_quant`` or in the file's metadata. Knows no devices; called by the loader of the text encoder and by lists of choices.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .component_file import check_tensors, read_component_file
from .recognise import NOT_WAN, UMT5, recognise
from .stored import StoredTensor

CHOOSE_TEXT_ENCODER = "Choose umt5_xxl_fp8_e4m3fn_scaled.safetensors as text_encoder."
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
_DTYPES = ("F32", "F16", "BF16", *FP8_DTYPES)
_SCALE_DTYPES = ("F32", "F16", "BF16")
_FP8_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_GGUF_REMEDY = "Or encode the prompts with the CLIP loader of ComfyUI-GGUF, and connect positive_conditioning and negative_conditioning."
_SHARED, _EMBEDDING_COPY, _LAST_NORM = "shared.weight", "encoder.embed_tokens.weight", "encoder.final_layer_norm.weight"
_ATTENTION, _FEED_FORWARD = "encoder.block.{}.layer.0.SelfAttention", "encoder.block.{}.layer.1.DenseReluDense"
_BIAS = f"{_ATTENTION}.relative_attention_bias.weight"
_TOKENIZER = "spiece_model"
# A tensor that only this text encoder has, for those that Wan's other models are not mistaken for.
_OTHERS = {
    "text_model.encoder.layers.0.mlp.fc1.weight": "a CLIP text encoder",
    "transformer.resblocks.0.ln_1.weight": "a CLIP text encoder",
    "model.layers.0.self_attn.k_proj.weight": "a language model, of the kind that FLUX.2, Qwen-Image or HunyuanVideo have for a text encoder",
}
# ``comfy_quant`` holds one short JSON object.
_MAX_FORMAT_BYTES = 4096


@dataclass(frozen=True)
class Umt5File:
    """A checked file of the UMT5 encoder.

    Attributes:
        path: of the file.
        tensors: transformers' parameter name -> what is stored, with its scale.
        config: of the ``UMT5Config`` that they belong to.
        tokenizer: the SentencePiece model, uint8 [bytes]; ``None`` where the file has none inside.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    tokenizer: StoredTensor | None

    @property
    def has_fp8(self) -> bool:
        return any(stored.dtype in FP8_DTYPES for stored in self.tensors.values())

    @property
    def wide_dtype(self) -> str:
        """safetensors' name of the dtype that most of the elements have, fp8 ones left out; "F32" where all are fp8."""
        counts = {"F32": 0}
        for stored in self.tensors.values():
            if stored.dtype not in FP8_DTYPES:
                counts[stored.dtype] = counts.get(stored.dtype, 0) + stored.elements
        return max(counts, key=lambda name: counts[name])


def is_text_encoder_file(path: Path) -> bool:
    """Whether a file serves as text encoder by itself; reads its header only. For lists of choices."""
    try:
        return open_umt5_file(path).tokenizer is not None
    except CheckpointError:
        return False


def open_umt5_file(path: Path) -> Umt5File:
    """Check a text encoder's file and describe it.

    Raises:
        CheckpointError: it is no UMT5 encoder in safetensors format, another quantization than fp8, or damaged.
    """
    remedy = f"{CHOOSE_TEXT_ENCODER} {_GGUF_REMEDY}" if path.suffix.lower() == ".gguf" else CHOOSE_TEXT_ENCODER
    stored, metadata = read_component_file(path, remedy)
    if _SHARED not in stored and _EMBEDDING_COPY in stored:
        stored[_SHARED] = stored[_EMBEDDING_COPY]
    _check_kind(path.name, stored)
    config = _config(path.name, stored)
    expected = dict(_expected(config))
    marked = _marked_dtypes(path.name, expected, stored, metadata)
    check_tensors(path.name, stored, expected, _DTYPES)
    tensors = {name: replace(stored[name], scale=_scale(path.name, name, stored, marked.get(name))) for name in expected}
    tokenizer = stored.get(_TOKENIZER)
    if tokenizer is not None and (tokenizer.dtype != "U8" or len(tokenizer.shape) != 1):
        raise CheckpointError(
            f"{path.name}: tensor {_TOKENIZER}, its tokenizer, is {tokenizer.dtype} {list(tokenizer.shape)}. Download it again."
        )
    return Umt5File(path, tensors, config, tokenizer)


def read_stored_bytes(stored: StoredTensor) -> bytes:
    """A small tensor's bytes as they are in its file.

    Raises:
        CheckpointError: the file can't be read (any more).
    """
    try:
        with stored.file.open("rb") as file:
            file.seek(stored.offset)
            content = file.read(stored.size_bytes)
    except OSError as error:
        raise CheckpointError(f"{stored.file} cannot be read: {error.strerror or error}. Check the file and its permissions.") from error
    if len(content) != stored.size_bytes:
        raise CheckpointError(f"{stored.file.name} has become shorter while it was read. Download it again.")
    return content


def _check_kind(name: str, stored: Mapping[str, StoredTensor]) -> None:
    kind = recognise(stored)
    if kind == UMT5 and _SHARED in stored and _LAST_NORM in stored:
        return
    what = next((words for key, words in _OTHERS.items() if key in stored), None)
    if kind == UMT5:
        what = "a UMT5 encoder under other names than ComfyUI's (Wan's own, or inside a larger file)"
    elif kind != NOT_WAN:
        what = kind.what
    words = f"is {what}" if what else "holds no text encoder that is known here"
    raise CheckpointError(f"{name} {words}, not Wan's text encoder in one file. {CHOOSE_TEXT_ENCODER}")


def _config(name: str, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """What the shapes say; the rest is the same for every UMT5."""
    query, gate = f"{_ATTENTION.format(0)}.q.weight", f"{_FEED_FORWARD.format(0)}.wi_0.weight"
    try:
        (vocab_size, d_model), (buckets, num_heads) = stored[_SHARED].shape, stored[_BIAS.format(0)].shape
        (inner, _), (d_ff, _) = stored[query].shape, stored[gate].shape
        d_kv = inner // num_heads
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{name} has not the tensors of a UMT5 encoder ({error}). {CHOOSE_TEXT_ENCODER}") from error
    num_layers = 0
    while _BIAS.format(num_layers) in stored:
        num_layers += 1
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": d_kv,
        "d_ff": d_ff,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def _expected(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter of the encoder, with its shape."""
    width, inner, d_ff = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    yield _SHARED, (config["vocab_size"], width)
    for block in range(config["num_layers"]):
        attention, feed_forward = _ATTENTION.format(block), _FEED_FORWARD.format(block)
        yield from ((f"{attention}.{matrix}.weight", (inner, width)) for matrix in "qkv")
        yield f"{attention}.o.weight", (width, inner)
        yield _BIAS.format(block), (config["relative_attention_num_buckets"], config["num_heads"])
        yield from ((f"{feed_forward}.{matrix}.weight", (d_ff, width)) for matrix in ("wi_0", "wi_1"))
        yield f"{feed_forward}.wo.weight", (width, d_ff)
        yield from ((f"encoder.block.{block}.layer.{layer}.layer_norm.weight", (width,)) for layer in (0, 1))
    yield _LAST_NORM, (width,)


def _marked_dtypes(
    name: str, expected: Mapping[str, Any], stored: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> dict[str, str]:
    """What parameters are marked as. Refuses quantizations that a scale beside an fp8 matrix does not describe."""
    try:
        layers: Any = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        formats = {str(module): layer.get("format") for module, layer in layers.items()}
        for module in (key.removesuffix(".weight") for key in expected):
            marker = stored.get(f"{module}.comfy_quant")
            if marker is not None and marker.size_bytes <= _MAX_FORMAT_BYTES:
                formats[module] = json.loads(read_stored_bytes(marker)).get("format")
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{name} says in a damaged way how it is quantized ({error}). Download it again.") from error
    for module, form in formats.items():
        if f"{module}.weight" in expected and form not in list(_FP8_FORMATS):  # it may be anything
            raise CheckpointError(f"{name} is quantized as {form}; of ComfyUI's formats only fp8 is read here. {CHOOSE_TEXT_ENCODER}")
    return {f"{module}.weight": _FP8_FORMATS[form] for module, form in formats.items() if f"{module}.weight" in expected}


def _is_linear(key: str) -> bool:
    """Embeddings and norms are left wide, or fp8 without a scale, by the programs that scale the rest."""
    return ".SelfAttention." in key and not key.endswith("relative_attention_bias.weight") or ".DenseReluDense." in key


def _scale(file_name: str, name: str, stored: Mapping[str, StoredTensor], marked: str | None) -> StoredTensor | None:
    """What a parameter's values must be multiplied by, in either spelling."""
    module, dtype = name.removesuffix(".weight"), stored[name].dtype
    if marked is not None and dtype in FP8_DTYPES and dtype != marked:
        raise CheckpointError(f"{file_name}: {name} is {dtype}, but marked as {marked}. Download it again.")
    scale = stored.get(f"{module}.scale_weight") or stored.get(f"{module}.weight_scale")
    if scale is None:
        scaled = marked is not None or ("scaled_fp8" in stored and _is_linear(name))
        if scaled and dtype in FP8_DTYPES:
            raise CheckpointError(f"{file_name} lacks {module}.weight_scale, without which {name} means nothing. Download it again.")
        return None
    rows = stored[name].shape[0]
    if scale.dtype not in _SCALE_DTYPES or scale.shape not in ((), (1,), (rows,), (rows, 1)):
        raise CheckpointError(f"{file_name}: tensor {scale.key}, a scale, is {scale.dtype} {list(scale.shape)}. Download it again.")
    return scale
