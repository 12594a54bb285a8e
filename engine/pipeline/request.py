"""What a video is asked to be. Checked on construction, so nothing Wan can't take gets past here."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..errors import InvalidRequestError
from ..planning.footprint import VideoShape
from .schedulers import SAMPLER_NAMES

SIZE_MULTIPLE = 16
FRAME_MULTIPLE = 4
# Rotary tables reach 1024 positions a side; 16 pixels each.
MAX_SIDE = 1024 * SIZE_MULTIPLE
MAX_FRAMES = 1023 * FRAME_MULTIPLE + 1
TRAIN_STEPS_MAX = 1000


def fit_size(width: int, height: int, num_frames: int) -> tuple[int, int, int, tuple[str, ...]]:
    """The nearest size below that Wan can take, and notes on what was changed.

    Raises:
        InvalidRequestError: nothing sensible is near.
    """
    for name, value, low, high in (
        ("width", width, SIZE_MULTIPLE, MAX_SIDE),
        ("height", height, SIZE_MULTIPLE, MAX_SIDE),
        ("length", num_frames, 1, MAX_FRAMES),
    ):
        if not low <= value <= high:
            raise InvalidRequestError(f"{name} is {value}; Wan takes {low} to {high}.")
    new_width, new_height = width // SIZE_MULTIPLE * SIZE_MULTIPLE, height // SIZE_MULTIPLE * SIZE_MULTIPLE
    new_frames = (num_frames - 1) // FRAME_MULTIPLE * FRAME_MULTIPLE + 1
    notes = []
    if (new_width, new_height) != (width, height):
        notes.append(f"{width}x{height} is no multiple of {SIZE_MULTIPLE}; made {new_width}x{new_height} instead.")
    if new_frames != num_frames:
        notes.append(f"length {num_frames} is not 4n+1; made {new_frames} frames instead.")
    return new_width, new_height, new_frames, tuple(notes)


def as_picture(picture: "Image.Image | np.ndarray | torch.Tensor", name: str = "image") -> torch.Tensor:
    """Any picture as float32 [H, W, 3] in 0..1 on the CPU.

    Args:
        picture: PIL, or array or tensor [H, W, C] or [B, H, W, C] (the first is taken), C 1, 3 or 4, float 0..1 or uint8.
        name: of the input, for messages.

    Raises:
        InvalidRequestError: empty, wrong shape, or with pixels that are no numbers.
    """
    if isinstance(picture, Image.Image):
        picture = np.array(picture.convert("RGB"))
    try:
        tensor = torch.as_tensor(picture)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidRequestError(f"{name} is a {type(picture).__name__}, no picture. Give a PIL image, or an array or tensor.") from error
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise InvalidRequestError(f"{name} holds {tensor.dtype} values; a picture is uint8 (0 to 255) or floating point (0 to 1).")
    if tensor.ndim == 4:
        if tensor.shape[0] == 0:
            raise InvalidRequestError(f"{name} is an empty batch (0 pictures). Connect at least one picture.")
        tensor = tensor[0]
    if tensor.ndim != 3 or tensor.shape[-1] not in (1, 3, 4) or 0 in tensor.shape:
        raise InvalidRequestError(f"{name} has the shape {list(tensor.shape)}; a picture is [height, width, 3].")
    tensor = tensor.detach().cpu()
    tensor = tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()
    tensor = tensor[..., :3] if tensor.shape[-1] != 1 else tensor.expand(-1, -1, 3)
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidRequestError(f"{name} holds pixels that are no numbers (NaN or infinite). Check the node that made it.")
    return tensor.clamp(0, 1)


def fill_frame(picture: torch.Tensor, width: int, height: int) -> tuple[torch.Tensor, bool]:
    """Scale a picture to fill width x height, cutting equally from two sides what sticks out.

    Args:
        picture: float32 [H, W, 3] in 0..1.

    Returns:
        The picture float32 [1, 3, height, width], and whether more than rounding was cut off.
    """
    h, w = picture.shape[:2]
    if (w, h) == (width, height):
        return picture.permute(2, 0, 1).unsqueeze(0).contiguous(), False
    scale = max(width / w, height / h)
    kept_w, kept_h = min(w, width / scale), min(h, height / scale)  # rounding must not lead outside
    left, top = (w - kept_w) / 2, (h - kept_h) / 2
    image = Image.fromarray((picture * 255).round().to(torch.uint8).numpy())
    image = image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + kept_w, top + kept_h))
    scaled = torch.from_numpy(np.asarray(image).astype(np.float32) / 255)
    return scaled.permute(2, 0, 1).unsqueeze(0).contiguous(), left >= 1 or top >= 1


@dataclass(frozen=True, eq=False)
class ImageToVideoRequest:
    """One run. Names are diffusers'.

    Attributes:
        image: first frame, float32 [H, W, 3] in 0..1 (see :func:`as_picture`).
        prompt, negative_prompt: text, unless embeddings are given.
        width, height: pixels, multiples of 16.
        num_frames: 4n+1.
        batch_size: videos from the same picture and prompt.
        seed: of the noise, 0 to 2^64-1; drawn on the CPU.
        num_inference_steps: of both experts together.
        guidance_scale: of the high noise expert, 1 = off.
        guidance_scale_2: of the low noise expert; ``None`` = the same.
        sampler_name: one of ``SAMPLER_NAMES``.
        flow_shift: above 0.
        boundary_ratio: the low noise expert takes over below this noise level, 0..1.
        switch_step: hand over after so many steps; 0 = by ``boundary_ratio``.
        last_image: last frame, like ``image``, or ``None``.
        prompt_embeds, negative_prompt_embeds: [1, L, text width], replacing the texts.

    Raises:
        InvalidRequestError: any of these is outside its range; the message names it.
    """

    image: torch.Tensor
    prompt: str = ""
    negative_prompt: str = ""
    width: int = 832
    height: int = 480
    num_frames: int = 81
    batch_size: int = 1
    seed: int = 0
    num_inference_steps: int = 20
    guidance_scale: float = 3.5
    guidance_scale_2: float | None = None
    sampler_name: str = "unipc"
    flow_shift: float = 5.0
    boundary_ratio: float = 0.9
    switch_step: int = 0
    last_image: torch.Tensor | None = None
    prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None

    def __post_init__(self) -> None:
        *_, notes = fit_size(self.width, self.height, self.num_frames)
        if notes:
            raise InvalidRequestError(" ".join(notes).replace("made", "use"))
        if self.last_image is not None and self.num_frames < 1 + FRAME_MULTIPLE:
            raise InvalidRequestError(f"length is {self.num_frames}; a first and a last frame need at least 5 frames.")
        ranges = {
            "batch_size": (self.batch_size, 1, 1024),
            "seed": (self.seed, 0, 2**64 - 1),
            "steps": (self.num_inference_steps, 1, TRAIN_STEPS_MAX),
            "cfg": (self.guidance_scale, 1.0, 1000.0),
            "cfg_low_noise": (self.low_noise_guidance_scale, 1.0, 1000.0),
            "shift": (self.flow_shift, 1e-3, 1e3),
            "boundary": (self.boundary_ratio, 0.0, 1.0),
            "switch_step": (self.switch_step, 0, TRAIN_STEPS_MAX),
        }
        for name, (value, low, high) in ranges.items():
            if not (math.isfinite(value) and low <= value <= high):
                raise InvalidRequestError(f"{name} is {value}; it must be between {low:g} and {high:g}.")
        if self.sampler_name not in SAMPLER_NAMES:
            raise InvalidRequestError(f"sampler_name is {self.sampler_name!r}; choose one of {', '.join(SAMPLER_NAMES)}.")

    @property
    def low_noise_guidance_scale(self) -> float:
        return self.guidance_scale if self.guidance_scale_2 is None else self.guidance_scale_2

    @property
    def needs_negative(self) -> bool:
        """Whether either expert uses classifier-free guidance."""
        return max(self.guidance_scale, self.low_noise_guidance_scale) > 1

    @property
    def shape(self) -> VideoShape:
        return VideoShape(self.width, self.height, self.num_frames, self.batch_size)
