"""The live picture: the whole video, moving, as ComfyUI's own previewer shows its latents, by the user's preview setting."""

import logging
import math
import sys
import time
from collections.abc import Sequence

import comfy.model_management as management
import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.latent_formats import Wan21
from PIL import Image
from server import PromptServer

from ..engine.pipeline.callbacks import StepReport
from .moving_picture import MovingPicture

logger = logging.getLogger(__name__)

# A latent frame is four frames of the video (the first is one), and Wan makes 16 a second.
LATENT_FRAME_MS = 250
# What bounds the animation, whatever the video's size: 21 frames of 104x60, or as many pixels in another shape.
MOST_FRAMES, MOST_PIXELS = 21, 21 * 104 * 60
# Colours in steps of 4: noise does not compress, and so the worst is 0.75 bytes a channel.
COLOUR_MASK = 0xFC
# How much of a step the decoding of pictures may take, where the previewer is slow (a tiny autoencoder).
SHARE_OF_A_STEP, LEAST_S = 0.03, 0.05


class LivePreview:
    """Makes the picture that goes with a finished step.

    ComfyUI's default setting is no preview; a video of many minutes deserves one, so only somebody who asks for none,
    by ``--preview-method none`` or in ComfyUI's settings, gets none. A preview that fails is the last one; the run goes on.
    """

    def __init__(self, device: torch.device):
        self._began = time.monotonic()
        try:
            self._previewer = _previewer(device)
        except management.InterruptProcessingException:
            raise
        except Exception:  # another pack's may refuse these latents
            logger.warning("Wan I2V Sampler: there is no live picture in this run.", exc_info=True)
            self._previewer = None

    def picture(self, report: StepReport):
        """What ``ProgressBar.update_absolute`` takes (format, picture, largest side), or ``None``."""
        if self._previewer is None:
            return None
        try:
            # Small, and then nothing of the run's memory is held.
            latents = report.denoised[:1].float().cpu()
            if type(self._previewer).__module__ != latent_preview.__name__:  # another pack's, which has its own ways
                return self._previewer.decode_latent_to_preview_image("JPEG", latents)
            frames, durations_ms = self._frames(latents, max(LEAST_S, SHARE_OF_A_STEP * report.seconds))
            if len(frames) == 1:
                return "JPEG", frames[0], latent_preview.MAX_PREVIEW_RESOLUTION
            return "PNG", self._moving(frames, durations_ms), None
        except management.InterruptProcessingException:
            raise
        except Exception:
            logger.warning("Wan I2V Sampler: the live picture failed and is off for the rest of this run.", exc_info=True)
            self._previewer = None
            return None

    def _frames(self, latents: torch.Tensor, seconds: float) -> tuple[list[Image.Image], list[int]]:
        """As many evenly spaced frames of latents [1, C, F, H, W] as can be decoded in a time, and how long to show each.

        One frame, where there is time for no more, is of the middle: the first frame is the photo.
        """
        count = latents.shape[2]
        middle = count // 2
        began = time.perf_counter()
        pictures = {middle: self._decode(latents, middle)}
        possible = min(MOST_FRAMES, int(seconds / (time.perf_counter() - began)))
        if count == 1 or possible < 2:
            return [pictures[middle]], [LATENT_FRAME_MS]
        stride = math.ceil(count / possible)
        shown = range(0, count, stride)
        frames = [pictures[index] if index in pictures else self._decode(latents, index) for index in shown]
        lasts = [min(stride, count - index) * LATENT_FRAME_MS for index in shown]
        lasts[0] -= LATENT_FRAME_MS * 3 // 4
        return frames, lasts

    def _decode(self, latents: torch.Tensor, index: int) -> Image.Image:
        assert self._previewer is not None
        return self._previewer.decode_latent_to_preview(latents[:, :, index : index + 1])

    def _moving(self, frames: Sequence[Image.Image], durations_ms: Sequence[int]) -> MovingPicture:
        """The animation, going on where the one before it is now; each would else begin with the photo again."""
        width, height = frames[0].size
        scale = min(1.0, math.sqrt(MOST_PIXELS / (width * height * len(frames))))
        if scale < 1:
            size = (max(1, int(width * scale)), max(1, int(height * scale)))
            frames = [frame.resize(size, Image.Resampling.BILINEAR) for frame in frames]
        frames = [frame.point(lambda value: value & COLOUR_MASK) for frame in frames]
        now_ms, first = self._elapsed_ms() % sum(durations_ms), 0
        while now_ms >= durations_ms[first]:
            now_ms -= durations_ms[first]
            first += 1
        return MovingPicture([*frames[first:], *frames[:first]], [*durations_ms[first:], *durations_ms[:first]])

    def _elapsed_ms(self) -> float:
        return 1000 * (time.monotonic() - self._began)


def _previewer(device: torch.device):
    """What turns latents into pictures by the user's settings; another pack may have put its own in place of core's."""
    if args.preview_method != LatentPreviewMethod.NoPreviews:
        return latent_preview.get_previewer(device, Wan21())
    if any(word.split("=")[0] == "--preview-method" for word in sys.argv) or _run_asks_for_none():
        return None
    return latent_preview.Latent2RGBPreviewer(Wan21.latent_rgb_factors, Wan21.latent_rgb_factors_bias)


def _run_asks_for_none() -> bool:
    """Whether the setting of newer web pages, which comes with each prompt, is "none"."""
    server = getattr(PromptServer, "instance", None)
    running = list(server.prompt_queue.currently_running.values()) if server is not None else []
    return any(item[3].get("preview_method") == LatentPreviewMethod.NoPreviews.value for item in running)
