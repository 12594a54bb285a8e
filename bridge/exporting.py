"""Video Export: ComfyUI's folders, metadata, preview, progress and cancel around the engine's writer.

Owns where the file goes and what it carries. Knows nothing of codecs; called by ``nodes/export.py``.
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.input import VideoInput
from comfy_api.input_impl import VideoFromComponents, VideoFromFile
from comfy_api.latest import io, ui
from comfy_api.util import VideoComponents

from ..engine.errors import InvalidRequestError
from ..engine.video.failures import export_error
from ..engine.video.formats import VideoFormat, left_out, video_format
from ..engine.video.frames import PingPong, check_batch, rgb_frames
from ..engine.video.stills import write_png
from ..engine.video.writer import exact_frame_rate, write_video

Video: TypeAlias = VideoInput


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
    pingpong: bool = False,
    loop_count: int = 0,
    save_output: bool = True,
    first_frame_png: bool = False,
    bitrate_mbps: float = 0,
) -> tuple[Video, str, dict[str, Any]]:
    """Write ``images`` to a numbered file (or, as a PNG sequence, folder) in ComfyUI's output folder.

    Args:
        images: [T, H, W, C] float 0..1, any device.
        fps: frames per second.
        filename_prefix: folder and beginning of the name inside the output folder; %year%, %width% and so on are filled in.
        format: a key of the engine's ``FORMATS``.
        quality: 0..51, lower is better.
        audio: AUDIO or None.
        prompt: the API prompt, or None.
        extra_pnginfo: what else ComfyUI wants saved (``workflow``), or None.
        pingpong: forwards, then backwards.
        loop_count: how often gif and webp are played, 0 for ever.
        save_output: False writes to ComfyUI's temp folder, which it empties when it starts.
        first_frame_png: the first frame beside it, as a PNG of the same name that carries the workflow.
        bitrate_mbps: 10^6 bits per second instead of a quality, 0 for none.

    Returns:
        The VIDEO, the file's path, and what the node shows: a preview where browsers have one, and a text.

    Raises:
        InvalidRequestError, ExportError: as :func:`~..engine.video.writer.write_video`, and for a prefix that is empty or leaves the output folder.
        InterruptProcessingException: the user pressed cancel; no file is left.
    """
    row = video_format(format)
    check_batch(images)
    folder_type = io.FolderType.output if save_output else io.FolderType.temp
    folder, name, counter, subfolder = _save_path(filename_prefix, folder_type, width=images.shape[2], height=images.shape[1])
    path = _claim(folder, name, counter, row)
    still = path.with_name(f"{path.name if row.is_folder else path.stem}.png") if first_frame_png else None
    frames = PingPong(images) if pingpong else images
    progress = comfy.utils.ProgressBar(len(frames))
    metadata = _metadata(prompt, extra_pnginfo)

    def on_frame(written: int, total: int | None) -> None:
        # The progress bar's hook raises the interrupt too, but only where a server has installed one.
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update_absolute(written, total)

    whole = False
    try:
        if still is not None:
            _write_still(images, still, metadata)
        write_video(
            *(frames, path),
            fps=fps,
            format=format,
            quality=quality,
            bitrate_mbps=bitrate_mbps,
            loop_count=loop_count,
            audio=audio,
            metadata=metadata,
            on_frame=on_frame,
        )
        whole = True
    finally:
        # Not `except`: newer ComfyUI interrupts with a BaseException.
        if not whole:
            _remove(path, still)
    notes = left_out(row, audio=audio is not None, alpha=images.shape[3] == 4, metadata=bool(metadata), loop_count=loop_count)
    return _video(row, path, images, frames, audio, fps), str(path), _shown(row, path, subfolder, folder_type, still, notes)


def _video(row: VideoFormat, path: Path, images: torch.Tensor, frames: Any, audio: Any, fps: float) -> Video:
    """The file where core's nodes read it, else the frames themselves: core's Save Video copies streams into an mp4."""
    if row.core_reads:
        return VideoFromFile(str(path))
    return _Frames(images[..., :3], frames.order() if isinstance(frames, PingPong) else None, audio, fps)


class _Frames(VideoInput):
    """Frames as a VIDEO. In another order than they are in, they are copied when they are asked for: most often nobody does."""

    def __init__(self, images: torch.Tensor, order: list[int] | None, audio: Any, fps: float):
        self._images, self._order, self._audio, self._fps = images, order, audio, fps

    def get_components(self) -> VideoComponents:
        images = self._images if self._order is None else self._images[self._order]
        return VideoComponents(images=images, audio=self._audio, frame_rate=exact_frame_rate(self._fps))

    def save_to(self, *args: Any, **kwargs: Any) -> None:
        VideoFromComponents(self.get_components()).save_to(*args, **kwargs)

    def as_trimmed(self, *args: Any, **kwargs: Any) -> Any:
        """Asked of every VIDEO by newer ComfyUI."""
        return VideoFromComponents(self.get_components()).as_trimmed(*args, **kwargs)

    def _comfy_cache_tensors(self) -> list[torch.Tensor]:
        """What newer ComfyUI's cache counts as held by this."""
        return [self._images]


def _shown(
    row: VideoFormat, path: Path, subfolder: str, folder_type: io.FolderType, still: Path | None, notes: list[str]
) -> dict[str, Any]:
    """What ComfyUI's page shows. "animated" makes it play videos and WebP; with it, it takes GIF for a video."""
    shown: dict[str, Any] = {}
    lines = [path.name, *notes]
    if row.is_folder:
        shown["images"] = [ui.SavedResult(min(path.iterdir()).name, str(Path(subfolder, path.name)), folder_type)]
    elif row.preview:
        shown["images"] = [ui.SavedResult(path.name, subfolder, folder_type)]
        if row.extension != "gif":
            shown["animated"] = (True,)
    else:
        lines.append(f"No preview: not every browser plays {row.label}.")
        if still is not None:
            shown["images"] = [ui.SavedResult(still.name, subfolder, folder_type)]
    shown["text"] = ("\n".join(lines),)
    return shown


def _write_still(images: torch.Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    try:
        write_png(next(rgb_frames(images[:1], alpha=True)), path, metadata)
    except OSError as error:
        raise export_error(path, error) from error


def _remove(path: Path, still: Path | None) -> None:
    for file in (path, still):
        with suppress(OSError):  # the error on its way says more
            if file is not None and file.is_dir():
                shutil.rmtree(file)
            elif file is not None:
                file.unlink(missing_ok=True)


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


def _save_path(filename_prefix: str, folder_type: io.FolderType, *, width: int, height: int) -> tuple[Path, str, int, str]:
    """Core's folder (made if missing), name, first free number and subfolder for a prefix."""
    output = folder_paths.get_output_directory() if folder_type is io.FolderType.output else folder_paths.get_temp_directory()
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(checked_prefix(filename_prefix), output, width, height)
    except OSError as error:
        raise export_error(Path(output, filename_prefix), error) from error
    return Path(folder), name, counter, subfolder


def _claim(folder: Path, name: str, counter: int, row: VideoFormat) -> Path:
    """Create the first free numbered file or folder, empty, so that no other prompt, server or node takes the number meanwhile."""
    while True:
        path = folder / (f"{name}_{counter:05}_" if row.is_folder else f"{name}_{counter:05}_.{row.extension}")
        try:
            if row.is_folder:
                path.mkdir()
            else:
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
