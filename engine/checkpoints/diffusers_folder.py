"""A Wan 2.2 model as a folder in diffusers format: recognise it, check it, describe its parts.

Checking reads configurations and headers only, so a broken model is named within a second, at the loader node.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .safetensors_header import TensorEntry, read_header

HIGH_NOISE, LOW_NOISE = "transformer", "transformer_2"
EXPERT_WORDS = {HIGH_NOISE: "high noise expert", LOW_NOISE: "low noise expert"}
SUPPORTED_PIPELINES = ("WanImageToVideoPipeline",)
LATENT_CHANNELS = 16
# Noise, the picture's latents, and four channels that say which frames are given.
INPUT_CHANNELS = 2 * LATENT_CHANNELS + 4
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model")


@dataclass(frozen=True)
class ComponentFiles:
    """The weights of one component: which file holds which tensor, and what the headers say of it."""

    folder: Path
    tensors: dict[str, tuple[Path, TensorEntry]]

    @property
    def stored_dtype(self) -> str:
        """The format's name of the dtype most of the elements have ("F32", "BF16", ...)."""
        counts: dict[str, int] = {}
        for _, entry in self.tensors.values():
            count = 1
            for n in entry.shape:
                count *= n
            counts[entry.dtype] = counts.get(entry.dtype, 0) + count
        return max(counts, key=lambda name: counts[name])


@dataclass(frozen=True)
class DiffusersFolder:
    """A checked Wan 2.2 image-to-video model.

    Attributes:
        path: the model's folder.
        boundary_ratio: where the high noise expert hands over, as the model's own configuration says; ``None`` for one expert.
        experts: the files of "transformer" and "transformer_2".
        fingerprint: changes when a file of the model does; part of the identity of what is loaded.
    """

    path: Path
    boundary_ratio: float | None
    experts: dict[str, ComponentFiles]
    fingerprint: str


def is_diffusers_folder(path: Path) -> bool:
    """Whether a folder looks like a Wan image-to-video model; cheap, for lists of choices."""
    try:
        index = _read_json(path / "model_index.json")
    except CheckpointError:
        return False
    return index.get("_class_name") in SUPPORTED_PIPELINES


def open_diffusers_folder(path: Path) -> DiffusersFolder:
    """Check a model folder and describe it.

    Raises:
        CheckpointError: it is no Wan 2.2 I2V model in diffusers format, or a part is missing or damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"There is no folder {path}. Check the name, or choose another model.")
    if not (path / "model_index.json").is_file():
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
        if not (path / part / "config.json").is_file():
            word = EXPERT_WORDS.get(part, part.replace("_", " "))
            raise CheckpointError(f"{path.name} lacks its {word}: {part}/config.json is missing. Complete the download.")
    if not (path / "tokenizer").is_dir():
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
    return DiffusersFolder(path, boundary if isinstance(boundary, float) else None, experts, _fingerprint(path))


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
    tensors: dict[str, tuple[Path, TensorEntry]] = {}
    for file in files:
        tensors.update({name: (file, entry) for name, entry in read_header(file).items()})
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
    return ComponentFiles(folder, tensors)


def _block_number(tensor: str) -> str:
    head, _, rest = tensor.partition("blocks.")
    number = rest.partition(".")[0]
    return number if not head and number.isascii() and number.isdigit() else ""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component, every one that its index names.

    Raises:
        CheckpointError: none, one missing, or only pickled files (which could run code when loaded).
    """
    for stem in _WEIGHT_STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        single = folder / f"{stem}.safetensors"
        if index.is_file():
            weight_map = _read_json(index).get("weight_map")
            names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
            if not names:
                raise CheckpointError(f"{folder.name}/{index.name} names no weight files. Download it again.")
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise CheckpointError(f"{folder.parent.name}/{folder.name} lacks {', '.join(missing)}. Complete the download.")
            return [folder / name for name in names]
        if single.is_file():
            return [single]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise CheckpointError(f"{folder.name} holds only pickled weights (.bin, .pt), which can run code. Use a safetensors version.")
    raise CheckpointError(f"{folder.parent.name}/{folder.name} holds no safetensors weights. Complete the download.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check the file and its permissions.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no valid JSON. Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object. Download it again.")
    return value


def _fingerprint(path: Path) -> str:
    stamps = []
    for part in (HIGH_NOISE, LOW_NOISE, "vae", "text_encoder", "tokenizer"):
        for file in sorted((path / part).iterdir()):
            stat = file.stat()
            stamps.append(f"{part}/{file.name}:{stat.st_size}:{stat.st_mtime_ns}")
    return "|".join(stamps)
