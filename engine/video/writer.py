"""Frames to a video file, streamed: one frame in memory at a time, and the file appears only when it is whole.

Owns the request (checks) and the file's name (temporary, then final). Knows nothing of ComfyUI; called by the bridge and by
Python users, for whom :func:`export_to_video` takes what ``diffusers.utils.export_to_video`` takes.
"""

import itertools
import logging
import math
import os
import secrets
import shutil
import time
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
from .formats import DEFAULT_FORMAT, QUALITY_RANGE, VideoFormat, left_out, video_format
from .frames import Frames, frame_total, rgb_frames
from .stills import PngSequence

_log = logging.getLogger(__name__)

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
    bitrate_mbps: float = 0,
    loop_count: int = 0,
    audio: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    on_frame: Callable[[int, int | None], None] | None = None,
) -> Path:
    """Write ``frames`` to the video file ``path``, replacing one that is there.

    The file is written under a temporary name in the same folder and renamed when whole: whatever happens before that
    (an error, a full disk, a cancelled run) leaves no file and does not touch an older one. Sides that the format cannot
    take are padded by repeating the last row or column, and what it has no place for is left out; the log says so.

    Args:
        frames: [T, H, W, C] tensor on any device or array, or an iterable of [H, W, C] tensors, arrays or PIL images; C is 3
            or 4 (alpha, kept by the formats that have it). Floating point 0..1 or uint8.
        path: the file; its extension must be the format's, its folder must exist. For a PNG sequence the folder to make.
        fps: frames per second, 0.01..1000. 23.976 is taken for 24000/1001, 29.97 for 30000/1001 and so on.
        format: a key of :data:`~.formats.FORMATS`.
        quality: 0..51, lower is better: H.264's CRF, for other formats their number that looks alike. Lossless formats and ProRes
            have one quality only.
        bitrate_mbps: 10^6 bits per second instead of a quality; 0 for none.
        loop_count: how often a gif or webp is played, 0 for ever.
        audio: ComfyUI's AUDIO, ``{"waveform": [1, C, S] float, "sample_rate": int}``; cut where the video ends.
        metadata: text of any names, put where ComfyUI reads it in that format.
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
    _check_numbers(row, frame_rate, quality=quality, bitrate_mbps=bitrate_mbps, loop_count=loop_count)
    metadata = metadata or {}
    _check_metadata(metadata)
    sound = read_audio(audio)
    total = frame_total(frames)
    pictures = rgb_frames(frames, alpha=bool(row.alpha_pix_fmt), bits=row.bits)
    first = next(pictures)
    height, width, channels = first.shape
    if min(height, width) < row.min_side:
        raise InvalidRequestError(
            f"Frames are {width}×{height} and {row.label} needs sides of {row.min_side} or more. Choose another format."
        )
    for note in left_out(row, audio=sound is not None, alpha=False, metadata=bool(metadata), loop_count=loop_count):
        _log.warning("%s: %s", target.name, note)
    partial = target.with_name(f".wan-sharded-{secrets.token_hex(8)}.part")
    encoder = None
    try:
        _create(partial, target, row)
        if row.is_folder:
            encoder = PngSequence(partial, target, metadata)
        else:
            encoder = VideoEncoder(
                *(partial, target, row),
                size=(width, height),
                channels=channels,
                frame_rate=frame_rate,
                quality=quality,
                bitrate_mbps=bitrate_mbps,
                loop_count=loop_count,
                sound=sound if row.audio_codec else None,
                metadata=metadata,
            )
        for written, picture in enumerate(itertools.chain((first,), pictures), start=1):
            encoder.write(picture)
            if on_frame is not None:
                on_frame(written, total)
        encoder.finish()
        _publish(partial, target, row)
    finally:
        # Not `except`: a cancelled run may arrive as a BaseException. Closed before it is removed, for Windows.
        if encoder is not None:
            encoder.abandon()
        if row.is_folder:
            shutil.rmtree(partial, ignore_errors=True)
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
    if row.is_folder:
        return target
    if target.suffix.lower() != f".{row.extension}":
        raise InvalidRequestError(
            f"{target.name!r} does not end in .{row.extension}, which {row.label!r} files do. Rename it, or choose another format."
        )
    if target.is_dir():
        raise ExportError(f"Could not write the video {target}: a folder of that name exists. Choose another file name.")
    return target


def _check_numbers(row: VideoFormat, frame_rate: Fraction, *, quality: float, bitrate_mbps: float, loop_count: int) -> None:
    low, high = QUALITY_RANGE
    if not _is_number(quality) or not low <= quality <= high:
        raise InvalidRequestError(f"quality is {quality!r}. Give {low} to {high}; lower is better and larger.")
    if not _is_number(bitrate_mbps) or not 0 <= bitrate_mbps <= 1000:
        raise InvalidRequestError(f"bitrate_mbps is {bitrate_mbps!r}. Give megabits per second up to 1000, or 0 to go by quality.")
    if bitrate_mbps and not row.takes_bitrate:
        raise InvalidRequestError(
            f"bitrate_mbps is {bitrate_mbps!r} and {row.label} takes no bit rate. Set it to 0, or choose another format."
        )
    if not isinstance(loop_count, int) or not 0 <= loop_count <= 65535:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidRequestError(f"loop_count is {loop_count!r}. Give how often to play, up to 65535, or 0 for ever.")
    if frame_rate > row.max_fps:
        raise InvalidRequestError(
            f"fps is {float(frame_rate):g}, and browsers show a {row.label} of more than {row.max_fps} fps far too slowly. Lower fps, or choose webp."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_metadata(metadata: Mapping[str, str]) -> None:
    for name, value in metadata.items():
        if not isinstance(name, str) or not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError(
                f"The metadata {name!r} is a {type(value).__name__}. Names and values must be text; turn structures into JSON."
            )


def _create(partial: Path, target: Path, row: VideoFormat) -> None:
    """Claim the temporary name, so that a folder which cannot be written fails with the system's own words."""
    try:
        if row.is_folder:
            partial.mkdir()
        else:
            partial.touch(exist_ok=False)
    except OSError as error:
        raise export_error(target, error) from error


def _publish(partial: Path, target: Path, row: VideoFormat) -> None:
    """Give the whole file its name, its bytes on the disk first: network and quota errors surface only there."""
    try:
        if row.is_folder:
            if target.is_dir():
                target.rmdir()  # an empty one only; Windows does not rename over it
            _patiently(lambda: partial.rename(target))
            return
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        _patiently(lambda: os.replace(partial, target))
    except OSError as error:
        raise export_error(target, error) from error


def _patiently(rename: Callable[[], object], *, windows: bool = os.name == "nt", seconds: float = 10) -> None:
    """Rename on Windows, where a virus scanner or a synchronising folder may hold a new file for a moment."""
    end = time.monotonic() + (seconds if windows else 0)
    while True:
        try:
            rename()
            return
        except PermissionError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.1)
