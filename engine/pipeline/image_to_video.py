"""One video from one request: text, then VAE, then both experts, then VAE. The engine's front door.

Each stage asks the loaded model for room on its device and gives it back, so that no stage's peak stands on another's.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .. import probe
from ..checkpoints.stored import EXPERT_WORDS, HIGH_NOISE, LOW_NOISE
from ..errors import ComputationError, InvalidRequestError, PlacementError
from ..handle import ModelHandle
from ..loaded import LoadedModel
from ..memory_errors import is_out_of_memory
from ..owner import ModelOwner
from ..planning.bars import Bar
from ..planning.budgets import NO_RESERVE, Reserve
from ..planning.devices import Machine, gib
from ..reports import plan_bars, plan_report
from ..shedding import failed_device, relieving_settings
from ..system_memory import is_out_of_system_memory, out_of_system_memory_words
from .callbacks import Callbacks, StepReport
from .request import ImageToVideoRequest, fill_frame
from .schedulers import boundary_after, make_scheduler
from .sharded_pipeline import ShardedTransformer, ShardedWanPipeline
from .text import MAX_TOKENS, PromptEmbeddings
from .vae import ModelVae, PipelineVae, VideoVae, frames_from_video, latents_for_decoding

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoResult:
    """What a run gives.

    Attributes:
        frames: float32 [batch * num_frames, H, W, 3] in 0..1, CPU.
        latents: float32 [B, 16, F, h, w] as a Wan VAE decodes them, CPU.
        notes: sentences for people: what was corrected, given up, measured.
        placement: the placement report, with measured peaks.
        peak_bytes: device index -> the most torch's allocator held.
        step_seconds: of each denoising step.
        bars: the placement with measured peaks, for a picture.
    """

    frames: torch.Tensor
    latents: torch.Tensor
    notes: tuple[str, ...]
    placement: str
    peak_bytes: dict[int, int]
    step_seconds: tuple[float, ...]
    bars: tuple[Bar, ...] = ()


class ImageToVideo:
    """Makes videos with the models one owner holds; a prompt's embeddings are remembered between runs."""

    def __init__(self, owner: ModelOwner, probe_machine: Callable[[], Machine] = probe.probe_machine):
        self.owner = owner
        self._probe_machine = probe_machine
        self._embeddings = PromptEmbeddings()

    def __call__(
        self,
        handle: ModelHandle,
        request: ImageToVideoRequest,
        callbacks: Callbacks | None = None,
        *,
        vae: VideoVae | None = None,
        reserve: Reserve = NO_RESERVE,
    ) -> VideoResult:
        """Make the video.

        Args:
            handle: the model.
            request: what to make.
            callbacks: progress and cancel.
            vae: replaces the model's own.
            reserve: what the application around us wants left alone.

        Raises:
            WanShardedError: bad input, model or memory limits, with the remedy. Nothing stays half done.
        """
        callbacks = callbacks or Callbacks()
        with self.owner.lock, torch.inference_mode():
            try:
                loaded = self.owner.obtain(handle, self._probe_machine(), request.shape, reserve=reserve)
                limits = self._limits(loaded)
                loaded.ceilings.update({torch.device(device): limit for device, limit in limits.items()})
                try:
                    with probe.capped(limits):
                        return _Run(loaded, handle, request, callbacks, self._embeddings).make(vae)
                finally:
                    loaded.clear_fetch_rooms()
                    loaded.close_files()
            except Exception as error:
                if is_out_of_system_memory(error):
                    self.owner.release()
                    raise PlacementError(out_of_system_memory_words(error)) from error
                if not is_out_of_memory(error):
                    raise
                words = self._out_of_memory_words(handle, request, reserve, str(error))
                # The application may free memory and try again; what we hold must not be in its way.
                self.owner.release()
                raise torch.OutOfMemoryError(f"{words} ({error})") from error

    def _out_of_memory_words(self, handle: ModelHandle, request: ImageToVideoRequest, reserve: Reserve, message: str) -> str:
        """Which GPU it was, and settings that leave more of it for others, where a plan is found with such."""
        loaded = self.owner.loaded
        if loaded is None or loaded.plan is None:
            return "Out of memory before anything was placed."
        plan = loaded.plan

        def can_plan(tried: ModelHandle) -> bool:
            try:
                self.owner.dry_plan(tried, plan.machine, request.shape, reserve=reserve)
            except PlacementError:
                return False
            return True

        device = failed_device(loaded, message)
        limit = plan.budget(device.index).limit_bytes
        return (
            f"{device.label} ran out of memory, and moving weights to system memory was not enough or not allowed. It was used up to "
            f"{gib(limit)}: {relieving_settings(handle, plan, device.index, can_plan)}make the video smaller or shorter, or close other "
            "programs that use it."
        )

    @staticmethod
    def _limits(loaded: LoadedModel) -> dict[str, int]:
        """What may be allocated on each device: what the plan may use, and what others here have already."""
        assert loaded.plan is not None
        limits = {}
        for budget in loaded.plan.budgets:
            device = budget.device.torch_device
            others = probe.allocated_bytes(device) - loaded.resident_bytes(torch.device(device))
            limits[device] = budget.usable_bytes + max(0, others)
        return limits


