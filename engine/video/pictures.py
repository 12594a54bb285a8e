"""RGB arrays as the pictures an encoder takes: BT.709, RGB, or 256 colours.

Owns the conversion of colours. Knows neither files nor codecs; called by the encoder.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.error import BlockingIOError, EOFError
from av.filter import Graph
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from numpy.typing import NDArray

# H.273 code points. 1 is "BT.709" for primaries, transfer and matrix alike; 13 is sRGB's curve; matrix 0 is "RGB".
BT709 = 1
_SRGB = 13
_RGB = 0
LIMITED = 1
_FULL = 2
# Primaries, transfer, matrix, range.
TAGS = {"bt709": (BT709, BT709, BT709, LIMITED), "rgb": (BT709, _SRGB, _RGB, _FULL), "palette": (BT709, _SRGB, _RGB, _FULL)}

_SOURCES = {(3, 1): "rgb24", (4, 1): "rgba", (3, 2): "rgb48le", (4, 2): "rgba64le"}


def picture_of(pixels: NDArray[Any]) -> av.VideoFrame:
    """[H, W, C] uint8 or uint16 as PyAV's picture; C is 3 or 4."""
    return av.VideoFrame.from_ndarray(pixels, format=_SOURCES[pixels.shape[2], pixels.dtype.itemsize])


def bt709(pixels: NDArray[Any], pix_fmt: str) -> av.VideoFrame:
    """``pixels`` in ``pix_fmt``, BT.709 limited range, and tagged so."""
    # Said four times over (matrix, primaries, transfer, range), for every size. swscale would convert with BT.601 and write no
    # tags, and players then guess, by height, differently: that is where shifted greens and washed-out blacks come from. Frames
    # are sRGB; its curve is tagged "BT.709" as everybody does, because players undo that tag with the sRGB curve. AREA averages
    # chroma exactly; the default rounds it worse.
    picture = picture_of(pixels).reformat(
        format=pix_fmt,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.AREA,
    )
    picture.colorspace, picture.color_range = BT709, LIMITED  # older PyAV leaves the source's tags on the result
    if hasattr(picture, "color_primaries"):  # newer PyAV; ProRes takes these two from each picture
        picture.color_primaries, picture.color_trc = BT709, BT709
    return picture


def rgb(pixels: NDArray[Any], pix_fmt: str) -> av.VideoFrame:
    """``pixels`` in another order of channels, unchanged; alpha is opaque where there was none."""
    return picture_of(pixels).reformat(format=pix_fmt, src_color_range=ColorRange.JPEG, dst_color_range=ColorRange.JPEG)


class Palettes:
    """Frames in 256 colours, each with a palette of its own.

    One palette for the whole video would hold all frames in memory until the last is seen.
    """

    def __init__(self, width: int, height: int, channels: int, time_base: Fraction) -> None:
        self._graph: Any = Graph()
        source = self._graph.add_buffer(width=width, height=height, format=_SOURCES[channels, 1], time_base=time_base)
        split, made = self._graph.add("split"), self._graph.add("palettegen", "stats_mode=single")
        used, sink = self._graph.add("paletteuse", "new=1:dither=sierra2_4a"), self._graph.add("buffersink")
        source.link_to(split)
        split.link_to(made, 0, 0)
        split.link_to(used, 1, 0)
        made.link_to(used, 0, 1)
        used.link_to(sink)
        self._graph.configure()

    def push(self, pixels: NDArray[np.uint8] | None, pts: int, time_base: Fraction) -> Iterator[av.VideoFrame]:
        """Give one [H, W, C] frame, or None for the end; yields what comes out, in "pal8"."""
        picture = None
        if pixels is not None:
            picture = picture_of(pixels)
            picture.pts, picture.time_base = pts, time_base
        self._graph.vpush(picture)
        while True:
            try:
                yield self._graph.vpull()
            except (BlockingIOError, EOFError):
                return
