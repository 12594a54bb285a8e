"""Frames in any form people hold them, as RGB or RGBA pictures one at a time.

Owns the checks on pixels, their rounding and the order of frames. Knows nothing of files or codecs; called by the writer.
Shapes: T frames, H height and W width in pixels, C channels (3 RGB, or 4 RGBA).
"""

from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..errors import InvalidRequestError

Frame: TypeAlias = torch.Tensor | NDArray[Any] | Image.Image
Frames: TypeAlias = torch.Tensor | NDArray[Any] | Iterable[Frame]

_ROWS = 32  # 0.5 MB of a frame 1280 wide


def check_batch(frames: Any) -> None:
    """Refuse a batch whose shape cannot be a video, before anything is written. Lists and generators pass unseen.

    Args:
        frames: a tensor or array is checked to be [T, H, W, C] with C 3 or 4 and none of T, H, W zero.

    Raises:
        InvalidRequestError: with the shape, and which shape is expected.
    """
    if not isinstance(frames, torch.Tensor | np.ndarray):
        return
    shape = tuple(cast("torch.Tensor", frames).shape)
    if len(shape) != 4 or shape[3] not in (3, 4):
        hint = " For a batch of videos, write one video at a time: frames[0], frames[1], …" if len(shape) == 5 else ""
        raise InvalidRequestError(
            f"Frames of shape {list(shape)} are not a video. Give [frames, height, width, channels] with 3 or 4 channels.{hint}"
        )
    if 0 in shape:
        raise InvalidRequestError(f"There are no pixels in frames of shape {list(shape)}. Give at least one frame of at least 1×1 pixel.")


def frame_total(frames: Frames) -> int | None:
    """Number of frames, or None where only the end of the iterator will tell."""
    return len(frames) if isinstance(frames, Sized) else None


class PingPong(Sized):
    """Frames forwards, then backwards without the two ends: 0 1 2 3 2 1. A view; nothing is copied."""

    def __init__(self, frames: torch.Tensor | NDArray[Any] | Sequence[Frame]) -> None:
        self._frames = frames

    def __len__(self) -> int:
        return max(len(self._frames), 2 * len(self._frames) - 2)

    def __iter__(self) -> Iterator[Frame]:
        return (cast("Frame", self._frames[index]) for index in self.order())

    def order(self) -> list[int]:
        """The indices of the frames shown."""
        return [*range(len(self._frames)), *range(len(self._frames) - 2, 0, -1)]


def rgb_frames(frames: Frames, *, alpha: bool = False, bits: int = 8) -> Iterator[NDArray[Any]]:
    """Yield each frame on the CPU, rounded to ``bits``; one frame is held at a time.

    Args:
        frames: [T, H, W, C] tensor (any device) or array, or an iterable of [H, W, C] tensors, arrays or PIL images.
            Floating point 0..1 (values outside are clamped, as ComfyUI does) or uint8 0..255.
        alpha: keep a fourth channel where frames have one; else it is dropped.
        bits: 8 or 16.

    Yields:
        [H, W, C] uint8 or uint16, contiguous; C is 3, or 4 with alpha.

    Raises:
        InvalidRequestError: no frames, a wrong shape or type, frames of different sizes, NaN or infinite pixels.
    """
    check_batch(frames)
    size: tuple[int, ...] | None = None
    for index, frame in enumerate(frames):
        rgb = _pixels(frame, index, alpha, bits)
        size = size or rgb.shape
        if rgb.shape[2] != size[2]:
            raise InvalidRequestError(
                f"Frame {index} has {rgb.shape[2]} channels and the first frame has {size[2]}. Give all frames alpha, or none."
            )
        if rgb.shape != size:
            raise InvalidRequestError(
                f"Frame {index} is {rgb.shape[1]}×{rgb.shape[0]} pixels and the first frame is {size[1]}×{size[0]}. Scale all frames to one size."
            )
        yield rgb
    if size is None:
        raise InvalidRequestError("There are no frames to write. Give at least one.")


def _pixels(frame: Any, index: int, alpha: bool, bits: int) -> NDArray[Any]:
    if isinstance(frame, Image.Image):
        frame = np.array(frame.convert("RGBA" if alpha and frame.mode in ("RGBA", "LA", "PA") else "RGB"))
    if isinstance(frame, np.ndarray):
        frame = _tensor(cast("NDArray[Any]", frame), index)
    if not isinstance(frame, torch.Tensor):
        raise _type_error(type(frame).__name__, index)
    if frame.dim() != 3 or frame.shape[2] not in (3, 4) or 0 in frame.shape:
        raise InvalidRequestError(f"Frame {index} has the shape {list(frame.shape)}. Give [height, width, channels] with 3 or 4 channels.")
    pixels = frame.detach() if alpha else frame.detach()[..., :3]
    if pixels.dtype == torch.uint8:
        array = pixels.cpu().contiguous().numpy()
        return array if bits == 8 else array.astype(np.uint16) * 257
    if not pixels.is_floating_point():
        raise _type_error(pixels.dtype, index)
    return _rounded(pixels.float().cpu().numpy(), index, bits)


def _rounded(pixels: NDArray[np.float32], index: int, bits: int) -> NDArray[Any]:
    """[H, W, C] float as uint8 or uint16."""
    # NumPy and not torch, whose threads would wait for cores that the encoder's threads keep busy. Some rows at a time stay in the
    # processor's cache; new memory of a frame's size would cost more than the arithmetic.
    highest, dtype = (255, np.uint8) if bits == 8 else (65535, np.uint16)
    whole = np.empty(pixels.shape, dtype)
    for begin in range(0, len(pixels), _ROWS):
        rows = pixels[begin : begin + _ROWS]
        if not (np.isfinite(rows.min()) and np.isfinite(rows.max())):  # both keep NaN
            raise InvalidRequestError(
                f"Frame {index} has NaN or infinite pixels: the model or the VAE that made it overflowed. "
                "Use bf16 instead of fp16 there, another VAE, or a lower LoRA strength."
            )
        rows = rows.clip(0, 1)
        rows *= highest
        whole[begin : begin + _ROWS] = np.rint(rows, out=rows)
    return whole


def _tensor(frame: NDArray[Any], index: int) -> torch.Tensor:
    if frame.dtype != np.uint8 and frame.dtype.kind != "f":
        raise _type_error(frame.dtype, index)
    # A copy of one frame: torch takes neither read-only arrays nor negative strides (frames[::-1]), nor long doubles.
    return torch.from_numpy(np.array(frame, dtype=np.uint8 if frame.dtype == np.uint8 else np.float32, order="C"))


def _type_error(found: object, index: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"Frame {index} is of type {found}. Give floating point 0..1 or uint8 0..255 as a tensor, an array or a PIL image."
    )
