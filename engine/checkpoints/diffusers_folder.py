"""A Wan 2.2 model as a folder in diffusers format: recognise it, check it, describe its parts.

Checking reads configurations and headers only, so a broken model is named within a second, at the loader node.
"""

import json
import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .safetensors_header import read_header
from .stored import (
    EXPERT_WORDS,
    HIGH_NOISE,
    INPUT_CHANNELS,
    LATENT_CHANNELS,
    LOW_NOISE,
    ComponentFiles,
    ModelFiles,
    StoredTensor,
    fingerprint_of,
)

SUPPORTED_PIPELINES = ("WanImageToVideoPipeline",)
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
# More are no number of a block.
_BLOCK_DIGITS = 6


def is_diffusers_folder(path: Path) -> bool:
    """Whether a folder looks like a Wan image-to-video model; cheap, for lists of choices."""
    try:
        index = _read_json(path / "model_index.json")
    except CheckpointError:
        return False
    return index.get("_class_name") in SUPPORTED_PIPELINES


def open_diffusers_folder(path: Path) -> ModelFiles:
    """Check a model folder and describe it.

    Raises:
        CheckpointError: it is no Wan 2.2 I2V model in diffusers format, or a part is missing or damaged.
    """
    if not os.path.isdir(path):
        raise CheckpointError(f"There is no folder {path}. Check the name, or choose another model.")
    if not os.path.isfile(path / "model_index.json"):
        raise CheckpointError(
            f"{path} holds no model in diffusers format (model_index.json is missing). Choose a folder like a download of "
            "Wan-AI/Wan2.2-I2V-A14B-Diffusers, with transformer, transformer_2, vae, text_encoder, tokenizer and scheduler inside."
        )
    index = _read_json(path / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in SUPPORTED_PIPELINES:
        raise CheckpointError(f"{path.name} is a {pipeline} model, not Wan image-to-video. Choose a {SUPPORTED_PIPELINES[0]} model.")
    if LOW_NOISE not in index or index[LOW_NOISE] in (None, [None, None]):
        raise CheckpointError(
            f"{path.name} has one expert, as Wan 2.1 has. This version makes videos with Wan 2.2 I2V A14B, which has a high noise and a low "
            "noise expert. Choose Wan-AI/Wan2.2-I2V-A14B-Diffusers or a model made from it."
        )
    for part in (HIGH_NOISE, LOW_NOISE, "vae", "text_encoder"):
        if not os.path.isfile(path / part / "config.json"):
            word = EXPERT_WORDS.get(part, part.replace("_", " "))
            raise CheckpointError(f"{path.name} lacks its {word}: {part}/config.json is missing. Complete the download.")
    if not os.path.isdir(path / "tokenizer"):
        raise CheckpointError(f"{path.name} lacks its tokenizer folder. Complete the download.")
    experts = {part: _expert_files(path / part) for part in (HIGH_NOISE, LOW_NOISE)}
    for part in ("vae", "text_encoder"):
        for file in weight_files(path / part):
            read_header(file)
    latent_channels = component_config(path / "vae").get("z_dim", LATENT_CHANNELS)
    if latent_channels != LATENT_CHANNELS:
        raise CheckpointError(
            f"The VAE of {path.name} makes {latent_channels}-channel latents; Wan 2.2 I2V A14B needs Wan 2.1's VAE ({LATENT_CHANNELS} channels)."
            " Download the model again."
        )
    boundary = index.get("boundary_ratio")
    return ModelFiles(
        path.name,
        experts,
        text_encoder=path / "text_encoder",
        tokenizer=path / "tokenizer",
        vae=path / "vae",
        fingerprint=f"{path}|{_fingerprint(path)}",
        boundary_ratio=boundary if isinstance(boundary, float) else None,
    )


def component_config(folder: Path) -> dict[str, Any]:
    """A component's config.json.

    Raises:
        CheckpointError: missing or damaged.
    """
    return _read_json(folder / "config.json")


def _expert_files(folder: Path) -> ComponentFiles:
    files = weight_files(folder)
    config = component_config(folder)
    if config.get("_class_name") != "WanTransformer3DModel":
        raise CheckpointError(
            f"{folder.name} in {folder.parent.name} is a {config.get('_class_name')}, not a Wan transformer (WanTransformer3DModel)."
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors.update(read_header(file))
    if not tensors:
        raise CheckpointError(f"{folder.parent.name}/{folder.name} holds no tensors. Download it again.")
    # Before a model of that many blocks is built.
    blocks = 1 + max((int(number) for number in map(_block_number, tensors) if number), default=-1)
    if config.get("num_layers", 40) != blocks:
        raise CheckpointError(
            f"{folder.parent.name}/{folder.name} has the weights of {blocks} blocks, but its config.json says num_layers "
            f"{config.get('num_layers')}. Download it again."
        )
    if config.get("in_channels", LATENT_CHANNELS) != INPUT_CHANNELS:
        raise CheckpointError(
            f"{folder.parent.name}/{folder.name} takes {config.get('in_channels')} channels, a Wan 2.2 image-to-video expert takes "
            f"{INPUT_CHANNELS}. Choose an I2V model."
        )
    return ComponentFiles(f"{folder.parent.name}/{folder.name}", config, tensors)


def _block_number(tensor: str) -> str:
    head, _, rest = tensor.partition("blocks.")
    number = rest.partition(".")[0]
    return number if not head and number.isascii() and number.isdigit() and len(number) <= _BLOCK_DIGITS else ""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component, every one that its index names.

    Raises:
        CheckpointError: none, one missing, or only pickled files (which could run code when loaded).
    """
    for stem in _WEIGHT_STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        single = folder / f"{stem}.safetensors"
        if os.path.isfile(index):
            weight_map = _read_json(index).get("weight_map")
            names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
            if not names:
                raise CheckpointError(f"{folder.name}/{index.name} names no weight files. Download it again.")
            missing = [name for name in names if not os.path.isfile(folder / name)]
            if missing:
                raise CheckpointError(f"{folder.parent.name}/{folder.name} lacks {', '.join(missing)}. Complete the download.")
            return [folder / name for name in names]
        if os.path.isfile(single):
            return [single]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise CheckpointError(f"{folder.name} holds only pickled weights (.bin, .pt), which can run code. Use a safetensors version.")
    raise CheckpointError(f"{folder.parent.name}/{folder.name} holds no safetensors weights. Complete the download.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check the file and its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON. Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object. Download it again.")
    return value


def _fingerprint(path: Path) -> str:
    parts = (HIGH_NOISE, LOW_NOISE, "vae", "text_encoder", "tokenizer")
    return fingerprint_of([file for part in parts for file in sorted((path / part).iterdir())])
