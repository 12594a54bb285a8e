"""What ComfyUI's model folders offer the loader. Always through ``folder_paths``, so extra_model_paths.yaml works."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import folder_paths

from ..engine.checkpoints.assemble import closest, with_partner
from ..engine.checkpoints.diffusers_folder import is_diffusers_folder
from ..engine.checkpoints.hub import WAN22_I2V_HUB_ID, cached_folder
from ..engine.checkpoints.umt5_file import is_text_encoder_file
from ..engine.checkpoints.wan_vae_file import is_vae_file
from ..engine.errors import CheckpointError

SINGLE_FILES, NONE, FROM_MODEL = "single files", "none", "from model"
_CATEGORIES = ("diffusers", "diffusion_models")
# How many folders below a category's own are looked into.
_MODEL_LEVELS, _GGUF_LEVELS = 2, 4


@dataclass(frozen=True)
class Choice:
    """What the loader's widgets mean on this computer.

    Attributes:
        model: a folder or the Hub id; ``None`` where everything comes from files.
        files: argument of ``open_model`` -> its file; ``None`` = from the model, or nowhere.
        notes: what was found by itself, and what is missing, for people.
    """

    model: str | Path | None
    files: dict[str, Path | None]
    notes: tuple[str, ...] = ()


def model_choices() -> list[str]:
    """The loader's ``model`` combo: the Hub id, every Wan I2V folder in diffusers format, "single files"."""
    return [WAN22_I2V_HUB_ID, *_folders(), SINGLE_FILES]


def default_model_choice() -> str:
    return WAN22_I2V_HUB_ID


def expert_choices() -> list[str]:
    """The combo of an expert's files: ComfyUI's diffusion models, and the GGUF files beside them, which ComfyUI itself does not list."""
    return [NONE, *_expert_names()]


def part_choices(category: str) -> list[str]:
    """The combo of another part's files, those of one of ComfyUI's categories."""
    return [FROM_MODEL, *folder_paths.get_filename_list(category)]


def choose(model: str, high_noise_model: str, low_noise_model: str, text_encoder: str, vae: str) -> Choice:
    """Turn the loader's widgets into a model and files.

    A lone expert's partner, and the text encoder and VAE that single files do not name, are looked for here, and noted.

    Raises:
        CheckpointError: there is no such choice (any more), or nothing that goes with it.
    """
    notes: list[str] = []
    high_noise, low_noise = (None if name == NONE else name for name in (high_noise_model, low_noise_model))
    has_files = high_noise is not None or low_noise is not None
    single = model == SINGLE_FILES
    if model == WAN22_I2V_HUB_ID and has_files and cached_folder(model) is None:
        single = True
        notes.append(f"{model} is not on this computer and not downloaded, since files are chosen for the experts.")
    if single:
        for widget, name in (("high_noise_model", high_noise), ("low_noise_model", low_noise)):
            _expert_file(widget, name)  # one that is not there has no partner either
        high_noise, low_noise, found = with_partner(high_noise, low_noise, _expert_names())
        notes += found
    files = {
        "high_noise_model": _expert_file("high_noise_model", high_noise),
        "low_noise_model": _expert_file("low_noise_model", low_noise),
        "text_encoder": _part_file("text_encoder", text_encoder),
        "vae": _part_file("vae", vae),
    }
    if single and has_files:
        for widget in [widget for widget in _PARTS if files[widget] is None]:
            files[widget] = _find(_PARTS[widget])
            notes.append(_found_words(widget, files[widget]))
    return Choice(None if single else resolve_model(model), files, tuple(notes))


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


def _expert_file(widget: str, name: str | None) -> Path | None:
    if name is None:
        return None
    path = _gguf_files().get(name) or folder_paths.get_full_path("diffusion_models", name)
    return _existing(widget, name, path, _expert_names(), "diffusion_models")


def _part_file(widget: str, name: str) -> Path | None:
    if name == FROM_MODEL:
        return None
    category = _PARTS[widget].category
    return _existing(widget, name, folder_paths.get_full_path(category, name), folder_paths.get_filename_list(category), category)


def _existing(widget: str, name: str, path: str | Path | None, names: list[str], folder: str) -> Path:
    if path is None and name in names:
        raise CheckpointError(f"{widget}: {name!r} is a link that leads nowhere. Mend it, or choose another file.")
    if path is None or name not in names:  # the latter because a prompt comes from the network
        known = f"Choose one of: {closest(name, names)}" if names else "There is no other"
        raise CheckpointError(f"{widget}: there is no file {name!r} here. {known}. Files belong into ComfyUI's models/{folder}.")
    return Path(path)


