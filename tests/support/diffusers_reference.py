"""What diffusers' own pipeline makes of the same weights, seed and inputs: what the engine's frames are compared with."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DPMSolverMultistepScheduler, UniPCMultistepScheduler, WanImageToVideoPipeline

SOLVERS = {"unipc": UniPCMultistepScheduler, "dpm++": DPMSolverMultistepScheduler}


def load_pipeline(
    checkpoint: Path, *, dtype: torch.dtype = torch.float32, solver: str = "unipc", shift: float = 5.0
) -> WanImageToVideoPipeline:
    """The checkpoint as diffusers loads it; transformers and text encoder in ``dtype``, the VAE in float32 as published."""
    vae = AutoencoderKLWan.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32)
    pipeline = WanImageToVideoPipeline.from_pretrained(checkpoint, vae=vae, torch_dtype=dtype)
    pipeline.scheduler = SOLVERS[solver](
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference_frames(
    pipeline: WanImageToVideoPipeline, *, seed: int, image: torch.Tensor, last_image: torch.Tensor | None = None, **call: Any
) -> torch.Tensor:
    """Frames [batch * T, H, W, 3] in 0..1, float32, before any rounding to 8 bits.

    Args:
        pipeline: from :func:`load_pipeline`.
        seed: of the noise.
        image, last_image: float32 [H, W, 3] in 0..1, of the video's size.
        call: the other arguments of the pipeline, by diffusers' names.
    """
    pictures = {"image": image.permute(2, 0, 1)[None]}
    if last_image is not None:
        pictures["last_image"] = last_image.permute(2, 0, 1)[None]
    with torch.inference_mode():
        videos = pipeline(**pictures, **call, generator=torch.Generator("cpu").manual_seed(seed), output_type="np").frames
    return torch.from_numpy(videos).flatten(0, 1)


def hand_written_frames(
    pipeline: WanImageToVideoPipeline,
    *,
    sigmas: list[float] | None = None,
    seed: int,
    image: torch.Tensor,
    prompt: str,
    negative_prompt: str,
    width: int,
    height: int,
    num_frames: int,
    num_inference_steps: int,
    guidance_scales: tuple[float, float],
    high_noise_steps: int,
) -> torch.Tensor:
    """The denoising loop written out, for what diffusers' pipeline cannot be asked: guidance on for one expert only, Euler steps,
    a hand-over after a number of steps.

    Args:
        sigmas: noise levels for plain Euler steps, without the last 0; else the pipeline's solver is used.
        guidance_scales: of the high and the low noise expert; 1 leaves the negative prompt out.
        high_noise_steps: how many steps the high noise expert makes.
    """
    with torch.inference_mode():
        positive, negative = pipeline.encode_prompt(
            prompt, negative_prompt, do_classifier_free_guidance=True, max_sequence_length=512, device="cpu"
        )
        pipeline.scheduler.set_timesteps(num_inference_steps)
        timesteps = pipeline.scheduler.timesteps if sigmas is None else torch.tensor(sigmas) * 1000
        latents, condition = pipeline.prepare_latents(
            image.permute(2, 0, 1)[None] * 2 - 1,
            1,
            16,
            height,
            width,
            num_frames,
            torch.float32,
            torch.device("cpu"),
            torch.Generator("cpu").manual_seed(seed),
        )
        for step, timestep in enumerate(timesteps):
            high = step < high_noise_steps
            expert = pipeline.transformer if high else pipeline.transformer_2
            scale = guidance_scales[0 if high else 1]

            seen = torch.cat([latents, condition], 1)

            def velocity(embeds, expert=expert, timestep=timestep, seen=seen):
                return expert(hidden_states=seen, timestep=timestep.expand(1), encoder_hidden_states=embeds, return_dict=False)[0]

            predicted = velocity(positive)
            if scale != 1:
                unconditional = velocity(negative)
                predicted = unconditional + scale * (predicted - unconditional)
            if sigmas is None:
                latents = pipeline.scheduler.step(predicted, timestep, latents, return_dict=False)[0]
            else:
                latents = latents + ([*sigmas, 0.0][step + 1] - sigmas[step]) * predicted
        config = pipeline.vae.config
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
        video = pipeline.vae.decode(latents * std + mean, return_dict=False)[0]
    return (video[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1)


class HostVae:
    """A VAE that works in float32 on the CPU, in the shape the engine asks for; leaves the GPUs to the transformers."""

    def __init__(self, checkpoint: Path):
        self._vae = AutoencoderKLWan.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32)
        self.config = self._vae.config

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        return self._vae.encode(video.float().cpu()).latent_dist.mode()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._vae.decode(one, return_dict=False)[0] for one in latents.split(1)])
