"""Video Export: ComfyUI's output folder, metadata, progress and cancel around the engine's writer.

Owns where the file goes and what it carries. Knows nothing of codecs; called by ``nodes/export.py``.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.input_impl import VideoFromFile
from comfy_api.latest import io, ui

from ..engine.errors import InvalidRequestError
from ..engine.video.failures import export_error
from ..engine.video.formats import video_format
from ..engine.video.frames import check_batch
from ..engine.video.writer import write_video


def export(
    *,
    images: torch.Tensor,
    fps: float,
    filename_prefix: str,
    format: str,
    quality: int,
    audio: Mapping[str, Any] | None,
    prompt: Any,
    extra_pnginfo: Mapping[str, Any] | None,
) -> tuple[VideoFromFile, str, ui.PreviewVideo]:
    """Write ``images`` to a numbered file in ComfyUI's output folder.

    Args:
        images: [T, H, W, C] float 0..1, any device.
        fps: frames per second.
        filename_prefix: folder and beginning of the name inside the output folder; %year%, %width% and so on are filled in.
        format: a key of the engine's ``FORMATS``.
        quality: the encoder's quality number.
        audio: AUDIO or None.
        prompt: the API prompt, or None.
        extra_pnginfo: what else ComfyUI wants saved (``workflow``), or None.

    Returns:
        The VIDEO, the file's path, and the preview to show on the node.

    Raises:
        InvalidRequestError, ExportError: as :func:`~..engine.video.writer.write_video`, and for a prefix that is empty or leaves the output folder.
        InterruptProcessingException: the user pressed cancel; no file is left.
    """
    row = video_format(format)
    check_batch(images)
    folder, name, counter, subfolder = _save_path(filename_prefix, width=images.shape[2], height=images.shape[1])
    path = _claim(folder, name, counter, row.extension)
    progress = comfy.utils.ProgressBar(len(images))

    def on_frame(written: int, total: int | None) -> None:
        # The progress bar's hook raises the interrupt too, but only where a server has installed one.
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update_absolute(written, total)

    whole = False
    try:
        write_video(
            images, path, fps=fps, format=format, quality=quality, audio=audio, metadata=_metadata(prompt, extra_pnginfo), on_frame=on_frame
        )
        whole = True
    finally:
        # Not `except`: newer ComfyUI interrupts with a BaseException.
        if not whole:
            with suppress(OSError):  # the error on its way says more
                path.unlink(missing_ok=True)
    preview = ui.PreviewVideo([ui.SavedResult(path.name, subfolder, io.FolderType.output)])
    return VideoFromFile(str(path)), str(path), preview


def checked_prefix(filename_prefix: str, *, windows: bool = os.name == "nt") -> str:
    """``filename_prefix`` with forward slashes, so that a workflow made on Windows names the same folder anywhere.

    Args:
        filename_prefix: what the user typed.
        windows: whether the name must suit Windows.

    Raises:
        InvalidRequestError: the prefix is empty, absolute, leaves the output folder, or cannot be a file name.
    """
    prefix = filename_prefix.replace("\\", "/")
    parts = [part for part in prefix.split("/") if part not in ("", ".")]
    remedy = "Give a folder and a name inside ComfyUI's output folder, such as video/wan."
    if not parts:
        raise InvalidRequestError(f"filename_prefix is {filename_prefix!r}, which names no file. {remedy}")
    if prefix.startswith("/") or (windows and prefix[1:2] == ":") or ".." in parts:
        raise InvalidRequestError(f"filename_prefix {filename_prefix!r} could leave ComfyUI's output folder. {remedy}")
    # On Windows "a:b" is no error: the video would vanish into a hidden stream of the file "a".
    bad = sorted(set(prefix) & set('\0<>:"|?*' if windows else "\0"))
    if bad:
        raise InvalidRequestError(
            f"filename_prefix {filename_prefix!r} has {' '.join(map(repr, bad))}, which file names cannot have. {remedy} "
            "(%date:yyyy-MM-dd% is filled in by ComfyUI's page; through the API write the date itself, or %year%-%month%-%day%.)"
        )
    return prefix


def _save_path(filename_prefix: str, *, width: int, height: int) -> tuple[Path, str, int, str]:
    """Core's folder (made if missing), name, first free number and subfolder for a prefix."""
    output = folder_paths.get_output_directory()
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(checked_prefix(filename_prefix), output, width, height)
    except OSError as error:
        raise export_error(Path(output, filename_prefix), error) from error
    return Path(folder), name, counter, subfolder


def _claim(folder: Path, name: str, counter: int, extension: str) -> Path:
    """Create the first free numbered file, empty, so that no other prompt, server or node takes the number meanwhile."""
    while True:
        path = folder / f"{name}_{counter:05}_.{extension}"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            counter += 1
        except OSError as error:
            raise export_error(path, error) from error
        else:
            return path


def _metadata(prompt: Any, extra_pnginfo: Mapping[str, Any] | None) -> dict[str, str]:
    """The tags core's SaveVideo writes, as JSON text; dropping the file on ComfyUI's canvas brings the workflow back."""
    if args.disable_metadata:
        return {}
    metadata = {str(name): _json(value) for name, value in (extra_pnginfo or {}).items()}
    if prompt is not None:
        metadata["prompt"] = _json(prompt)
    return metadata


def _json(value: Any) -> str:
    """JSON that a browser reads. Core notes change marks of nodes in the prompt, among them NaN and objects of any type."""
    try:
        return json.dumps(value, allow_nan=False, default=str)
    except ValueError:
        return json.dumps(json.loads(json.dumps(value, default=str), parse_constant=lambda _: None))
