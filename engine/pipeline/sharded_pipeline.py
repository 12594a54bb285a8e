"""diffusers' own Wan pipeline, told where its parts are. The denoising loop is diffusers', line for line."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline

from ..loaded import LoadedModel
from ..memory_errors import is_out_of_memory
from ..shedding import failed_device, may_shed, shed
from .callbacks import Callbacks


class ShardedTransformer:
    """One expert as diffusers' pipelines see it: same call, config and dtype as ``WanTransformer3DModel``.

    Its weights come to their homes at the first call, the other expert's making room; so the switch between experts
    happens inside diffusers' loop.

    Attributes:
        loading_s: seconds that this has taken so far.
        successor: the other expert, where it takes over in this run.
        forwards_left: how many forwards of this expert are still to come, where there is a successor.
    """

    def __init__(self, loaded: LoadedModel, part: str, callbacks: Callbacks, note: Callable[[str], None]):
        self._loaded, self._part, self._callbacks, self._note = loaded, part, callbacks, note
        self.config = loaded.experts[part].model.config
        self.dtype = loaded.precision.dtype
        self.loading_s = 0.0
        self.successor: str | None = None
        self.forwards_left = 0

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Generator[None, None, None]:
        """As diffusers' ``CacheMixin.cache_context``."""
        with self._loaded.experts[self._part].model.cache_context(name, **where):
            yield

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As ``WanTransformer3DModel.forward``; outputs come back on the device of ``hidden_states``.

        A forward that runs out of memory is repeated with more blocks on the host: it changes nothing but its output. What it handed over to
        the other expert leaves first, and no more is handed over then.
        """
        calls, may_hand_over = self._callbacks, True
        while True:
            failed_on = None
            try:
                began = time.perf_counter()
                forward = self._loaded.activate(self._part, calls.check_cancelled, calls.on_load, calls.on_stage)
                self.loading_s += time.perf_counter() - began
                if self.successor is not None and self.forwards_left == 1 and may_hand_over:
                    self._loaded.hand_over_behind(self._part, self.successor)
                output = forward(*args, **kwargs)
                self._loaded.computing.forwards_left -= 1
                self.forwards_left -= 1
                return output
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failed_on = failed_device(self._loaded, str(error))
                if not may_shed(self._loaded, failed_on.index, self._part):
                    raise
            finally:
                self._loaded.after_forward(self._part)
            may_hand_over = False
            # Only here, with the exception and the activations its frames hold gone, is there memory again.
            moved = shed(self._loaded, failed_on.index, self._part)
            self._note(f"{failed_on.label} ran out of memory; {moved} moved to system memory and the step was repeated.")


class ShardedWanPipeline(WanImageToVideoPipeline):
    """``WanImageToVideoPipeline`` with guidance per expert and a main device of our choice."""

    # Lets the step callback see the prediction, for previews of the clean picture.
    _callback_tensor_inputs = [*WanImageToVideoPipeline._callback_tensor_inputs, "noise_pred"]
    main_device: torch.device
    run_guidance: tuple[float, float]

    @property
    def _execution_device(self) -> torch.device:
        return self.main_device

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Per expert: diffusers asks only the high noise expert's scale, so cfg 1 there would switch both off."""
        if self._current_timestep is None:
            return max(self.run_guidance) > 1
        return self.forwards_at(self._current_timestep) == 2

    def forwards_at(self, timestep: torch.Tensor) -> int:
        """How many forwards a step is: 2 where its expert is guided, else 1."""
        high, low = self.run_guidance
        return 2 if (high if self.is_high_noise(timestep) else low) > 1 else 1

    def is_high_noise(self, timestep: torch.Tensor) -> bool:
        """Whether the high noise expert works at a timestep."""
        config: Any = self.config
        return bool(timestep >= config.boundary_ratio * self.scheduler.config.num_train_timesteps)

    def prepare_latents(  # type: ignore[override]
        self,
        image: torch.Tensor,
        batch_size: int,
        num_channels_latents: int = 16,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        last_image: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As diffusers', on the CPU and then moved: the conditioning video would else stand on the main GPU beside the weights."""
        cpu = torch.device("cpu")
        prepared = super().prepare_latents(
            image.to(cpu),
            batch_size,
            num_channels_latents,
            height,
            width,
            num_frames,
            dtype,
            cpu,
            generator,
            latents,
            None if last_image is None else last_image.to(cpu),
        )
        first, second = (tensor.to(device) for tensor in prepared)
        return first, second
