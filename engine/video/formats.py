"""The video formats, as data.

Owns what a format is made of (container, codec, pixel format, options) and what it cannot hold. Knows neither PyAV nor frames:
the writer reads this table, and so does the "Video Export" node for its list of choices. A new format is a new row, not a new branch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ..errors import InvalidRequestError

# One scale for every format, H.264's: 0 is best and largest. 19 is the default.
QUALITY_RANGE = (0, 51)
_QUALITY_DEFAULT = 19


@dataclass(frozen=True)
class VideoFormat:
    """One row of :data:`FORMATS`.

    Attributes:
        label: what the user picks; saved in workflow files, so it never changes once released.
        extension: of the file, without the dot; empty for a folder of numbered PNG files.
        container: FFmpeg's name of the muxer.
        codec: FFmpeg's name of the video encoder.
        pix_fmt: FFmpeg's name of the pixel format the encoder gets.
        alpha_pix_fmt: the same for frames with 4 channels; empty where alpha is dropped.
        colours: how RGB becomes ``pix_fmt``: BT.709 limited range, left as it is, or one palette of 256 colours for each frame.
        bits: what frames are rounded to before that; 16 for codecs of more than 8 bits.
        size_multiple: width and height must be a multiple of this (2 where chroma is halved).
        min_side: smallest width and height.
        quality_option: the encoder's option that the quality number goes to; empty where there is none.
        quality_scale: the encoder's number for quality 0, 19 and 51; in between it is linear.
        takes_bitrate: whether a bit rate can be given instead of a quality.
        options: further encoder options.
        alpha_options: further ones for frames with 4 channels.
        container_options: options of the muxer.
        codec_tag: four characters that name the codec in the file, where FFmpeg's choice is not what players look for.
        audio_codec: FFmpeg's name of the audio encoder; empty where there is no sound.
        max_fps: what players of the format can show.
        loops: what the muxer's option "loop" counts: plays, repeats after the first play, or empty where it has none.
        metadata: where ``metadata`` goes: the container's tags, EXIF as ComfyUI writes it in WebP, PNG's text, or empty for nowhere.
        preview: what a browser shows it with; empty where it cannot.
        core_reads: whether ComfyUI's own video nodes read the file and can put its streams into an mp4.
        needs: what the encoder needs besides PyAV, and what to choose without it.
    """

    label: str
    extension: str
    container: str
    codec: str
    pix_fmt: str
    alpha_pix_fmt: str = ""
    colours: Literal["bt709", "rgb", "palette"] = "bt709"
    bits: Literal[8, 16] = 8
    size_multiple: int = 2
    min_side: int = 1
    quality_option: str = ""
    quality_scale: tuple[float, float, float] = (0, 19, 51)
    takes_bitrate: bool = True
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    alpha_options: Mapping[str, str] = field(default_factory=dict[str, str])
    container_options: Mapping[str, str] = field(default_factory=dict[str, str])
    codec_tag: str = ""
    audio_codec: str = "aac"
    max_fps: int = 1000
    loops: Literal["", "plays", "repeats"] = ""
    metadata: Literal["", "tags", "exif", "text"] = "tags"
    preview: Literal["", "video", "image"] = "video"
    core_reads: bool = True
    needs: str = ""

    @property
    def is_folder(self) -> bool:
        """Whether the result is a folder of pictures instead of one file."""
        return not self.extension

    def encoder_quality(self, quality: float) -> float:
        """The encoder's own number for ``quality`` (0..51)."""
        best, usual, worst = self.quality_scale
        if quality <= _QUALITY_DEFAULT:
            return round(best + (usual - best) * quality / _QUALITY_DEFAULT, 2)
        return round(usual + (worst - usual) * (quality - _QUALITY_DEFAULT) / (QUALITY_RANGE[1] - _QUALITY_DEFAULT), 2)


# use_metadata_tags keeps tags of any name (ComfyUI's "workflow" and "prompt"); faststart puts the index first, so that a browser
# starts playing before it has the whole file.
_MP4 = {"movflags": "use_metadata_tags+faststart"}
# 0 would mean "choose for me" to NVENC. b=0: no ceiling beside the quality.
_NVENC = {"preset": "p5", "rc": "vbr", "b": "0"}
_NVENC_SCALE = (1, 19, 51)
_NVENC_NEEDS = "It needs an NVIDIA GPU with a video encoder (data centre GPUs such as H100 have none) and a current driver"

# x265 looks alike at about 3 more. "hvc1" is the only name under which Apple's players take H.265. With both sides below 64 it
# aborted, which ends ComfyUI, in 83 of 288 processes (48×32, 32×32, 16×16), and in none of 1,284 at 64 and above. Cause not found.
_H265 = VideoFormat(
    *("mp4 (H.265)", "mp4", "mp4", "libx265", "yuv420p"),
    quality_option="crf",
    quality_scale=(0, 22, 51),
    options={"preset": "medium", "x265-params": "log-level=error"},
    container_options=_MP4,
    codec_tag="hvc1",
    min_side=64,
    preview="",
)
_AV1 = VideoFormat(
    *("mp4 (AV1)", "mp4", "mp4", "libsvtav1", "yuv420p"),
    quality_option="crf",
    quality_scale=(1, 28, 63),
    options={"preset": "8"},
    container_options=_MP4,
)

