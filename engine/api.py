"""The engine's front door for Python, and the one owner of what is loaded in this process."""

from typing import Any

from .handle import ModelHandle
from .owner import ModelOwner
from .pipeline.callbacks import Callbacks
from .pipeline.image_to_video import ImageToVideo, VideoResult
from .pipeline.request import ImageToVideoRequest, as_picture

OWNER = ModelOwner()
IMAGE_TO_VIDEO = ImageToVideo(OWNER)


def generate(
    model: ModelHandle,
    image: Any,
    prompt: str,
    *,
    callbacks: Callbacks | None = None,
    last_image: Any = None,
    **request: Any,
) -> VideoResult:
    """Make a video from a picture and a prompt.

    Args:
        model: from :func:`engine.open_model`.
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
