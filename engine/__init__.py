"""The engine: Wan 2.2 image to video with the experts sharded over all GPUs. Needs torch and diffusers, never ComfyUI.

    from wan_sharded.engine import generate, open_model, write_video

Names are looked up when first used: importing diffusers takes seconds, and a server that only lists nodes needs none of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import environment

environment.prepare()  # before anything here imports torch

if TYPE_CHECKING:
    from .api import IMAGE_TO_VIDEO, OWNER, generate
    from .calibration import Calibration, calibrate
    from .errors import BusyError, WanShardedError
    from .handle import ModelHandle, open_model, with_loras
    from .pipeline.callbacks import Callbacks, StepReport
    from .pipeline.image_to_video import VideoResult
    from .pipeline.request import ImageToVideoRequest, as_picture, fit_size
    from .video.writer import write_video

_HOMES = {
    "IMAGE_TO_VIDEO": ".api",
    "OWNER": ".api",
    "generate": ".api",
    "Calibration": ".calibration",
    "calibrate": ".calibration",
    "BusyError": ".errors",
    "WanShardedError": ".errors",
    "ModelHandle": ".handle",
    "open_model": ".handle",
    "with_loras": ".handle",
    "Callbacks": ".pipeline.callbacks",
    "StepReport": ".pipeline.callbacks",
    "VideoResult": ".pipeline.image_to_video",
    "ImageToVideoRequest": ".pipeline.request",
    "as_picture": ".pipeline.request",
    "fit_size": ".pipeline.request",
    "write_video": ".video.writer",
}

__all__ = [
    "IMAGE_TO_VIDEO",
    "OWNER",
    "BusyError",
    "Calibration",
    "Callbacks",
    "ImageToVideoRequest",
    "ModelHandle",
    "StepReport",
    "VideoResult",
    "WanShardedError",
    "as_picture",
    "calibrate",
    "fit_size",
    "generate",
    "open_model",
    "with_loras",
    "write_video",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