class _Run:
    """One run's state, so that the stages below read as one story."""

    def __init__(
        self, loaded: LoadedModel, handle: ModelHandle, request: ImageToVideoRequest, callbacks: Callbacks, embeddings: PromptEmbeddings
    ):
        assert loaded.plan is not None
        self.loaded, self.plan, self.handle, self.request = loaded, loaded.plan, handle, request
        self.callbacks, self.embeddings = callbacks, embeddings
        self.notes: list[str] = []
        self.step_seconds: list[float] = []
        self.loading_seconds: list[float] = []

    def make(self, vae: VideoVae | None) -> VideoResult:
        for line in plan_report(self.plan).splitlines():
            logger.info("Planned: %s", line)
        for budget in self.plan.budgets:
            probe.reset_peak(budget.device.torch_device)
        # First, because what is wrong with it should not wait for the text encoder.
        vae = vae or ModelVae(self.handle.model, self.loaded, self.request.shape, self.callbacks.check_cancelled, self.notes.append)
        prompt, negative = self._prompt_embeds()
        latents = self._denoise(vae, prompt, negative)
        timings = self.loaded.timings()
        latents = latents_for_decoding(latents, vae.config).cpu()
        self.callbacks.on_stage("Decoding the frames")
        self.loaded.make_room_for_frames()
        frames = frames_from_video(vae.decode(latents))
        peaks = {b.device.index: probe.peak_bytes(b.device.torch_device) for b in self.plan.budgets}
        self.notes += self._timing_notes()
        plan = self.loaded.plan or self.plan
        bars = plan_bars(plan, peaks, own_vae=isinstance(vae, ModelVae))
        return VideoResult(frames, latents, tuple(self.notes), plan_report(plan, peaks, timings), peaks, tuple(self.step_seconds), bars)

    def _prompt_embeds(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        request, model = self.request, self.handle.model
        given = [request.prompt_embeds, request.negative_prompt_embeds if request.needs_negative else None]
        texts = [None if given[0] is not None else request.prompt]
        texts.append(request.negative_prompt if request.needs_negative and given[1] is None else None)
        wanted = [text for text in texts if text is not None]
        encoded = self.embeddings.encode(model, wanted, self.loaded, self.callbacks) if wanted else []
        found = iter(encoded)
        embeds = [next(found) if text is not None else embed for text, embed in zip(texts, given, strict=True)]
        config: Any = self.loaded.experts[HIGH_NOISE].model.config
        width: int = config.text_dim
        prompt, negative = (None if e is None else self._fit_embeds(e, width) for e in embeds)
        assert prompt is not None
        return prompt, negative

    def _fit_embeds(self, embeds: torch.Tensor, text_dim: int) -> torch.Tensor:
        if embeds.ndim != 3 or embeds.shape[-1] != text_dim:
            raise InvalidRequestError(
                f"The conditioning has the shape {list(embeds.shape)}, but this model wants [1, tokens, {text_dim}]. "
                "Use a Wan (UMT5-XXL) text encoder: Load CLIP with type 'wan'."
            )
        embeds = embeds[:1].float().cpu()
        if not bool(torch.isfinite(embeds).all()):
            raise InvalidRequestError("The conditioning holds values that are no numbers (NaN or infinite). Check the node that made it.")
        if embeds.shape[1] < MAX_TOKENS:
            embeds = torch.nn.functional.pad(embeds, (0, 0, 0, MAX_TOKENS - embeds.shape[1]))
        return embeds.to(self.plan.main_device, self.plan.precision.dtype).repeat(self.request.batch_size, 1, 1)

    def _denoise(self, vae: VideoVae, prompt: torch.Tensor, negative: torch.Tensor | None) -> torch.Tensor:
        request = self.request
        scheduler: Any = make_scheduler(request.sampler_name, request.flow_shift)
        boundary = request.boundary_ratio
        if request.switch_step:
            boundary = boundary_after(scheduler, request.num_inference_steps, request.switch_step)
        transformers = [ShardedTransformer(self.loaded, part, self.callbacks, self.notes.append) for part in (HIGH_NOISE, LOW_NOISE)]
        pipeline = ShardedWanPipeline(
            tokenizer=None,  # type: ignore[arg-type]
            text_encoder=None,  # type: ignore[arg-type]
            vae=PipelineVae(vae),  # type: ignore[arg-type]
            scheduler=scheduler,
            transformer=transformers[0],  # type: ignore[arg-type]
            transformer_2=transformers[1],  # type: ignore[arg-type]
            boundary_ratio=boundary,
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.main_device = self.plan.main_device
        pipeline.run_guidance = (request.guidance_scale, request.low_noise_guidance_scale)
        scheduler.set_timesteps(request.num_inference_steps)
        high_noise = [timestep for timestep in scheduler.timesteps if pipeline.is_high_noise(timestep)]
        if len(high_noise) < len(scheduler.timesteps):
            transformers[0].successor = LOW_NOISE
            transformers[0].forwards_left = sum(pipeline.forwards_at(timestep) for timestep in high_noise)
        self.loaded.computing.forwards_left = request.num_inference_steps * (2 if request.needs_negative else 1)
        self.callbacks.on_stage("Encoding the picture")
        try:
            return pipeline(
                image=self._frame(request.image, "image"),
                last_image=None if request.last_image is None else self._frame(request.last_image, "last_image"),
                prompt_embeds=prompt,
                negative_prompt_embeds=negative,
                height=request.height,
                width=request.width,
                num_frames=request.num_frames,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                guidance_scale_2=request.low_noise_guidance_scale,
                generator=torch.Generator("cpu").manual_seed(request.seed),
                output_type="latent",
                return_dict=False,
                callback_on_step_end=self._step_callback(transformers),
                callback_on_step_end_tensor_inputs=["latents", "noise_pred"],
            )[0]
        finally:
            self.loaded.finish_handover(wait=False)

    def _frame(self, picture: torch.Tensor, name: str) -> torch.Tensor:
        request = self.request
        frame, cut = fill_frame(picture, request.width, request.height)
        if cut:
            h, w = picture.shape[:2]
            self.notes.append(f"{name} is {w}x{h}; its edges were cut to the shape of {request.width}x{request.height}.")
        return frame

    def _step_callback(self, transformers: list[ShardedTransformer]) -> Any:
        began = time.perf_counter()

        def on_step_end(
            pipeline: ShardedWanPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]
        ) -> dict[str, Any]:
            nonlocal began
            sigma = float(pipeline.scheduler.sigmas[step + 1])
            denoised = tensors["latents"].float() - sigma * tensors["noise_pred"].float()
            if denoised.device.type == "cuda":
                torch.cuda.synchronize(denoised.device)
            if not torch.isfinite(denoised).all():
                part = HIGH_NOISE if pipeline.is_high_noise(timestep) else LOW_NOISE
                raise ComputationError(_no_numbers_words(step + 1, part, self.loaded, self.handle))
            now = time.perf_counter()
            self.step_seconds.append(now - began)
            self.loading_seconds.append(sum(transformer.loading_s for transformer in transformers) - sum(self.loading_seconds))
            began = now
            to_come: list[torch.Tensor] = list(pipeline.scheduler.timesteps[step + 1 :])
            switches = pipeline.is_high_noise(timestep) and any(not pipeline.is_high_noise(later) for later in to_come)
            report = StepReport(
                step=step + 1,
                steps=self.request.num_inference_steps,
                expert=EXPERT_WORDS[HIGH_NOISE if pipeline.is_high_noise(timestep) else LOW_NOISE],
                seconds=self.step_seconds[-1],
                loading_seconds=self.loading_seconds[-1],
                forwards=pipeline.forwards_at(timestep),
                forwards_left=sum(pipeline.forwards_at(later) for later in to_come),
                expert_to_come=EXPERT_WORDS[LOW_NOISE] if switches else "",
                denoised=denoised,
            )
            self.callbacks.on_step(report)
            return {}

        return on_step_end

    def _timing_notes(self) -> list[str]:
        if not self.step_seconds:
            return []
        computing = [seconds - loading for seconds, loading in zip(self.step_seconds, self.loading_seconds, strict=True)]
        loading = f", {sum(self.loading_seconds):.1f} s of them loading" if sum(self.loading_seconds) >= 0.1 else ""
        return [
            *self.loaded.notes(),
            f"{len(computing)} steps in {sum(self.step_seconds):.1f} s{loading}; the median step {sorted(computing)[len(computing) // 2]:.2f} s.",
        ]


def _no_numbers_words(step: int, part: str, loaded: LoadedModel, handle: ModelHandle) -> str:
    """What may be the matter where a step's result holds NaN or infinity, the likeliest first."""
    causes = []
    if loaded.precision.dtype == torch.float16:
        causes.append(
            "fp16 cannot hold numbers as large as some models need: choose bf16 as weight_dtype, where the GPUs can compute in it"
        )
    if handle.loras.get(part):
        strengths = ", ".join(f"{choice.file.path.name} at {choice.strength:g}" for choice in handle.loras[part])
        causes.append(f"a LoRA is too strong or not for this expert ({strengths}): lower it, or take it out")
    causes.append("the model's file is damaged: download it again")
    return f"Step {step} ({EXPERT_WORDS[part]}) gave values that are no numbers, so the video would be black. Possible causes: {'; '.join(causes)}."
