"""ComfyUI's AUDIO, checked and cut into the pieces that belong under each frame.

Owns the checks on sound. Knows nothing of files or codecs; called by the writer. Shapes: B batch, C channels, S samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import InvalidRequestError

_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


@dataclass(frozen=True)
class Sound:
    """One checked clip.

    Attributes:
        samples: [C, S] float32 on the CPU, -1..1.
        sample_rate: samples per second.
        layout: FFmpeg's name of the channel layout.
    """

    samples: NDArray[np.float32]
    sample_rate: int
    layout: str

    def between(self, start: Fraction, end: Fraction) -> NDArray[np.float32]:
        """The samples from ``start`` up to ``end`` (seconds from the clip's beginning); [C, n], n is 0 past its end."""
        first, last = (int(seconds * self.sample_rate) for seconds in (start, end))
        return np.ascontiguousarray(self.samples[:, first:last])


def read_audio(audio: Mapping[str, Any] | None) -> Sound | None:
    """Check ComfyUI's AUDIO.

    Args:
        audio: ``{"waveform": float [1, C, S], any device, "sample_rate": int}``, or None.

    Returns:
        The clip, or None where there is none or it has no samples.

    Raises:
        InvalidRequestError: not an AUDIO, more than one clip, channels other than mono, stereo or 5.1, NaN samples.
    """
    if audio is None:
        return None
    waveform = audio.get("waveform") if isinstance(audio, Mapping) else None  # pyright: ignore[reportUnnecessaryIsInstance]
    if not isinstance(waveform, torch.Tensor) or waveform.dim() != 3 or not waveform.is_floating_point():
        found = f"{waveform.dtype} {list(waveform.shape)}" if isinstance(waveform, torch.Tensor) else type(audio).__name__
        raise InvalidRequestError(
            f"The audio is {found}. Give ComfyUI's AUDIO: a float waveform [1, channels, samples] and its sample_rate."
        )
    clips, channels, samples = waveform.shape
    if clips != 1:
        raise InvalidRequestError(f"The audio holds {clips} clips and a video takes one. Pick one clip of the batch.")
    if channels not in _LAYOUTS:
        raise InvalidRequestError(f"The audio has {channels} channels. Mix it to mono, stereo or 5.1 first.")
    rate = audio.get("sample_rate")
    if not isinstance(rate, Integral) or not 1000 <= int(rate) <= 768_000:
        raise InvalidRequestError(f"The audio's sample rate is {rate!r}. Give a whole number of samples per second, such as 48000.")
    if samples == 0:
        return None
    if not bool(torch.isfinite(waveform).all()):
        raise InvalidRequestError(
            "The audio has NaN or infinite samples: the node that made it overflowed. Make it again, or disconnect it."
        )
    array = waveform[0].detach().to(device="cpu", dtype=torch.float32).numpy()
    return Sound(array, int(rate), _LAYOUTS[channels])
