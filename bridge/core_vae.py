"""ComfyUI's own Wan VAE in the place of the model's. Its memory is ComfyUI's business."""

from types import SimpleNamespace
from typing import Any

import torch

from ..engine import probe
from ..engine.errors import InvalidRequestError
from ..engine.handle import ModelHandle
from ..engine.pipeline.vae import vae_config


def _without_our_limits():
    """The sliders are this pack's; ComfyUI's VAE takes what ComfyUI gives it."""
    return probe.capped({f"cuda:{gpu.torch_index}": gpu.total_bytes for gpu in probe.visible_gpus()})


class CoreVae:
    """A ``comfy.sd.VAE`` as the engine's ``VideoVae``.

    Args:
        vae: from core's Load VAE.
        handle: whose VAE configuration (normalisation of the latents) applies.

    Raises:
        InvalidRequestError: it is no Wan 2.1 video VAE.
    """

    def __init__(self, vae: Any, handle: ModelHandle):
        if getattr(vae, "latent_dim", None) != 3 or getattr(vae, "latent_channels", None) != 16:
            kind = "a video" if getattr(vae, "latent_dim", None) == 3 else "no video"
            raise InvalidRequestError(
                f"The connected vae is {kind} VAE with {getattr(vae, 'latent_channels', '?')}-channel latents; Wan 2.2 14B needs Wan 2.1's "
                "video VAE with 16 (wan_2.1_vae.safetensors). Connect that one, or nothing to use the model's own."
            )
        model = getattr(vae, "first_stage_model", None)
        # HunyuanVideo's VAE has the same shape of latents, and other values in them.
        if model is not None and "wan" not in type(model).__module__.split("."):
            raise InvalidRequestError(
                f"The connected vae is a {type(model).__name__}, not Wan's. Connect Wan 2.1's video VAE (wan_2.1_vae.safetensors), or nothing "
                "to use the model's own."
            )
        self._vae = vae
        self.config = SimpleNamespace(**vae_config(handle.model.vae))

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """[B, 3, T, H, W] in -1..1 -> [B, 16, F, h, w]."""
        pictures = (video.float().cpu().permute(0, 2, 3, 4, 1) + 1) / 2
        with _without_our_limits():
            return torch.cat([self._vae.encode(one).float().cpu() for one in pictures])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, 16, F, h, w] -> [B, 3, T, H, W] in -1..1."""
        videos = []
        for one in latents.split(1):
            with _without_our_limits():
                pictures = self._vae.decode(one).float().cpu()  # [1, T, H, W, 3] in 0..1; older servers drop the first axis
            videos.append(pictures.reshape(1, *pictures.shape[-4:]).permute(0, 4, 1, 2, 3) * 2 - 1)
        return torch.cat(videos)
