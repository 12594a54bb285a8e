"""LoRA files for Wan's experts: what each adds to which weight, in diffusers' names. Reads headers and scalars, never the matrices."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch

from ..errors import CheckpointError
from .lora_keys import ALPHA, DIFFERENCE, DOWN, UP, module_of, target_of
from .safetensors_header import read_header
from .stored import StoredTensor, fingerprint_of

_SAFETENSORS = (".safetensors", ".sft")
_PICKLES = (".ckpt", ".pt", ".pt2", ".pth", ".bin", ".pkl")
_MATRIX_DTYPES = ("F32", "F16", "BF16", "F8_E4M3")
_SCALAR_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64, "I32": torch.int32,
}  # fmt: skip
_FITTING = "Choose a LoRA made for Wan 2.2 I2V A14B."
_PLAIN = "Choose a version of it with plain matrices (lora_down and lora_up, or lora_A and lora_B)."
_WIDTHS = {1536: "as Wan 2.1 1.3B has", 3072: "as Wan 2.2 5B has", 5120: "as the 14B models have"}
# A piece of a key -> whose keys have it, the surest first.
_OTHER_MODELS = {
    "down_blocks": "a Stable Diffusion model",
    "input_blocks": "a Stable Diffusion model",
    "joint_blocks": "Stable Diffusion 3",
    "double_blocks": "Flux or HunyuanVideo",
    "single_transformer_blocks": "Flux",
    "transformer_blocks": "another model (Qwen-Image, LTX-Video or the like)",
    "vace_blocks": "Wan VACE",
    "_img.": "the image layers that only Wan 2.1 has",
    "img_emb": "the image layers that only Wan 2.1 has",
    "lora_te": "a text encoder",
    "text_model": "a text encoder",
    "token_embedding": "a text encoder",
    "encoder.block.": "a text encoder",
    "decoder.": "a VAE",
}


@dataclass(frozen=True)
class LowRank:
    """What a LoRA adds to one module's weight: ``factor * up @ down``.

    Attributes:
        down: [rank, in], or a convolution's [rank, in, t, h, w].
        up: [out, rank], or [out, rank, 1, 1, 1].
        factor: alpha / rank; 1 where the file has no alpha.
    """

    down: StoredTensor
    up: StoredTensor
    factor: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class LoraFile:
    """A checked LoRA file.

    Attributes:
        path: of the file.
        fingerprint: changes when the file does.
        low_rank: diffusers' module name ("blocks.0.attn1.to_q") -> what is added to its weight.
        differences: diffusers' parameter name ("blocks.0.attn1.to_q.bias") -> what is added to it, of its shape.
        unmatched: keys of the file that belong to no weight of a Wan transformer.
    """

    path: Path
    fingerprint: str
    low_rank: Mapping[str, LowRank]
    differences: Mapping[str, StoredTensor]
    unmatched: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA for one expert, and how strongly it is added."""

    file: LoraFile
    strength: float


def open_lora_file(path: Path) -> LoraFile:
    """Check a LoRA file and describe it.

    Raises:
        CheckpointError: it is damaged, no LoRA for Wan, or of a kind that cannot be added; with the remedy.
    """
    _refuse_other_formats(path)
    header = read_header(path)
    found: dict[str, dict[str, StoredTensor]] = {role: {} for role in (DOWN, UP, ALPHA, DIFFERENCE)}
    unmatched: list[str] = []
    for key, stored in header.items():
        target = target_of(key)
        if target is None:
            unmatched.append(key)
            continue
        if not target.supported:
            raise CheckpointError(f"{path.name} is a {target.role}, which can't be added here ({key}). {_PLAIN}")
        other = found[target.role].setdefault(target.name, stored)
        if other is not stored:
            raise CheckpointError(f"{path.name} says twice what is added to {target.name}: {other.key} and {key}. Choose another file.")
    modules = {**found[DOWN], **found[UP]}
    if not modules and not found[DIFFERENCE]:
        raise CheckpointError(_what_it_is(path.name, header))
    for key in found[ALPHA].keys() - modules.keys():  # beside a difference it says nothing
        unmatched.append(found[ALPHA].pop(key).key)
    _check_values(path.name, (*found[DOWN].values(), *found[UP].values(), *found[DIFFERENCE].values()))
    alphas = _read_alphas(path, found[ALPHA])
    low_rank = {module: _low_rank(path.name, module, found[DOWN], found[UP], alphas) for module in modules}
    both = next((module for module in low_rank if f"{module}.weight" in found[DIFFERENCE]), None)
    if both is not None:
        raise CheckpointError(
            f"{path.name} has low-rank matrices ({low_rank[both].down.key}) and a whole difference "
            f"({found[DIFFERENCE][f'{both}.weight'].key}) for the same weight; programs don't agree on what that means. Choose another file."
        )
    return LoraFile(path, fingerprint_of([path]), low_rank, found[DIFFERENCE], tuple(sorted(unmatched)))


