"""One open video file: RGB pictures and sound in, compressed packets out, nothing kept.

Owns PyAV: padding, timing, encoder options, how sound is laid under the frames. Knows neither where frames come from nor how
the file gets its final name; the writer does.
"""

import logging
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.codec import UnknownCodecError
from av.error import FFmpegError
from numpy.typing import NDArray

from ..errors import ExportError
from .audio import Sound
from .failures import export_error
from .formats import VideoFormat
from .pictures import TAGS, Palettes, bt709, rgb
from .scheduling import usual_scheduling
from .stills import add_exif_to_webp

_log = logging.getLogger(__name__)
os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 writes twenty lines for each video to the terminal, past any logger; 1 is errors only


class VideoEncoder:
    """Encodes frame by frame into ``partial``; ``target`` is the name that messages show.

    Call :meth:`write` for each frame, then :meth:`finish`; :meth:`abandon` in a ``finally`` releases the file whatever happened.
    """

    def __init__(
        self,
        partial: Path,
        target: Path,
        row: VideoFormat,
        *,
        size: tuple[int, int],
        channels: int,
        frame_rate: Fraction,
        quality: float,
        bitrate_mbps: float,
        loop_count: int,
        sound: Sound | None,
        metadata: Mapping[str, str],
    ) -> None:
        """Open the file and its streams.

        Args:
            partial: file to write; overwritten.
            target: the name it will get.
            row: the format.
            size: width, height of the frames in pixels.
            channels: of the frames; 4 only where the format has alpha.
            frame_rate: frames per second.
            quality: 0..51, lower is better.
            bitrate_mbps: 10^6 bits per second instead of a quality, or 0.
            loop_count: how often players play it, 0 for ever; without effect where ``row.loops`` is empty.
            sound: put under the video, or None.
            metadata: put where ``row.metadata`` says.

        Raises:
            ExportError: the file cannot be opened, or the encoder is missing or refuses the size.
        """
        self._partial, self._target = partial, target
        self._row = row
        self._alpha = channels == 4
        self._pix_fmt = row.alpha_pix_fmt if self._alpha else row.pix_fmt
        self._metadata = metadata
        self._frame_rate = frame_rate
        self._frames_written = 0
        self._sound = sound
        width, height = size
        self._padding = (-height % row.size_multiple, -width % row.size_multiple)
        # Any: PyAV's type stubs tell streams apart by the codec's name as a literal, and ours come from a table.
        self._video: Any = None
        self._audio: Any = None
        with self._explained():
            # An absolute path: FFmpeg would take "a:" at the start of a relative one for a protocol.
            self._container: Any = av.open(str(partial.absolute()), "w", format=row.container, options=_container_options(row, loop_count))
        try:
            with self._explained():
                if row.metadata == "tags":
                    self._container.metadata.update(metadata)
                self._video = self._add_video(width + self._padding[1], height + self._padding[0], quality, bitrate_mbps)
                if row.needs:
                    self._open_hardware()
                self._palettes = None
                if row.colours == "palette":
                    self._palettes = Palettes(self._video.width, self._video.height, channels, 1 / frame_rate)
                if sound is not None:
                    self._audio = self._container.add_stream(row.audio_codec, rate=_sample_rate(sound, row), layout=sound.layout)
                with usual_scheduling():
                    self._container.start_encoding()  # opens encoders and file now: what they refuse is known before the first frame
        except BaseException:
            self.abandon()
            raise
        if any(self._padding):
            _log.warning(
                "%s: frames of %d×%d padded to %d×%d by repeating the last row or column; %s needs sides that are multiples of %d.",
                *(target.name, width, height, self._video.width, self._video.height, row.label, row.size_multiple),
            )

    def write(self, pixels: NDArray[Any]) -> None:
        """Encode one [H, W, C] frame, uint8 or uint16 as ``row.bits`` says, and the sound that belongs under it.

        Raises:
            ExportError: the encoder or the disk failed.
        """
        below, right = self._padding
        if below or right:
            pixels = np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="edge")
        with self._explained():
            if self._palettes is not None:
                for picture in self._palettes.push(pixels, self._frames_written, 1 / self._frame_rate):
                    self._container.mux(self._video.encode(picture))
            else:
                picture = (bt709 if self._row.colours == "bt709" else rgb)(pixels, self._pix_fmt)
                picture.pts, picture.time_base = self._frames_written, 1 / self._frame_rate
                self._container.mux(self._video.encode(picture))
            self._frames_written += 1
            self._write_sound()

    def finish(self) -> None:
        """Write what the encoders still hold and the index, and close the file.

        Raises:
            ExportError: the encoder or the disk failed.
        """
        with self._explained():
            if self._palettes is not None:
                for picture in self._palettes.push(None, 0, 1 / self._frame_rate):
                    self._container.mux(self._video.encode(picture))
            self._container.mux(self._last_packets())
            if self._audio is not None:
                self._container.mux(self._audio.encode(None))
            self._container.close()
            if self._row.metadata == "exif":
                add_exif_to_webp(self._partial, (self._video.width, self._video.height), self._alpha, self._metadata)

    def _last_packets(self) -> list[Any]:
        packets: list[Any] = self._video.encode(None)
        if self._frames_written < 3:
            # x265 knows when to decode only from the third frame on, and says what its memory held before; mp4 refuses most of that.
            for packet in packets:
                packet.dts = packet.pts  # so few frames are never out of order
        return packets

    def abandon(self) -> None:
        """Release the file; nothing is raised. Harmless after :meth:`finish`."""
        with suppress(Exception):  # closing writes the index, and what stopped us (a full disk) stops that too
            self._container.close()

    def _add_video(self, width: int, height: int, quality: float, bitrate_mbps: float) -> Any:
        row = self._row
        options = {**row.options, **(row.alpha_options if self._alpha else {})}
        if bitrate_mbps:
            options["b"] = str(round(bitrate_mbps * 1e6))
        elif row.quality_option:
            options[row.quality_option] = f"{row.encoder_quality(quality):g}"
        stream = self._container.add_stream(row.codec, rate=self._frame_rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, self._pix_fmt
        context = stream.codec_context
        # FFmpeg's default. PyAV's is slices, with which x264 splits each frame: slower on several cores, and a larger file.
        context.thread_type = "AUTO"
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = TAGS[row.colours]
        if row.codec_tag:
            context.codec_tag = row.codec_tag
        return stream

    def _open_hardware(self) -> None:
        # FFmpeg's own words for a missing GPU are "Operation not permitted", which would read as a matter of folders.
        try:
            self._video.codec_context.open()
        except (OSError, FFmpegError) as error:
            raise ExportError(f"The encoder {self._row.codec} of {self._row.label!r} did not open: {error}. {self._row.needs}") from error

    def _write_sound(self) -> None:
        # Sound goes in step with the frames: the muxer orders packets of both by time and holds back what came too early, so
        # sound that came last would pile the compressed video up in memory. And it ends with the video, however long that is.
        if self._sound is None:
            return
        start = (self._frames_written - 1) / self._frame_rate
        samples = self._sound.between(start, self._frames_written / self._frame_rate)
        if samples.shape[1] == 0:
            return
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=self._sound.layout)
        frame.sample_rate = self._sound.sample_rate
        frame.pts, frame.time_base = int(start * self._sound.sample_rate), Fraction(1, self._sound.sample_rate)
        self._container.mux(self._audio.encode(frame))

    @contextmanager
    def _explained(self) -> Generator[None, None, None]:
        try:
            yield
        except (OSError, FFmpegError, UnknownCodecError) as error:
            raise export_error(self._target, error) from error


def _sample_rate(sound: Sound, row: VideoFormat) -> int:
    """The sound's own rate where the codec has it, else 48 kHz (PyAV resamples)."""
    rates = av.Codec(row.audio_codec, "w").audio_rates
    return sound.sample_rate if not rates or sound.sample_rate in rates else 48_000


def _container_options(row: VideoFormat, loop_count: int) -> dict[str, str]:
    options = dict(row.container_options)
    if row.loops == "plays":
        options["loop"] = str(loop_count)
    elif row.loops:  # -1 leaves the count out, which is one play
        options["loop"] = str({0: 0, 1: -1}.get(loop_count, loop_count - 1))
    return options