@dataclass(frozen=True)
class _Part:
    """How a part that single files do not name is looked for.

    Attributes:
        category: ComfyUI's name of where such files are.
        what: for people.
        is_one: whether a file is one.
        words: the more of them a name has, the sooner the file is looked at.
        needs_word: and without any it is not looked at.
        instead: what serves where there is none.
    """

    category: str
    what: str
    is_one: Callable[[Path], bool]
    words: tuple[str, ...]
    needs_word: bool
    instead: str


_PARTS = {
    "text_encoder": _Part("text_encoders", "UMT5 text encoder", is_text_encoder_file, ("umt5", "xxl"), False, "CONDITIONING"),
    # Others made VAEs of the same shape (Qwen-Image): there only the name tells.
    "vae": _Part("vae", "Wan 2.1 VAE", is_vae_file, ("wan",), True, "a VAE"),
}


def _find(part: _Part) -> Path | None:
    def words_in(name: str) -> int:
        return sum(word in name.lower() for word in part.words)

    for name in sorted(folder_paths.get_filename_list(part.category), key=words_in, reverse=True):
        path = folder_paths.get_full_path(part.category, name)
        if path and (words_in(name) or not part.needs_word) and _is_one(part.is_one, path, *_stats(path)):
            return Path(path)
    return None


def _found_words(widget: str, found: Path | None) -> str:
    part = _PARTS[widget]
    if found:
        return f"{widget}: found {found.name}."
    return f"{widget}: found no {part.what} in models/{part.category}. Choose one, or connect {part.instead} to Wan I2V Sampler."


def _stats(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:
        return (0, 0)
    return stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=256)
def _is_one(is_one: Callable[[Path], bool], path: str, changed_ns: int, size_bytes: int) -> bool:
    """Cached, because ComfyUI asks for fingerprints at every prompt; the last two are what a new file changes."""
    return is_one(Path(path))


def _folders() -> dict[str, Path]:
    """Name in the combo -> folder. The name is the path inside the category's folder, with forward slashes."""
    found: dict[str, Path] = {}
    for category in _CATEGORIES:
        for root in folder_paths.get_folder_paths(category):
            for name in _scan(root, _stamp(root, _MODEL_LEVELS)):
                found.setdefault(name, Path(root) / name)
    return dict(sorted(found.items()))


def _expert_names() -> list[str]:
    return sorted({*folder_paths.get_filename_list("diffusion_models"), *_gguf_files()})


def _gguf_files() -> dict[str, Path]:
    """Name in the combo -> GGUF file. As ComfyUI's own names, the path inside the category's folder."""
    roots = folder_paths.get_folder_paths("diffusion_models")
    if "unet_gguf" in folder_paths.folder_names_and_paths:  # other packs' category for the same files
        roots += folder_paths.get_folder_paths("unet_gguf")
    found: dict[str, Path] = {}
    for root in dict.fromkeys(roots):
        for name in _scan_gguf(root, _stamp(root, _GGUF_LEVELS)):
            found.setdefault(name, Path(root) / name)
    return found


def _stamp(root: str, levels: int) -> tuple[int, ...]:
    """Changes when something is added to or taken from ``root`` or a folder in it, so many levels down."""
    return tuple(stamp for folder in _folders_within(root, levels) if (stamp := _changed(folder)))


def _folders_within(root: str, levels: int) -> list[Path]:
    found = level = [Path(root)]
    for _ in range(levels):
        level = [below for folder in level for below in _subfolders(folder)]
        found = found + level
    return found


def _changed(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def _subfolders(folder: Path) -> list[Path]:
    """Those that may be looked into; one that may not must not keep the others from being offered."""
    return [Path(entry.path) for entry in _entries(folder) if os.path.isdir(entry.path)]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


@lru_cache(maxsize=32)
def _scan(root: str, stamp: tuple[int, ...]) -> tuple[str, ...]:
    """Wan folders one and two levels below a root; cached, because schemas ask at every request."""
    candidates = _subfolders(Path(root))
    nested = [sub for path in candidates if not os.path.isfile(path / "model_index.json") for sub in _subfolders(path)]
    return tuple(path.relative_to(root).as_posix() for path in (*candidates, *nested) if is_diffusers_folder(path))


@lru_cache(maxsize=32)
def _scan_gguf(root: str, stamp: tuple[int, ...]) -> tuple[str, ...]:
    """GGUF files in a root and below it."""
    files = [
        entry.path for folder in _folders_within(root, _GGUF_LEVELS) for entry in _entries(folder) if entry.name.lower().endswith(".gguf")
    ]
    return tuple(os.path.relpath(file, root) for file in files if os.path.isfile(file))
