"""The LoRA node's work: files of ComfyUI's loras folder to what is added to which expert, and what came of it, in words."""

import logging
import math
from pathlib import Path

import folder_paths

from ..engine import ModelHandle, with_loras
from ..engine.checkpoints.assemble import closest
from ..engine.checkpoints.lora import LoraFile
from ..engine.checkpoints.pairing import noise_level, surely_for
from ..engine.checkpoints.stored import EXPERT_WORDS, HIGH_NOISE, LOW_NOISE, fingerprint_of
from ..engine.errors import CheckpointError, InvalidRequestError

logger = logging.getLogger(__name__)

NONE = "none"
_CATEGORY = "loras"
_LEVELS = {HIGH_NOISE: "high", LOW_NOISE: "low"}
# How many keys a message has room for.
_NAMED = 3


def lora_choices() -> list[str]:
    """The combos of the LoRA node: ComfyUI's LoRAs, after a word for "none of them"."""
    return [NONE, *folder_paths.get_filename_list(_CATEGORY)]


def add_loras(
    handle: ModelHandle, *, high_noise_lora: str, high_noise_strength: float, low_noise_lora: str, low_noise_strength: float
) -> tuple[ModelHandle, str]:
    """Add a LoRA to each expert; "none" or a strength of 0 leaves that expert as it is.

    Returns:
        A handle that has them behind those it had, and what each of them changes, in words.

    Raises:
        WanShardedError: a file is missing, damaged, no LoRA for Wan 2.2, or meant for the other expert; with the remedy.
    """
    chosen = {HIGH_NOISE: (high_noise_lora, high_noise_strength), LOW_NOISE: (low_noise_lora, low_noise_strength)}
    lines: list[str] = []
    for part, (name, strength) in chosen.items():
        path = _path(part, name)
        if not math.isfinite(strength):
            raise InvalidRequestError(f"{_LEVELS[part]}_noise_strength is {strength}; choose a number, 1 is usual.")
        if path is None:
            continue
        if strength == 0:
            lines.append(f"{EXPERT_WORDS[part].capitalize()}: {name} has a strength of 0 and is left out.")
            continue
        handle = with_loras(handle, **{f"{_LEVELS[part]}_noise": [(path, strength)]})
        lines += _report(part, name, strength, handle.loras[part][-1].file)
    return handle, "\n".join(lines) or "No LoRA is chosen: the model is as it was."


def fingerprint(*names: str | None) -> str:
    """Changes when one of the files does, so that ComfyUI does not reuse an old output for a new file."""
    known = (folder_paths.get_full_path(_CATEGORY, name) for name in names if name and name != NONE)
    try:
        return fingerprint_of([Path(path) for path in known if path])
    except OSError:
        return ""  # the node itself says what is wrong


def _path(part: str, name: str) -> Path | None:
    """The file behind a choice; ``None`` for "none".

    Raises:
        CheckpointError: there is no such choice (any more), or its name says that it is for the other expert.
    """
    if name == NONE:
        return None
    slot, names = f"{_LEVELS[part]}_noise_lora", folder_paths.get_filename_list(_CATEGORY)
    path = folder_paths.get_full_path(_CATEGORY, name)
    if path is None and name in names:
        raise CheckpointError(f"{slot}: {name!r} is a link that leads nowhere. Mend it, or choose another file.")
    if path is None or name not in names:  # the latter because a prompt comes from the network
        known = f"Choose one of: {closest(name, names)}" if names else "There is no other"
        raise CheckpointError(f"{slot}: there is no file {name!r} here. {known}. Files belong into ComfyUI's models/loras.")
    level = surely_for(name, names)
    if level is not None and level != _LEVELS[part]:
        raise CheckpointError(
            f"{slot} is {name}, whose name says that it is for the {level} noise expert. Choose it as {level}_noise_lora, and the "
            f"{EXPERT_WORDS[part]}'s own as {slot}. If it is meant for both, give the file a name without {level!r}."
        )
    return Path(path)


def _report(part: str, name: str, strength: float, file: LoraFile) -> list[str]:
    """What a file changes, and which of its keys fit nothing; both also in the log."""
    ranks = sorted({pair.rank for pair in file.low_rank.values()})
    kinds = [f"{len(file.low_rank)} weights (rank {_span(ranks)})"] if ranks else []
    kinds += [f"{len(file.differences)} {'other ' if ranks else ''}parameters as a whole"] if file.differences else []
    lines = [f"{EXPERT_WORDS[part].capitalize()}: {name} at strength {strength:g} changes {' and '.join(kinds)}."]
    logger.info("Wan Sharded LoRA: %s", lines[0])
    level = noise_level(name)
    if level is not None and _LEVELS[part] not in (level, surely_for(name, ())):
        lines.append(f"Its name has {level!r} in it: should that mean the {level} noise expert, choose it as {level}_noise_lora.")
    if file.unmatched:
        more = ", ..." if len(file.unmatched) > _NAMED else ""
        lines.append(
            f"Left out, since this expert has no weights of that name or shape: {', '.join(file.unmatched[:_NAMED])}{more} ({len(file.unmatched)} in all)"
        )
        logger.warning("Wan Sharded LoRA: %s: %s", name, lines[-1])
    return lines


def _span(numbers: list[int]) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