def check_fits(lora: LoraFile, shapes: Mapping[str, tuple[int, ...]], expert_words: str) -> None:
    """Check that everything a LoRA adds has the shape of what it is added to.

    Args:
        lora: the file.
        shapes: the expert's parameters, by diffusers' names.
        expert_words: what to call the expert in messages.

    Raises:
        CheckpointError: something doesn't fit; says for what model the LoRA is, where that can be told.
    """
    width, expert_width = _lora_width(lora), shapes.get("blocks.0.attn1.to_q.weight", (0,))[0]
    if width and expert_width and width != expert_width:
        raise CheckpointError(
            f"{lora.path.name} is for a model of width {width}{_width_words(width)}, the {expert_words} has {expert_width}. {_FITTING}"
        )
    for module, pair in lora.low_rank.items():
        weight = _shape_of(lora, shapes, f"{module}.weight", expert_words)
        changed = (pair.up.shape[0], *pair.down.shape[1:])
        if changed not in (weight, (*weight[:1], math.prod(weight[1:]))):  # a convolution's matrix may be flat
            raise _misfit(lora, pair.down.key, changed, weight, expert_words)
    for name, stored in lora.differences.items():
        shape = _shape_of(lora, shapes, name, expert_words)
        if stored.shape != shape:
            raise _misfit(lora, stored.key, stored.shape, shape, expert_words)


def fitted(lora: LoraFile, shapes: Mapping[str, tuple[int, ...]], expert_words: str) -> LoraFile:
    """A LoRA as one expert can take it.

    LoRAs for text to video are used with image to video as well, whose patch embedding takes more channels: what such a file has for that
    one weight is left out, and counts as unmatched.

    Args and errors: as for :func:`check_fits`, which everything else must pass.
    """
    weight, module = "patch_embedding.weight", "patch_embedding"
    shape, pair, difference = shapes.get(weight, ()), lora.low_rank.get(module), lora.differences.get(weight)
    other_channels = (pair is not None and pair.down.elements // pair.rank != math.prod(shape[1:])) or (
        difference is not None and difference.shape[:1] == shape[:1] and difference.shape != shape
    )
    has_more = bool(lora.low_rank.keys() - {module}) or bool(lora.differences.keys() - {weight})
    if other_channels and has_more:
        keys = (*((pair.down.key, pair.up.key) if pair else ()), *((difference.key,) if difference else ()))
        lora = replace(
            lora,
            low_rank={name: low for name, low in lora.low_rank.items() if name != module},
            differences={name: stored for name, stored in lora.differences.items() if name != weight},
            unmatched=(*lora.unmatched, *keys),
        )
    check_fits(lora, shapes, expert_words)
    return lora


