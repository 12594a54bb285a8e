"""The sampler node's work: ComfyUI's values to a request, the run, and its results as ComfyUI wants them."""

import logging
from typing import Any

import torch

from ..engine import IMAGE_TO_VIDEO, ImageToVideoRequest, ModelHandle, as_picture, fit_size, probe
from ..engine.errors import InvalidRequestError
from . import memory
from .core_vae import CoreVae
from .progress import RunProgress
from .status import show_on_node, show_placement

logger = logging.getLogger(__name__)

# What every text encoder node puts into a CONDITIONING.
EXPECTED_OPTIONS = {"pooled_output", "attention_mask"}


def sample_i2v(
    *,
    node_id: str | None,
    loader_id: str | None,
    handle: ModelHandle,
    image: torch.Tensor,
    positive: str,
    negative: str,
    width: int,
    height: int,
    length: int,
    batch_size: int,
    seed: int,
    steps: int,
    cfg: float,
    cfg_low_noise: float,
    sampler_name: str,
    shift: float,
    boundary: float,
    switch_step: int,
    last_image: torch.Tensor | None,
    positive_conditioning: Any,
    negative_conditioning: Any,
    core_vae: Any,
) -> tuple[torch.Tensor, dict, str]:
    """Make the video.

    Args:
        node_id: the sampler's, which shows what it does.
        loader_id: the loader node's, which shows the placement.

    Returns:
        Frames [batch * length, height, width, 3] in 0..1, ComfyUI's LATENT, and notes for the node.

    Raises:
        WanShardedError: with the remedy.
    """
    width, height, length, notes = fit_size(width, height, length)
    if isinstance(image, torch.Tensor) and image.ndim == 4 and image.shape[0] > 1:
        notes += (f"image is a batch of {image.shape[0]} pictures; the first was used.",)
    request = ImageToVideoRequest(
        image=as_picture(image, "image"),
        last_image=None if last_image is None else as_picture(last_image, "last_image"),
        prompt=positive,
        negative_prompt=negative,
        width=width,
        height=height,
        num_frames=length,
        batch_size=batch_size,
        seed=seed,
        num_inference_steps=steps,
        guidance_scale=cfg,
        guidance_scale_2=cfg_low_noise or None,
        sampler_name=sampler_name,
        flow_shift=shift,
        boundary_ratio=boundary,
        switch_step=switch_step,
        prompt_embeds=_embeds(positive_conditioning, "positive_conditioning"),
        negative_prompt_embeds=_embeds(negative_conditioning, "negative_conditioning"),
    )
    notes += _unused(positive_conditioning, "positive_conditioning") + _unused(negative_conditioning, "negative_conditioning")
    vae = None if core_vae is None else CoreVae(core_vae, handle)
    machine = probe.probe_machine()
    memory.make_room(handle, machine)
    memory.register(device.torch_device for device in machine.devices if handle.max_memory_gib.get(device.index, 0) >= 0)
    progress = RunProgress(node_id, steps)
    result = IMAGE_TO_VIDEO(handle, request, progress.callbacks, vae=vae, reserve=memory.reserve())
    show_on_node(loader_id, "\n".join((*handle.model.notes, result.placement)))
    show_placement(loader_id, result.bars)
    text = "\n".join((*notes, *result.notes))
    for line in (*result.placement.splitlines(), *notes, *result.notes):
        logger.info("Wan I2V Sampler: %s", line)
    return result.frames, {"samples": result.latents}, text


def _embeds(conditioning: Any, name: str) -> torch.Tensor | None:
    """The embeddings [1, L, D] of a CONDITIONING.

    Raises:
        InvalidRequestError: it is empty or combined, which Wan's pipeline does not do.
    """
    if conditioning is None:
        return None
    if len(conditioning) != 1:
        raise InvalidRequestError(
            f"{name} holds {len(conditioning)} conditionings; Wan I2V Sampler takes exactly one. Connect CLIP Text Encode directly."
        )
    return conditioning[0][0]


def _unused(conditioning: Any, name: str) -> tuple[str, ...]:
    """A note on what a CONDITIONING carries besides its embeddings: areas, masks, strengths, timestep ranges, pictures."""
    if conditioning is None:
        return ()
    options = sorted(key for key, value in conditioning[0][1].items() if key not in EXPECTED_OPTIONS and value is not None)
    return (f"{name} carries {', '.join(options)}, which Wan I2V Sampler does not use.",) if options else ()
