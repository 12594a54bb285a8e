"""What the ``WAN_SHARDED_MODEL`` socket carries: a description of what to load, without the weights."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from .checkpoints.assemble import assemble_model, with_partner
from .checkpoints.diffusers_folder import open_diffusers_folder
from .checkpoints.hub import OnProgress, cached_folder, download_model, is_hub_id
from .checkpoints.lora import LoraChoice, fitted, open_lora_file
from .checkpoints.pairing import surely_for
from .checkpoints.stored import EXPERT_WORDS, HIGH_NOISE, LOW_NOISE, ModelFiles
from .errors import CheckpointError, InvalidRequestError
from .planning.placement import DEVICE_MAPS, OFFLOADS
from .weights.precision import WEIGHT_DTYPES

EXECUTIONS = ("auto", "parallel", "sequential")
# A LoRA's file, and how strongly it is added.
Lora = tuple[str | Path, float]
_LEVELS = {HIGH_NOISE: "high", LOW_NOISE: "low"}


@dataclass(frozen=True)
class ModelHandle:
    """A model and how to spread it; loads nothing.

    Attributes:
        model: the checked files.
        weight_dtype: one of ``WEIGHT_DTYPES``.
        device_map: "auto" or "balanced".
        execution: "parallel" (all devices compute every block), "sequential" (each the blocks that live there), or "auto".
        offload: "auto", "cpu" or "none".
        max_memory_gib: visible GPU index -> GiB; 0 or missing = automatic, -1 = leave out.
        loras: expert part name -> its LoRAs.
        node_id: the loader node that made it, if any; no part of the identity.

    Raises:
        InvalidRequestError: an unknown choice.
    """

    model: ModelFiles
    weight_dtype: str = "default"
    device_map: str = "balanced"
    execution: str = "auto"
    offload: str = "auto"
    max_memory_gib: Mapping[int, float] = field(default_factory=dict)
    loras: Mapping[str, tuple[LoraChoice, ...]] = field(default_factory=dict)
    node_id: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        choices = {"weight_dtype": WEIGHT_DTYPES, "device_map": DEVICE_MAPS, "execution": EXECUTIONS, "offload": OFFLOADS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InvalidRequestError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}.")


def open_model(
    model: str | Path | None = None,
    *,
    high_noise_model: str | Path | None = None,
    low_noise_model: str | Path | None = None,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    max_memory_gib: Mapping[int, float] | None = None,
    weight_dtype: str = "default",
    device_map: str = "balanced",
    execution: str = "auto",
    offload: str = "auto",
    node_id: str | None = None,
    on_download: OnProgress | None = None,
) -> ModelHandle:
    """Describe a model for :func:`engine.generate`; checks the files, loads no weights.

    Args:
        model: a folder in diffusers format, or a Hub id (downloaded on first use, unless both experts come from files); ``None`` where
            everything comes from files.
        high_noise_model: a file (safetensors or GGUF) in the place of the model's high noise expert. With ``model=None``, one expert's file
            is enough if the other's is beside it under the same name with "low" instead of "high".
        low_noise_model: the same for the low noise expert.
        text_encoder: a file in the place of the model's text encoder. Not needed for prompts that are embeddings already.
        vae: a file in the place of the model's VAE. Not needed if a run is given one.
        max_memory_gib: visible GPU index -> the most this may use there, GiB, everything included. 0 or missing =
            automatic, -1 = leave that GPU out.
        on_download: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: the model is missing, incomplete or no Wan 2.2 I2V model.
        InvalidRequestError: an unknown choice.
    """
    high, low, encoder, vae_file = (None if file is None else Path(file) for file in (high_noise_model, low_noise_model, text_encoder, vae))
    notes: list[str] = []
    if model is None:
        high, low, notes = _beside(high, low)
    folder = None if model is None else _model_folder(str(model), high is not None and low is not None, on_download)
    if model is not None and folder is None and None in (encoder, vae_file):
        notes = [f"{model} was not downloaded, since both experts come from files: give files for text_encoder and vae as well."]
    whole = None if folder is None else open_diffusers_folder(folder)
    files = whole
    if files is None or any((high, low, encoder, vae_file)):
        files = assemble_model(whole, high_noise=high, low_noise=low, text_encoder=encoder, vae=vae_file)
    files = replace(files, notes=(*files.notes, *notes))
    return ModelHandle(files, weight_dtype, device_map, execution, offload, dict(max_memory_gib or {}), node_id=node_id)


def with_loras(handle: ModelHandle, *, high_noise: Iterable[Lora] = (), low_noise: Iterable[Lora] = ()) -> ModelHandle:
    """A model with LoRAs, behind those it has already; checks the files, loads no weights.

    Args:
        handle: from :func:`open_model`; stays what it is.
        high_noise: safetensors files for the high noise expert, each with its strength: 1 as it was trained, 0 not at all.
        low_noise: the same for the low noise expert.

    Raises:
        CheckpointError: a file is missing, damaged, no LoRA that fits the expert, or named as the other expert's; with the remedy.
        InvalidRequestError: a strength is no number.
    """
    loras = dict(handle.loras)
    for part, chosen in ((HIGH_NOISE, high_noise), (LOW_NOISE, low_noise)):
        shapes = {name: stored.shape for name, stored in handle.model.experts[part].tensors.items()}
        for path, strength in chosen:
            file = Path(path)
            _check_lora_choice(file, strength, part)
            if strength:
                lora = fitted(open_lora_file(file), shapes, EXPERT_WORDS[part])
                loras[part] = (*loras.get(part, ()), LoraChoice(lora, strength))
    return replace(handle, loras=loras)


def _check_lora_choice(file: Path, strength: float, part: str) -> None:
    if not isinstance(strength, int | float) or not math.isfinite(strength):
        raise InvalidRequestError(f"The strength of {file.name} is {strength}; choose a number, 1 is usual.")
    level = surely_for(file.name, _names_beside(file))
    if level is not None and level != _LEVELS[part]:
        raise CheckpointError(
            f"{file.name} is given for the {EXPERT_WORDS[part]}, but its name says that it is for the {level} noise expert. Give it as "
            f"{level}_noise. If it is meant for both, give the file a name without {level!r}."
        )


def _names_beside(file: Path) -> list[str]:
    try:
        return os.listdir(file.parent)
    except (OSError, ValueError):  # reading the file says what is wrong
        return []


def _model_folder(model: str, has_experts: bool, on_download: OnProgress | None) -> Path | None:
    """The folder of a model; ``None`` for one of the Hub that is not here and whose experts, nearly all of it, are not needed."""
    path = Path(model)
    if os.path.exists(path) or not is_hub_id(model):
        return path
    return cached_folder(model) if has_experts else download_model(model, on_download)


def _beside(high_noise: Path | None, low_noise: Path | None) -> tuple[Path | None, Path | None, list[str]]:
    """Both experts' files; where one is given, the other from the same folder, with a note."""
    given = high_noise or low_noise
    if given is None or (high_noise and low_noise) or not os.path.isfile(given):
        return high_noise, low_noise, []
    names = sorted(file.name for file in given.parent.iterdir())
    high, low, notes = with_partner(*(file.name if file else None for file in (high_noise, low_noise)), choices=names)
    return given.with_name(high) if high else None, given.with_name(low) if low else None, notes
