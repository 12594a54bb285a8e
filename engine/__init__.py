"""The engine: Wan 2.2 image to video with the experts sharded over all GPUs. Needs torch and diffusers, never ComfyUI.

    from wan_sharded.engine import generate, open_model, write_video
"""

from typing import Any

from . import environment

environment.prepare()  # before anything here imports torch

from .errors import WanShardedError  # noqa: E402
from .handle import ModelHandle, open_model  # noqa: E402
from .pipeline.callbacks import Callbacks, StepReport  # noqa: E402
from .pipeline.image_to_video import ImageToVideo, VideoResult  # noqa: E402
from .pipeline.request import ImageToVideoRequest, as_picture, fit_size  # noqa: E402
from .video.writer import write_video  # noqa: E402
from .weights.owner import ModelOwner  # noqa: E402

__all__ = [
    "Callbacks",
    "ImageToVideoRequest",
    "ModelHandle",
    "StepReport",
    "VideoResult",
    "WanShardedError",
    "generate",
    "open_model",
    "write_video",
]

# The one owner of what is loaded in this process.
OWNER = ModelOwner()
IMAGE_TO_VIDEO = ImageToVideo(OWNER)


def generate(model: ModelHandle, image: Any, prompt: str, *, callbacks: Callbacks | None = None, last_image: Any = None, **request: Any) -> VideoResult:
    """Make a video from a picture and a prompt.

    Args:
        model: from :func:`open_model`.
        image: PIL image, or array or tensor [H, W, 3] (float 0..1 or uint8).
        prompt: what should be seen.
        callbacks: progress and cancel.
        last_image: the last frame, for first-and-last-frame video.
        request: any other field of :class:`ImageToVideoRequest` (``num_frames``, ``num_inference_steps``, ``seed``, ...).

    Raises:
        WanShardedError: bad input, model or memory limits, with the remedy.
    """
    pictures = {"image": as_picture(image), "last_image": None if last_image is None else as_picture(last_image, "last_image")}
    return IMAGE_TO_VIDEO(model, ImageToVideoRequest(prompt=prompt, **pictures, **request), callbacks)
