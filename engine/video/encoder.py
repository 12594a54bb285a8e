"""One open video file: 8-bit RGB pictures and sound in, compressed packets out, nothing kept.

Owns PyAV: colours, padding, timing, how sound is laid under the frames. Knows neither where frames come from nor how the
file gets its final name; the writer does.
"""

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.codec import UnknownCodecError
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from numpy.typing import NDArray

from .audio import Sound
from .failures import export_error
from .formats import VideoFormat

_log = logging.getLogger(__name__)

# H.273 code points. 1 is "BT.709" for primaries, transfer and matrix alike; range 1 is limited ("MPEG", 16..235).
_BT709 = 1
_LIMITED = 1


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
        frame_rate: Fraction,
        quality: float,
        sound: Sound | None,
        metadata: Mapping[str, str],
    ) -> None:
        """Open the file and its streams.

        Args:
            partial: file to write; overwritten.
            target: the name it will get.
            row: the format.
            size: width, height of the frames in pixels.
            frame_rate: frames per second.
            quality: within ``row.quality_range``.
            sound: put under the video, or None.
            metadata: the container's tags.

        Raises:
            ExportError: the file cannot be opened, or the encoder is missing or refuses the size.
        """
        self._target = target
        self._row = row
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
            self._container: Any = av.open(str(partial.absolute()), "w", format=row.container, options=dict(row.container_options))
        try:
            with self._explained():
                self._container.metadata.update(metadata)
                self._video = self._add_video(width + self._padding[1], height + self._padding[0], quality)
                if sound is not None:
                    self._audio = self._container.add_stream(row.audio_codec, rate=_sample_rate(sound, row), layout=sound.layout)
                self._container.start_encoding()  # opens encoders and file now: what they refuse is known before the first frame
        except BaseException:
            self.abandon()
            raise
        if any(self._padding):
            _log.warning(
                "%s: frames of %d×%d padded to %d×%d by repeating the last row or column; %s needs sides that are multiples of %d.",
                *(target.name, width, height, self._video.width, self._video.height, row.label, row.size_multiple),
            )

    def write(self, rgb: NDArray[np.uint8]) -> None:
        """Encode one [H, W, 3] uint8 frame and the sound that belongs under it.

        Raises:
            ExportError: the encoder or the disk failed.
        """
        below, right = self._padding
        if below or right:
            rgb = np.pad(rgb, ((0, below), (0, right), (0, 0)), mode="edge")
        with self._explained():
            # BT.709 limited range, said four times over (matrix, primaries, transfer, range), for every size. swscale would
            # convert with BT.601 and write no tags, and players then guess, by height, differently: that is where shifted
            # greens and washed-out blacks come from. Frames are sRGB; its curve is tagged "BT.709" as everybody does,
            # because players undo that tag with the sRGB curve. AREA averages chroma exactly; the default rounds it worse.
            picture = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(
                format=self._row.pix_fmt,
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.AREA,
            )
            picture.colorspace, picture.color_range = _BT709, _LIMITED  # older PyAV leaves the source's tags on the result
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
            self._container.mux(self._video.encode(None))
            if self._audio is not None:
                self._container.mux(self._audio.encode(None))
            self._container.close()

    def abandon(self) -> None:
        """Release the file; nothing is raised. Harmless after :meth:`finish`."""
        with suppress(Exception):  # closing writes the index, and what stopped us (a full disk) stops that too
            self._container.close()

    def _add_video(self, width: int, height: int, quality: float) -> Any:
        options = {**self._row.options, self._row.quality_option: str(quality)}
        stream = self._container.add_stream(self._row.codec, rate=self._frame_rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, self._row.pix_fmt
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace = _BT709, _BT709, _BT709
        context.color_range = _LIMITED
        return stream

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
