"""One model out of what was chosen: a folder in diffusers format, single files, or files in the place of some of a folder's parts.

Called by ``open_model``; reads headers only. Knows what must fit together, not the formats: those are the readers'.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .pairing import check_slot, noise_level, partner
from .single_file import open_expert_file
from .stored import EXPERT_WORDS, HIGH_NOISE, LOW_NOISE, ComponentFiles, ModelFiles, fingerprint_of
from .umt5_file import CHOOSE_TEXT_ENCODER, open_umt5_file
from .wan_vae_file import open_wan_vae_file

# Part -> what nodes and Python call its file.
_SLOTS = {HIGH_NOISE: "high_noise_model", LOW_NOISE: "low_noise_model"}
_NOTHING = ModelFiles("", {}, text_encoder=None, tokenizer=None, vae=None, fingerprint="")
TEXT_DIM = 4096  # diffusers' own value where a configuration says none
# So many names of files make a readable message.
_NAMED = 12


def assemble_model(
    folder: ModelFiles | None,
    *,
    high_noise: Path | None = None,
    low_noise: Path | None = None,
    text_encoder: Path | None = None,
    vae: Path | None = None,
) -> ModelFiles:
    """Check what was chosen and describe it as one model.

    Args:
        folder: has what no file is given for; ``None`` where everything comes from files. Then there need be no text encoder and no VAE:
            who needs them complains.

    Raises:
        CheckpointError: an expert is missing, a file is damaged or is not what its place is for, or the experts don't belong together.
    """
    base = folder or _NOTHING
    chosen = {HIGH_NOISE: high_noise, LOW_NOISE: low_noise, "text_encoder": text_encoder, "vae": vae}
    files = {part: file for part, file in chosen.items() if file is not None}
    experts = {**base.experts, **{part: open_expert_file(file) for part, file in files.items() if part in _SLOTS}}
    _check_both(experts)
    _check_different(experts)
    for part, file in files.items():
        if part in _SLOTS:
            check_slot(_telling_name(file), part)
    _check_alike(experts)
    has_tokenizer = text_encoder is not None and _check_text_encoder(text_encoder, base.tokenizer, experts[HIGH_NOISE])
    if vae is not None:
        open_wan_vae_file(vae)
    names = [base.name, *(files[part].stem for part in _SLOTS if part in files)]
    return ModelFiles(
        " + ".join(filter(None, names)),
        experts,
        text_encoder=text_encoder or base.text_encoder,
        tokenizer=None if has_tokenizer else base.tokenizer,
        vae=vae or base.vae,
        fingerprint="|".join([base.fingerprint, *(f"{part}:{file.resolve()}|{fingerprint_of([file])}" for part, file in files.items())]),
        boundary_ratio=base.boundary_ratio,
        notes=base.notes,
    )


def with_partner(high_noise: str | None, low_noise: str | None, choices: Sequence[str]) -> tuple[str | None, str | None, list[str]]:
    """Both experts' files by name, where one is chosen.

    Returns:
        The high noise expert's, the low noise expert's, and a note if one of them was found.

    Raises:
        CheckpointError: one is chosen, but it is the other expert's, or none of ``choices`` goes with it.
    """
    if (high_noise is None) == (low_noise is None):
        return high_noise, low_noise, []
    chosen, part, missing = (high_noise, HIGH_NOISE, LOW_NOISE) if high_noise is not None else (low_noise, LOW_NOISE, HIGH_NOISE)
    assert chosen is not None
    check_slot(chosen, part)
    others = [name for name in choices if name != chosen]
    found = partner(chosen, others)
    if found is None:
        raise CheckpointError(
            f"{_SLOTS[missing]} is not chosen, and no file's name goes with that of {chosen}. Choose {_SLOTS[missing]}; "
            f"there is {closest(chosen, others) or 'no other file'}."
        )
    note = f"{_SLOTS[missing]}: found {found}, which goes with {chosen}."
    return (chosen, found, [note]) if part == HIGH_NOISE else (found, chosen, [note])


def closest(name: str, choices: Sequence[str]) -> str:
    """The choices most like a name, for messages; "" where there are none."""
    return ", ".join(get_close_matches(name, choices, n=_NAMED, cutoff=0.0))


def _telling_name(file: Path) -> str:
    """A file's name, with its folder's if only that may say which expert it is."""
    return file.name if noise_level(file.name) else f"{file.parent.name}/{file.name}"


def _check_both(experts: Mapping[str, ComponentFiles]) -> None:
    missing = [part for part in _SLOTS if part not in experts]
    if missing:
        words = " and ".join(f"the {EXPERT_WORDS[part]}" for part in missing)
        slots = " and ".join(_SLOTS[part] for part in missing)
        raise CheckpointError(f"There is no file for {words}. Choose {slots}, or a model that has both experts.")


def _check_different(experts: Mapping[str, ComponentFiles]) -> None:
    high, low = ({tensor.file for tensor in experts[part].tensors.values()} for part in _SLOTS)
    shared = [one.name for one in high for other in low if _is_same(one, other)]
    if shared:
        raise CheckpointError(
            f"{shared[0]} is chosen for both experts. Wan 2.2 has two, in two files: choose the other one, with high or low in its name."
        )


def _is_same(one: Path, other: Path) -> bool:
    """Whether two names are one file, by a link for instance. Network drives of Windows give all files the number 0."""
    return one.resolve() == other.resolve() or (one.stat().st_ino != 0 and one.samefile(other))


def _check_alike(experts: Mapping[str, ComponentFiles]) -> None:
    high, low = (experts[part] for part in _SLOTS)
    both = sorted(key for key in high.config if key in low.config and not key.startswith("_"))
    for key in both:
        if _plain(high.config[key]) != _plain(low.config[key]):
            raise CheckpointError(
                f"{high.name} and {low.name} are not the experts of one model: {key} is {high.config[key]} and {low.config[key]}. "
                "Choose two files of the same model."
            )


def _check_text_encoder(path: Path, tokenizer: Path | None, expert: ComponentFiles) -> bool:
    """Whether a text encoder's file has its tokenizer inside.

    Raises:
        CheckpointError: it is none that these experts understand, or there is no tokenizer.
    """
    file = open_umt5_file(path)
    width, wanted = file.config["d_model"], expert.config.get("text_dim", TEXT_DIM)
    if width != wanted:
        raise CheckpointError(
            f"{path.name} is a UMT5 encoder {width} wide, but {expert.name} takes text {wanted} wide. {CHOOSE_TEXT_ENCODER}"
        )
    if file.tokenizer is None and tokenizer is None:
        raise CheckpointError(
            f"{path.name} has no tokenizer inside (the tensor spiece_model), as ComfyUI's own files have. {CHOOSE_TEXT_ENCODER}"
        )
    return file.tokenizer is not None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
