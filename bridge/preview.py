"""The live picture: ComfyUI's own latent preview, by the user's preview setting."""

import sys

import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.latent_formats import Wan21

from ..engine.pipeline.callbacks import StepReport


class LivePreview:
    """Makes the picture that goes with a finished step.

    ComfyUI's default setting is no preview; a video of many minutes deserves one, so only an explicit
    ``--preview-method none`` turns it off.
    """

    def __init__(self, device: torch.device):
        method = args.preview_method
        self._previewer = None
        if method != LatentPreviewMethod.NoPreviews:
            self._previewer = latent_preview.get_previewer(device, Wan21())
        elif "--preview-method" not in sys.argv:
            self._previewer = latent_preview.Latent2RGBPreviewer(Wan21.latent_rgb_factors, Wan21.latent_rgb_factors_bias)

    def picture(self, report: StepReport):
        """What ``ProgressBar.update_absolute`` takes, or ``None``. The middle of the video: the first frame is the photo."""
        if self._previewer is None:
            return None
        middle = report.denoised.shape[2] // 2
        return self._previewer.decode_latent_to_preview_image("JPEG", report.denoised[:1, :, middle : middle + 1])