def _refuse_other_formats(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise CheckpointError(
            f"{path.name} is a pickled file ({suffix}), which can run code; it was not opened. Choose a safetensors version."
        )
    if suffix not in _SAFETENSORS:
        raise CheckpointError(f"{path.name} is no safetensors file. Choose a LoRA in safetensors format.")


def _check_values(name: str, tensors: Iterable[StoredTensor]) -> None:
    for stored in tensors:
        if stored.dtype not in _MATRIX_DTYPES:
            raise CheckpointError(
                f"{name}: {stored.key} has the dtype {stored.dtype}; LoRAs are read in {', '.join(_MATRIX_DTYPES)}. Choose another version of it."
            )
        if not stored.elements:
            raise CheckpointError(f"{name}: {stored.key} holds nothing (its shape is {_words(stored.shape)}). Download it again.")


def _low_rank(
    name: str, module: str, downs: Mapping[str, StoredTensor], ups: Mapping[str, StoredTensor], alphas: Mapping[str, float]
) -> LowRank:
    down, up = downs.get(module), ups.get(module)
    if down is None or up is None:
        lacking = "lora_up (lora_B)" if up is None else "lora_down (lora_A)"
        raise CheckpointError(f"{name} has {(down or ups[module]).key}, but not the {lacking} that belongs to it. Download it again.")
    for stored in (down, up):
        if len(stored.shape) not in (2, 5):
            raise CheckpointError(f"{name}: {stored.key} is no matrix (its shape is {_words(stored.shape)}). Choose another file.")
    if up.shape[1] != down.shape[0] or math.prod(up.shape[2:]) != 1:
        raise CheckpointError(
            f"{name}: {down.key} ({_words(down.shape)}) and {up.key} ({_words(up.shape)}) are no pair of one rank. Choose another file."
        )
    return LowRank(down, up, alphas[module] / down.shape[0] if module in alphas else 1.0)


def _read_alphas(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, float]:
    try:
        with path.open("rb") as file:
            return {module: _scalar(path.name, file, entry) for module, entry in stored.items()}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check the file and its permissions.") from error


def _scalar(name: str, file: BinaryIO, stored: StoredTensor) -> float:
    if stored.elements != 1 or stored.dtype not in _SCALAR_DTYPES:
        raise CheckpointError(
            f"{name}: {stored.key} should be one number, it is {_words(stored.shape)} of {stored.dtype}. Choose another version of it."
        )
    file.seek(stored.offset)
    raw = bytearray(file.read(stored.size_bytes))
    value = torch.frombuffer(raw, dtype=_SCALAR_DTYPES[stored.dtype]).to(torch.float64).item()
    if not math.isfinite(value):
        raise CheckpointError(f"{name}: {stored.key} is {value}, which is no strength. Download it again.")
    return value


def _what_it_is(name: str, header: Mapping[str, StoredTensor]) -> str:
    """Why a file in which nothing is a Wan LoRA's is none."""
    if not header:
        return f"{name} holds no tensors. Download it again."
    if any((module_of(key.removesuffix(".weight")) or "").endswith(".attn1.to_q") for key in header):
        return f"{name} is a whole Wan model, not a LoRA. Choose a LoRA here, and the model in Wan Sharded Loader."
    keys = sorted(header)
    for piece, whose in _OTHER_MODELS.items():
        if any(piece in key for key in keys):
            return f"{name} belongs to {whose}: nothing in it fits a Wan 2.2 expert. {_FITTING}"
    return f"{name} has nothing that fits a Wan 2.2 expert; its first keys are {', '.join(keys[:3])}. {_FITTING}"


def _lora_width(lora: LoraFile) -> int | None:
    """The width of the model that a LoRA is for, as its attention layers show."""
    inputs = (pair.down.shape[1] for module, pair in lora.low_rank.items() if ".attn" in module)
    norms = (stored.shape[0] for name, stored in lora.differences.items() if ".attn" in name)
    return next(inputs, None) or next(norms, None)


def _width_words(width: int) -> str:
    return f", {_WIDTHS[width]}" if width in _WIDTHS else ""


def _shape_of(lora: LoraFile, shapes: Mapping[str, tuple[int, ...]], name: str, expert_words: str) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is not None:
        return shape
    raise CheckpointError(f"{lora.path.name} changes {name}, which the {expert_words} does not have. {_FITTING}")


def _misfit(lora: LoraFile, key: str, shape: tuple[int, ...], there: tuple[int, ...], expert_words: str) -> CheckpointError:
    if len(shape) == len(there) == 5 and shape[1] != there[1]:  # the patch embedding, which takes the channels
        return CheckpointError(
            f"{lora.path.name} is for a model that takes {shape[1]} channels (text to video takes 16), the {expert_words} takes {there[1]}. {_FITTING}"
        )
    return CheckpointError(
        f"{lora.path.name} does not fit the {expert_words}: {key} changes a weight of {_words(shape)}, there it is {_words(there)}. {_FITTING}"
    )


def _words(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