_TABLE = (
    VideoFormat(
        "mp4 (H.264)", "mp4", "mp4", "libx264", "yuv420p", quality_option="crf", options={"preset": "medium"}, container_options=_MP4
    ),
    _H265,
    replace(_H265, label="mp4 (H.265, 10 bit)", pix_fmt="yuv420p10le", bits=16),
    _AV1,
    replace(_AV1, label="mp4 (AV1, 10 bit)", pix_fmt="yuv420p10le", bits=16),
    VideoFormat(
        *("webm (VP9)", "webm", "webm", "libvpx-vp9", "yuv420p", "yuva420p"),
        quality_option="crf",
        quality_scale=(0, 24, 63),
        options={"cpu-used": "2", "row-mt": "1"},
        alpha_options={"auto-alt-ref": "0"},  # libvpx has no alternate reference frames for alpha
        audio_codec="libopus",
    ),
    # ProRes has the rate of its profile, which is what editors expect.
    VideoFormat(
        *("mov (ProRes)", "mov", "mov", "prores_ks", "yuv422p10le", "yuva444p10le"),
        bits=16,
        takes_bitrate=False,
        options={"profile": "hq", "vendor": "apl0"},
        alpha_options={"profile": "4444", "alpha_bits": "16"},
        container_options=_MP4,
        preview="",
        core_reads=False,
    ),
    VideoFormat(
        *("mkv (FFV1)", "mkv", "matroska", "ffv1", "bgr0", "bgra"),
        colours="rgb",
        size_multiple=1,
        takes_bitrate=False,
        options={"level": "3", "slicecrc": "1"},
        audio_codec="libopus",
        preview="",
        core_reads=False,
    ),
    # Browsers show anything faster than 50 fps at 10.
    VideoFormat(
        *("gif", "gif", "gif", "gif", "pal8", "pal8"),
        colours="palette",
        size_multiple=1,
        takes_bitrate=False,
        audio_codec="",
        max_fps=50,
        loops="repeats",
        metadata="",
        preview="image",
        core_reads=False,
    ),
    # WebP's own conversion from RGB is the one that its readers undo, so it gets RGB.
    VideoFormat(
        *("webp", "webp", "webp", "libwebp_anim", "bgra", "bgra"),
        colours="rgb",
        size_multiple=1,
        quality_option="quality",
        quality_scale=(100, 85, 10),
        takes_bitrate=False,
        audio_codec="",
        loops="plays",
        metadata="exif",
        preview="image",
        core_reads=False,
    ),
    VideoFormat(
        *("png sequence", "", "", "png", "rgb24", "rgba"),
        colours="rgb",
        size_multiple=1,
        takes_bitrate=False,
        audio_codec="",
        metadata="text",
        preview="image",
        core_reads=False,
    ),
    VideoFormat(
        *("mp4 (H.264, NVENC)", "mp4", "mp4", "h264_nvenc", "yuv420p"),
        quality_option="cq",
        quality_scale=_NVENC_SCALE,
        options=_NVENC,
        container_options=_MP4,
        needs=f"{_NVENC_NEEDS}; else choose 'mp4 (H.264)'.",
    ),
    VideoFormat(
        *("mp4 (H.265, NVENC)", "mp4", "mp4", "hevc_nvenc", "yuv420p"),
        quality_option="cq",
        quality_scale=_NVENC_SCALE,
        options=_NVENC,
        container_options=_MP4,
        codec_tag="hvc1",
        preview="",
        needs=f"{_NVENC_NEEDS}; else choose 'mp4 (H.265)'.",
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


def left_out(row: VideoFormat, *, audio: bool, alpha: bool, metadata: bool, loop_count: int) -> list[str]:
    """What of a request the format has no place for, one sentence each. Nothing here stops the export.

    Args:
        row: the format.
        audio: whether there is sound.
        alpha: whether frames have 4 channels.
        metadata: whether there is a workflow to save.
        loop_count: 0 is the default.
    """
    notes: list[str] = []
    if audio and not row.audio_codec:
        notes.append(f"The sound was left out: {row.label} has none.")
    if alpha and not row.alpha_pix_fmt:
        notes.append(f"Transparency was left out: {row.label} has none.")
    if metadata and not row.metadata:
        notes.append(f"The workflow was left out: {row.label} has no place that ComfyUI reads. Turn first_frame_png on to keep it beside.")
    if loop_count and not row.loops:
        notes.append(f"loop_count has no effect: players decide how often {row.label} is played.")
    return notes
