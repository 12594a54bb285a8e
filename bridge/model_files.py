"""What ComfyUI's model folders offer the loader. Always through ``folder_paths``, so extra_model_paths.yaml works."""

import os
from functools import lru_cache
from pathlib import Path

import folder_paths

from ..engine.checkpoints.diffusers_folder import is_diffusers_folder
from ..engine.checkpoints.hub import WAN22_I2V_HUB_ID
from ..engine.errors import CheckpointError, UnsupportedError

SINGLE_FILES = "single files"
_CATEGORIES = ("diffusers", "diffusion_models")


def model_choices() -> list[str]:
    """The loader's ``model`` combo: the Hub id, every Wan I2V folder in diffusers format, "single files"."""
    return [WAN22_I2V_HUB_ID, *_folders(), SINGLE_FILES]


def default_model_choice() -> str:
    return WAN22_I2V_HUB_ID


def single_file_choices(category: str, first: str) -> list[str]:
    """A combo of the files of one of ComfyUI's categories, after a word for "none of them"."""
    return [first, *folder_paths.get_filename_list(category)]


def resolve_model(choice: str) -> str | Path:
    """The folder behind a choice, or the Hub id.

    Raises:
        CheckpointError: there is no such choice (any more).
    """
    if choice == WAN22_I2V_HUB_ID:
        return choice
    found = _folders().get(choice)
    if found is None:
        known = ", ".join(model_choices())
        raise CheckpointError(
            f"There is no model {choice!r} here. Choose one of: {known}. Folders in diffusers format are found in ComfyUI's "
            "models/diffusers and models/diffusion_models."
        )
    return found


def refuse_single_files(model: str, **widgets: tuple[str, str]) -> None:
    """Single files are read by a later version; until then choosing one is an error, never ignored.

    Args:
        model: the model choice.
        widgets: widget name -> (its value, the value that means "not used").

    Raises:
        UnsupportedError: one is chosen.
    """
    chosen = [f"{name} {value!r}" for name, (value, unused) in widgets.items() if value != unused]
    if model == SINGLE_FILES or chosen:
        what = ", ".join(chosen) or f"model {SINGLE_FILES!r}"
        raise UnsupportedError(
            f"Single-file checkpoints are not read by this version yet ({what}). Choose a model folder in diffusers format or the "
            "Hub id, set high_noise_model and low_noise_model to 'none', and text_encoder and vae to 'from model'."
        )


def _folders() -> dict[str, Path]:
    """Name in the combo -> folder. The name is the path inside the category's folder, with forward slashes."""
    found: dict[str, Path] = {}
    for category in _CATEGORIES:
        for root in folder_paths.get_folder_paths(category):
            for name in _scan(root, _stamp(root)):
                found.setdefault(name, Path(root) / name)
    return dict(sorted(found.items()))


def _stamp(root: str) -> tuple[int, ...]:
    """Changes when something is added to or taken from ``root``, its subfolders or theirs: as deep as models are looked for."""
    folders = [Path(root), *_subfolders(Path(root))]
    for folder in folders[1:]:
        folders += _subfolders(folder)
    return tuple(stamp for folder in folders if (stamp := _changed(folder)))


def _changed(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def _subfolders(folder: Path) -> list[Path]:
    """Those that may be looked into; one that may not must not keep the others from being offered."""
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir())
    except OSError:
        return []


@lru_cache(maxsize=32)
def _scan(root: str, stamp: tuple[int, ...]) -> tuple[str, ...]:
    """Wan folders one and two levels below a root; cached, because schemas ask at every request."""
    candidates = _subfolders(Path(root))
    nested = [sub for path in candidates if not (path / "model_index.json").is_file() for sub in _subfolders(path)]
    return tuple(path.relative_to(root).as_posix() for path in (*candidates, *nested) if is_diffusers_folder(path))
