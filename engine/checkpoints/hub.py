"""Fetch a model from the Hugging Face Hub, once, with progress and clear words when that can't be done."""

import errno
import inspect
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import tqdm as hub_tqdm

from ..errors import CheckpointError
from ..planning.devices import gib
from .diffusers_folder import weight_files

WAN22_I2V_HUB_ID = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
_WANTED = ("transformer/", "transformer_2/", "vae/", "text_encoder/", "tokenizer/", "scheduler/")
_WANTED_ENDINGS = (".safetensors", ".json", ".txt", ".model")
_WITH_WEIGHTS = ("transformer", "transformer_2", "vae", "text_encoder")
# Asked for last: its presence in the cache says that everything else arrived.
_LAST = "model_index.json"
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}

# Called with (bytes done, bytes in all); may raise to stop the download.
OnProgress = Callable[[int, int], None]


def is_hub_id(name: str) -> bool:
    """Whether a name has the form "owner/model" rather than that of a path."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None


def cached_folder(hub_id: str) -> Path | None:
    """The model's snapshot folder if a whole download is in the Hub cache; asks no network."""
    index = try_to_load_from_cache(hub_id, _LAST)
    if not isinstance(index, str):
        return None
    folder = Path(index).parent
    try:
        # Other programs fetch the index first, so it alone says little.
        for part in _WITH_WEIGHTS:
            weight_files(folder / part)
    except CheckpointError:
        return None
    complete = all((folder / part / "config.json").is_file() for part in _WITH_WEIGHTS)
    return folder if complete and any((folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "spiece.model")) else None


def download_model(hub_id: str, on_progress: OnProgress | None = None) -> Path:
    """The folder of a Hub model, downloaded into the Hub cache where it isn't there yet.

    A stopped download goes on with the first file that had not arrived. Only the files a pipeline needs are fetched.

    Raises:
        CheckpointError: offline, gated, unknown, not enough disk space, or the connection failed; with the remedy.
    """
    try:
        return cached_folder(hub_id) or _download(hub_id, on_progress or (lambda done, total: None))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{hub_id} asks for permission first: accept its terms at https://huggingface.co/{hub_id}, then log in with `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"There is no model {hub_id!r} on the Hugging Face Hub (or it is private), nor a folder of that name here. Check the name."
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise CheckpointError(_offline_words(hub_id)) from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"The Hugging Face Hub refused {hub_id}: {error}. Try again later.") from error
    except (HTTPError, OSError) as error:  # connection failures: an HTTPError with httpx, an OSError with requests
        if getattr(error, "errno", None) in _DISK_ERRORS:
            raise CheckpointError(
                f"{hub_id} could not be saved in the Hub cache ({constants.HF_HUB_CACHE}): {error}. Make room, check the permissions, or "
                "point the environment variable HF_HOME to another disk."
            ) from error
        raise CheckpointError(f"{_offline_words(hub_id)} ({type(error).__name__}: {error})") from error


def _offline_words(hub_id: str) -> str:
    return (
        f"{hub_id} is not on this computer yet and the Hugging Face Hub can't be reached. Connect to the internet (and unset "
        "HF_HUB_OFFLINE), or put a folder in diffusers format into ComfyUI's models/diffusers folder and choose that."
    )


def _download(hub_id: str, on_progress: OnProgress) -> Path:
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(_offline_words(hub_id))
    info = HfApi().model_info(hub_id, files_metadata=True)
    siblings = info.siblings or []
    files = {s.rfilename: int(s.size or 0) for s in siblings if s.rfilename.startswith(_WANTED) and s.rfilename.endswith(_WANTED_ENDINGS)}
    if not any(s.rfilename == _LAST for s in siblings):
        raise CheckpointError(f"{hub_id} is not in diffusers format ({_LAST} is missing). Choose a ...-Diffusers model.")
    total = sum(files.values())
    missing = {n: size for n, size in files.items() if not isinstance(try_to_load_from_cache(hub_id, n, revision=info.sha), str)}
    _check_space(hub_id, sum(missing.values()))
    done = total - sum(missing.values())
    for name, size in missing.items():
        _fetch(hub_id, name, info.sha, lambda within, before=done: on_progress(before + within, total))
        done += size
        on_progress(done, total)
    # By the branch and not by the commit: only then the cache remembers which commit the branch is, for the next call.
    folder = Path(hf_hub_download(hub_id, _LAST)).parent
    return folder if folder.name == info.sha else _download(hub_id, on_progress)  # the model changed meanwhile


def _check_space(hub_id: str, needed: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    existing = next((folder for folder in (cache, *cache.parents) if folder.exists()), None)
    if existing is None:
        raise CheckpointError(
            f"The Hub cache is to be at {cache}, but there is no such drive. Connect it, or point the environment variable HF_HOME to another."
        )
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"{hub_id} needs {gib(needed)} more on disk, but {gib(free)} are free where the Hub cache is ({cache}). "
            "Make room, or point the environment variable HF_HOME to another disk."
        )


def _fetch(hub_id: str, name: str, revision: str | None, on_bytes: Callable[[int], None]) -> None:
    furthest = 0
    stopped: list[BaseException] = []

    class Reporter(hub_tqdm):
        """The Hub's own progress bar, also telling us; raising from ``update`` stops the transfer."""

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal furthest
            before = self.n
            shown = super().update(n)
            if self.n == before:  # bars that are not shown, as without a terminal, do not count
                self.n += n or 0
            furthest = max(furthest, int(self.n))  # a Xet transfer has two bars
            try:
                on_bytes(furthest)
            except BaseException as error:
                stopped.append(error)
                raise
            return shown

    # Older versions of huggingface_hub report per file only.
    known = "tqdm_class" in inspect.signature(hf_hub_download).parameters
    options: Any = {"tqdm_class": Reporter} if known else {}
    hf_hub_download(hub_id, name, revision=revision, **options)
    if stopped:  # a Xet transfer calls from a thread of its own, where raising stops nothing
        raise stopped[0]
