"""The video VAE: photo to latents, latents to frames, each in a stage of its own that makes its room and gives it back.

Shapes: B batch, C channels, T frames, F latent frames, H/W pixels, h/w latents (H/8).
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from torch import nn

from .. import probe
from ..checkpoints.diffusers_folder import component_config
from ..checkpoints.stored import ModelFiles
from ..checkpoints.wan_vae_file import CHOOSE_VAE, open_wan_vae_file
from ..errors import CheckpointError
from ..loaded import LoadedModel
from ..memory_errors import is_out_of_memory
from ..planning.footprint import VideoShape
from ..planning.vae_stage import VaeStage, vae_stages
from ..weights.reading import TensorReader

CheckCancelled = Callable[[], None]


class VideoVae(Protocol):
    """What a run needs of a VAE; ComfyUI's own VAE fits through the bridge."""

    config: Any

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Video float [B, 3, T, H, W] in -1..1 -> latents [B, 16, F, h, w] as the VAE gives them (not normalised)."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The reverse; float32 [B, 3, T, H, W] in -1..1 on the CPU."""
        ...


class ModelVae:
    """The VAE of the model's own files. Its weights (0.5 GB) wait in host memory between stages.

    Args:
        model: whose.
        loaded: whose weights make room.
        shape: the run's size.
        check_cancelled: asked before every chunk of frames.
        note: told what was given up for memory.

    Raises:
        CheckpointError: the model has none, or it can't be loaded.
    """

    def __init__(
        self, model: ModelFiles, loaded: LoadedModel, shape: VideoShape, check_cancelled: CheckCancelled, note: Callable[[str], None]
    ):
        self._loaded, self._shape, self._check_cancelled, self._note = loaded, shape, check_cancelled, note
        if model.vae is None:
            raise CheckpointError(f"{model.name} has no VAE. {CHOOSE_VAE} Or connect a VAE.")
        self._path = model.vae
        self._vae: Any = self._read()
        self.config = self._vae.config

    def _read(self) -> Any:
        return _vae_from_folder(self._path) if self._path.is_dir() else _vae_from_file(self._path)

    def _in(self, dtype: torch.dtype) -> Any:
        """The VAE in a precision, on the host; read again where its weights have been rounded to less."""
        if self._vae.dtype != dtype:
            if self._vae.dtype.itemsize < dtype.itemsize:
                self._vae = self._read()
            self._vae.to(dtype)
        return self._vae

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        def work(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
            return self._vae.encode(video.to(device, dtype)).latent_dist.mode().float().cpu()

        return self._staged(work, decode=False)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        def work(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
            # One video at a time: the peak is planned for one.
            return torch.cat([self._vae.decode(one.to(device, dtype), return_dict=False)[0].float().cpu() for one in latents.split(1)])

        return self._staged(work, decode=True)

    def _staged(self, work: Callable[[torch.device, torch.dtype], torch.Tensor], *, decode: bool) -> torch.Tensor:
        """Work in the best way that is planned to fit; should it not after all, in the next way down."""
        plan = self._loaded.plan
        assert plan is not None
        ways = vae_stages(self._shape, plan.budgets, decode=decode, fragmentation=plan.fragmentation)
        for stage, is_last in zip(ways, [False] * (len(ways) - 1) + [True], strict=True):
            try:
                with self._stage(stage, decode=decode) as device:
                    result = work(device, stage.dtype)
            except RuntimeError as error:
                if is_last or not is_out_of_memory(error):
                    raise
                continue
            for note in stage.notes:
                self._note(note)
            return result
        raise AssertionError("there is always a way")

    @contextmanager
    def _stage(self, stage: VaeStage, *, decode: bool) -> Generator[torch.device, None, None]:
        device = torch.device(stage.budget.device.torch_device)
        self._loaded.make_room(stage.budget.device.index, stage.bytes_needed, stage.budget.usable_bytes)
        probe.release_cached([stage.budget.device.torch_device])
        vae = self._in(stage.dtype)
        hook = (vae.decoder if decode else vae.encoder).register_forward_pre_hook(lambda *_: self._between_chunks(stage))
        try:
            vae.to(device)
            vae.enable_tiling() if stage.tiled else vae.disable_tiling()
            yield device
        finally:
            hook.remove()
            vae.clear_cache()
            vae.to("cpu")
            probe.release_cached([stage.budget.device.torch_device])

    def _between_chunks(self, stage: VaeStage) -> None:
        self._check_cancelled()
        probe.trim(stage.budget.device.torch_device, stage.budget.usable_bytes)


class PipelineVae(nn.Module):
    """A :class:`VideoVae` in the shape diffusers' pipeline looks for."""

    def __init__(self, vae: VideoVae):
        super().__init__()
        self._encode = vae.encode
        self.config = vae.config
        self.dtype = torch.float32
        self.device = torch.device("cpu")

    def encode(self, video: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(latents=self._encode(video))


def vae_config(vae: Path | None) -> dict[str, Any]:
    """The configuration of a model's VAE without the VAE: how latents are normalised and by how much it shrinks. For another VAE in its place.

    Args:
        vae: a folder in diffusers format. A single file has no configuration inside; for one, or ``None``, it is that of Wan 2.1's VAE.

    Raises:
        CheckpointError: the folder's can't be read.
    """
    with init_empty_weights():
        model: Any = AutoencoderKLWan()
    return {**model.config, **(component_config(vae) if vae is not None and vae.is_dir() else {})}


def _vae_from_folder(folder: Path) -> Any:
    """Float32 on the host."""
    try:
        found: Any = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True, output_loading_info=True)
        vae, loading = found
    except Exception as error:  # diffusers raises many kinds; the cause is kept
        raise CheckpointError(f"The VAE in {folder.parent.name} could not be loaded: {error}. Download it again.") from error
    if loading["missing_keys"]:
        raise CheckpointError(
            f"The VAE in {folder.parent.name} lacks {len(loading['missing_keys'])} tensors, such as {min(loading['missing_keys'])}. "
            "Download it again."
        )
    return vae.eval()


def _vae_from_file(path: Path) -> Any:
    """The same of a single file."""
    file = open_wan_vae_file(path)
    with init_empty_weights():
        vae: Any = AutoencoderKLWan(**file.config)
    reader = TensorReader()
    try:
        # In memory of its own, because the VAE outlives this stage, and a mapped file may be replaced meanwhile.
        weights = {name: reader.read(stored).float() for name, stored in file.tensors.items()}
    finally:
        reader.close()
    vae.load_state_dict(weights, assign=True)
    return vae.eval()


def latents_for_decoding(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """Undo the normalisation: latents [B, C, F, h, w] as the transformer knows them -> as the VAE does. float32."""
    latents = latents.float()
    mean = torch.tensor(config.latents_mean, device=latents.device).view(1, -1, 1, 1, 1)
    # Written as diffusers computes it, so that float32 results are the same to the last bit.
    inverse_std = 1.0 / torch.tensor(config.latents_std, device=latents.device).view(1, -1, 1, 1, 1)
    return latents / inverse_std + mean


def frames_from_video(video: torch.Tensor) -> torch.Tensor:
    """[B, 3, T, H, W] in -1..1 -> [B*T, H, W, 3] in 0..1, float32."""
    batch, channels, frames, height, width = video.shape
    pictures = video.permute(0, 2, 3, 4, 1).reshape(batch * frames, height, width, channels)
    return (pictures * 0.5 + 0.5).clamp_(0, 1)
