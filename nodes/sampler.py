"""The "Wan I2V Sampler" node."""

from typing import Any

from comfy_api.latest import io

from ..bridge import sampling
from ..bridge.graph import loader_behind
from ..engine.pipeline.schedulers import SAMPLER_NAMES
from .schema import CATEGORY, WanShardedModel, schema

# Wan's own standard negative prompt (sample_neg_prompt of the published Wan 2.2 configuration).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)


class WanShardedI2VSampler(io.ComfyNode):
    """Turn a photo and a prompt into the frames of a video with a sharded Wan 2.2 model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WanShardedI2VSampler",
            display_name="Wan I2V Sampler",
            category=CATEGORY,
            description="Makes a video from a photo and a prompt with both Wan 2.2 experts, high noise first, then low noise.",
            search_aliases=["wan 2.2", "image to video", "i2v", "multi gpu", "first last frame", "flf2v", "图生视频"],
            inputs=[
                WanShardedModel.Input("model", tooltip="From Wan Sharded Loader or Wan Sharded LoRA."),
                io.Image.Input(
                    "image",
                    tooltip="The first frame. Scaled to fill width × height, edges that stick out are cut; of a batch the first picture is used.",
                ),
                io.String.Input("positive", multiline=True, dynamic_prompts=True, default="", tooltip="What should be seen in the video."),
                io.String.Input(
                    "negative",
                    multiline=True,
                    dynamic_prompts=True,
                    default=NEGATIVE_PROMPT,
                    tooltip="What should not be seen. Only used where cfg is above 1. The default is Wan's own.",
                ),
                io.Int.Input(
                    "width",
                    default=832,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Width of the video in pixels; rounded down to a multiple of 16.",
                ),
                io.Int.Input(
                    "height",
                    default=480,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Height of the video in pixels; rounded down to a multiple of 16.",
                ),
                io.Int.Input(
                    "length",
                    default=81,
                    min=1,
                    max=4097,
                    step=4,
                    tooltip="Number of frames: 4n+1 (81 frames are 5 seconds at 16 fps); rounded down to the next 4n+1.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="How many videos to make from the same photo and prompt, each from other noise.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The noise is drawn from this number, on the CPU, so it is the same on any machine.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Number of denoising steps, both experts together."),
                io.Float.Input(
                    "cfg",
                    default=3.5,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance of the high noise expert: how strictly it follows the prompt. 1 turns it off, and a step takes half the time.",
                ),
                io.Float.Input(
                    "cfg_low_noise",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance of the low noise expert, 1 or more. 0: the same as cfg.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=list(SAMPLER_NAMES),
                    default="unipc",
                    tooltip="The solver. unipc is Wan's own choice; euler is the plain one, for models made for few steps; dpm++ is DPM-Solver++ (2M).",
                ),
                io.Float.Input(
                    "shift",
                    default=5.0,
                    min=0.01,
                    max=100.0,
                    step=0.1,
                    tooltip="Flow shift: higher spends more steps at high noise. 5 is Wan 2.2 I2V's own value.",
                ),
                io.Float.Input(
                    "boundary",
                    default=0.9,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="The high noise expert works while the noise level (timestep / 1000) is at or above this; 0.9 is Wan 2.2 I2V's own value. Ignored when switch_step is set.",
                ),
                io.Int.Input(
                    "switch_step",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Hand over to the low noise expert after this many steps. 0: use boundary.",
                ),
                io.Image.Input(
                    "last_image",
                    optional=True,
                    tooltip="The last frame, for first-and-last-frame video; scaled and cut as the first. Needs a length of 5 or more.",
                ),
                io.Conditioning.Input(
                    "positive_conditioning",
                    optional=True,
                    tooltip="From CLIP Text Encode with a Wan (UMT5) CLIP; replaces the positive text.",
                ),
                io.Conditioning.Input(
                    "negative_conditioning",
                    optional=True,
                    tooltip="From CLIP Text Encode with a Wan (UMT5) CLIP; replaces the negative text.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="A Wan 2.1 VAE from Load VAE; replaces the model's own. ComfyUI manages its memory, the loader's sliders do not count it.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="frames", tooltip="All frames, batch × length, float 0..1. Connect to Video Export."),
                io.Latent.Output(display_name="latent", tooltip="The finished latents, for VAE Decode and other core nodes."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        image: Any,
        positive: str,
        negative: str = NEGATIVE_PROMPT,
        width: int = 832,
        height: int = 480,
        length: int = 81,
        batch_size: int = 1,
        seed: int = 0,
        steps: int = 20,
        cfg: float = 3.5,
        cfg_low_noise: float = 0.0,
        sampler_name: str = "unipc",
        shift: float = 5.0,
        boundary: float = 0.9,
        switch_step: int = 0,
        last_image: Any = None,
        positive_conditioning: Any = None,
        negative_conditioning: Any = None,
        vae: Any = None,
    ) -> io.NodeOutput:
        frames, latent, notes = sampling.sample_i2v(
            node_id=cls.hidden.unique_id,
            loader_id=loader_behind(cls.hidden.dynprompt, cls.hidden.unique_id, model.node_id),
            handle=model,
            image=image,
            positive=positive,
            negative=negative,
            width=width,
            height=height,
            length=length,
            batch_size=batch_size,
            seed=seed,
            steps=steps,
            cfg=cfg,
            cfg_low_noise=cfg_low_noise,
            sampler_name=sampler_name,
            shift=shift,
            boundary=boundary,
            switch_step=switch_step,
            last_image=last_image,
            positive_conditioning=positive_conditioning,
            negative_conditioning=negative_conditioning,
            core_vae=vae,
        )
        return io.NodeOutput(frames, latent, ui={"text": (notes,)})
