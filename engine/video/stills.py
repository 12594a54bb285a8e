"""PNG files, and the EXIF of animated WebP: the parts of an export that PyAV has no way for.

Owns where ComfyUI looks for a workflow in pictures. Called by the encoder, the writer and the bridge.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .failures import export_error

_EXIF_MODEL, _EXIF_MAKE = 0x0110, 0x010F
_WEBP_FLAGS_AT = 20
_WEBP_HAS_ALPHA, _WEBP_HAS_EXIF = 0x10, 0x08


class PngSequence:
    """Writes frames as ``00001.png``, ``00002.png``, … into a folder that exists; each file carries the metadata."""

    def __init__(self, folder: Path, target: Path, metadata: Mapping[str, str]) -> None:
        self._folder, self._target, self._metadata = folder, target, metadata
        self._frames_written = 0

    def write(self, pixels: NDArray[np.uint8]) -> None:
        """Write one [H, W, C] frame, C 3 or 4.

        Raises:
            ExportError: the disk failed.
        """
        self._frames_written += 1
        try:
            write_png(pixels, self._folder / f"{self._frames_written:05}.png", self._metadata)
        except OSError as error:
            raise export_error(self._target, error) from error

    def finish(self) -> None:
        """Nothing is left to write."""

    def abandon(self) -> None:
        """Nothing is held open."""


def write_png(pixels: NDArray[np.uint8], path: Path, metadata: Mapping[str, str]) -> None:
    """Write [H, W, C] pixels, C 3 or 4, as a PNG with ``metadata`` as its text; raises ``OSError``."""
    text = PngInfo()
    for name, value in metadata.items():
        text.add_text(name, value)
    Image.fromarray(pixels).save(path, format="PNG", pnginfo=text, compress_level=4)


def add_exif_to_webp(path: Path, size: tuple[int, int], alpha: bool, metadata: Mapping[str, str]) -> None:
    """Append ``metadata`` to a WebP as ComfyUI does: "prompt:…" as the camera's model, others as its make and downwards.

    Args:
        path: animated, or a single picture, which is what the encoder makes of frames that are all the same.
        size: width, height in pixels.
        alpha: whether it may have transparency.
        metadata: nothing is written where this is empty.

    Raises:
        OSError: the disk failed.
    """
    if not metadata:
        return
    exif: Any = Image.Exif()
    others = _EXIF_MAKE
    for name, value in metadata.items():
        tag = _EXIF_MODEL if name == "prompt" else others
        others -= name != "prompt"
        exif[tag] = f"{name}:{value}".encode()
    data: bytes = exif.tobytes().removeprefix(b"Exif\0\0")
    with path.open("rb+") as file:
        # A WebP with more than one picture begins with "RIFF", size, "WEBP", "VP8X", size, flags. EXIF comes after the pictures.
        file.seek(len("RIFF....WEBP"))
        if (first := file.read(4)) != b"VP8X":
            pictures = first + file.read()
            sides = b"".join((side - 1).to_bytes(3, "little") for side in size)
            file.seek(len("RIFF....WEBP"))
            file.write(b"VP8X" + (10).to_bytes(4, "little") + bytes([_WEBP_HAS_ALPHA * alpha, 0, 0, 0]) + sides + pictures)
        file.seek(_WEBP_FLAGS_AT)
        flags = file.read(1)[0]
        file.seek(_WEBP_FLAGS_AT)
        file.write(bytes([flags | _WEBP_HAS_EXIF]))
        file.seek(0, 2)
        file.write(b"EXIF" + len(data).to_bytes(4, "little") + data + b"\0" * (len(data) % 2))
        length = file.tell() - 8
        file.seek(4)
        file.write(length.to_bytes(4, "little"))
