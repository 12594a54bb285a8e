"""Frames to a video file, streamed: one frame in memory at a time, and the file appears only when it is whole.

Owns the request (checks) and the file's name (temporary, then final). Knows nothing of ComfyUI; called by the bridge and by
Python users, for whom :func:`export_to_video` takes what ``diffusers.utils.export_to_video`` takes.
"""

import math
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from fractions import Fraction
from numbers import Rational
from pathlib import Path
from typing import Any

from ..errors import ExportError, InvalidRequestError
from .audio import read_audio
from .encoder import VideoEncoder
from .failures import export_error
from .formats import DEFAULT_FORMAT, VideoFormat, video_format
from .frames import Frames, frame_total, rgb_frames

_FPS_RANGE = (0.01, 1000)
# Rates that are written rounded (23.976, 29.97, 59.94) and mean a thousand and first part less than a whole number.
_NTSC_RATES = (24, 30, 48, 60, 120)


def write_video(
    frames: Frames,
    path: str | os.PathLike[str],
    *,
    fps: float | Fraction,
    format: str = DEFAULT_FORMAT,
    quality: float = 19,
    audio: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    on_frame: Callable[[int, int | None], None] | None = None,
) -> Path:
    """Write ``frames`` to the video file ``path``, replacing one that is there.

    The file is written under a temporary name in the same folder and renamed when whole: whatever happens before that
    (an error, a full disk, a cancelled run) leaves no file and does not touch an older one. Sides that the format cannot
    take are padded by repeating the last row or column, and the log says so.

    Args:
        frames: [T, H, W, C] tensor on any device or array, or an iterable of [H, W, C] tensors, arrays or PIL images; C is 3
            or 4 (alpha is dropped). Floating point 0..1 or uint8.
        path: the file; its extension must be the format's, its folder must exist.
        fps: frames per second, 0.01..1000. 23.976 is taken for 24000/1001, 29.97 for 30000/1001 and so on.
        format: a key of :data:`~.formats.FORMATS`.
        quality: the encoder's own number (CRF for H.264: 0..51, lower is better).
        audio: ComfyUI's AUDIO, ``{"waveform": [1, C, S] float, "sample_rate": int}``; cut where the video ends.
        metadata: the container's tags, any names.
        on_frame: called after each frame with (frames written, total or None). What it raises cancels the export.

    Returns:
        ``path``, absolute.

    Raises:
        InvalidRequestError: an argument that no video can be made from; the message names it and what to give instead.
        ExportError: folder, permission, disk or encoder; the message names the path and what to do.
    """
    row = video_format(format)
    frame_rate = exact_frame_rate(fps)
    target = _checked_target(path, row)
    _check_quality(quality, row)
    _check_metadata(metadata or {})
    sound = read_audio(audio)
    total = frame_total(frames)
    pictures = rgb_frames(frames)
    first = next(pictures)
    partial = target.with_name(f".wan-sharded-{secrets.token_hex(8)}.part")
    encoder = None
    try:
        _create(partial, target)
        size = (first.shape[1], first.shape[0])
        encoder = VideoEncoder(
            partial, target, row, size=size, frame_rate=frame_rate, quality=quality, sound=sound, metadata=metadata or {}
        )
        encoder.write(first)
        if on_frame is not None:
            on_frame(1, total)
        for written, picture in enumerate(pictures, start=2):
            encoder.write(picture)
            if on_frame is not None:
                on_frame(written, total)
        encoder.finish()
        _publish(partial, target)
    finally:
        # Not `except`: a cancelled run may arrive as a BaseException. Closed before it is removed, for Windows.
        if encoder is not None:
            encoder.abandon()
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return target


def export_to_video(video_frames: Frames, output_video_path: str | os.PathLike[str], fps: float = 16) -> str:
    """:func:`write_video` under the name and with the arguments of ``diffusers.utils.export_to_video``.

    Returns:
        The path as text. Raises what :func:`write_video` raises.
    """
    return str(write_video(video_frames, output_video_path, fps=fps))


def exact_frame_rate(fps: float | Fraction) -> Fraction:
    """The rate that ``fps`` stands for, as a fraction small enough for any container.

    Raises:
        InvalidRequestError: not a number, or outside 0.01..1000.
    """
    try:
        value = float(fps)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    low, high = _FPS_RANGE
    if not low <= value <= high:  # also refuses NaN
        raise InvalidRequestError(f"fps is {fps!r}. Give frames per second between {low} and {high}; Wan 2.2 14B makes 16.")
    if isinstance(fps, Rational):
        return Fraction(fps).limit_denominator(1_000_000)
    for whole in _NTSC_RATES:
        if abs(value - whole * 1000 / 1001) < 0.005:
            return Fraction(whole * 1000, 1001)
    return Fraction(value).limit_denominator(1000)


def _checked_target(path: str | os.PathLike[str], row: VideoFormat) -> Path:
    target = Path(path).absolute()
    if target.suffix.lower() != f".{row.extension}":
        raise InvalidRequestError(
            f"{target.name!r} does not end in .{row.extension}, which {row.label!r} files do. Rename it, or choose another format."
        )
    if target.is_dir():
        raise ExportError(f"Could not write the video {target}: a folder of that name exists. Choose another file name.")
    return target


def _check_quality(quality: float, row: VideoFormat) -> None:
    low, high = row.quality_range
    if isinstance(quality, bool) or not isinstance(quality, int | float) or not low <= quality <= high:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidRequestError(
            f"quality is {quality!r}. {row.label} takes {low} to {high} ({row.quality_option}); lower is better and larger."
        )


def _check_metadata(metadata: Mapping[str, str]) -> None:
    for name, value in metadata.items():
        if not isinstance(name, str) or not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError(
                f"The metadata {name!r} is a {type(value).__name__}. Names and values must be text; turn structures into JSON."
            )


def _create(partial: Path, target: Path) -> None:
    """Claim the temporary name, so that a folder which cannot be written fails with the system's own words."""
    try:
        partial.touch(exist_ok=False)
    except OSError as error:
        raise export_error(target, error) from error


def _publish(partial: Path, target: Path) -> None:
    """Give the whole file its name, its bytes on the disk first: network and quota errors surface only there."""
    try:
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise export_error(target, error) from error
