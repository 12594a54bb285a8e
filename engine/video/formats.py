"""The video formats, as data.

Owns what a format is made of (container, codec, pixel format, options). Knows neither PyAV nor frames: the writer reads
this table, and so does the "Video Export" node for its list of choices. A new format is a new row, not a new branch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import InvalidRequestError


@dataclass(frozen=True)
class VideoFormat:
    """One row of :data:`FORMATS`.

    Attributes:
        label: what the user picks; saved in workflow files, so it never changes once released.
        extension: of the file, without the dot.
        container: FFmpeg's name of the muxer.
        codec: FFmpeg's name of the video encoder.
        pix_fmt: FFmpeg's name of the pixel format the encoder gets.
        size_multiple: width and height must be a multiple of this (2 where chroma is halved both ways).
        quality_option: the encoder's option that the quality number goes to.
        quality_range: smallest and largest number the encoder takes there, both included.
        options: further encoder options.
        container_options: options of the muxer.
        audio_codec: FFmpeg's name of the audio encoder.
    """

    label: str
    extension: str
    container: str
    codec: str
    pix_fmt: str
    size_multiple: int
    quality_option: str
    quality_range: tuple[int, int]
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    container_options: Mapping[str, str] = field(default_factory=dict[str, str])
    audio_codec: str = "aac"


_TABLE = (
    VideoFormat(
        label="mp4 (H.264)",
        extension="mp4",
        container="mp4",
        codec="libx264",
        pix_fmt="yuv420p",
        size_multiple=2,
        quality_option="crf",
        quality_range=(0, 51),
        options={"preset": "medium"},
        # use_metadata_tags keeps tags of any name (ComfyUI's "workflow" and "prompt"); faststart puts the index first, so
        # that a browser starts playing before it has the whole file.
        container_options={"movflags": "use_metadata_tags+faststart"},
    ),
)

FORMATS: Mapping[str, VideoFormat] = {row.label: row for row in _TABLE}
DEFAULT_FORMAT = _TABLE[0].label


def video_format(label: str) -> VideoFormat:
    """Look a format up by its label.

    Raises:
        InvalidRequestError: there is no such format; the message lists those there are.
    """
    row = FORMATS.get(label)
    if row is None:
        raise InvalidRequestError(f"There is no video format {label!r}. Choose one of: {', '.join(FORMATS)}.")
    return row
