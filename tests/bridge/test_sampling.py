"""The nodes' work with a real ComfyUI's modules: values to a request, core's VAE, cancel, and ComfyUI's memory management. No server."""

import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

cli_args = pytest.importorskip("comfy.cli_args", reason="put a ComfyUI folder on PYTHONPATH to run this")
if not torch.cuda.is_available():
    cli_args.args.cpu = True  # before comfy.model_management looks for a GPU

import comfy.model_management as management  # noqa: E402
import comfy.utils  # noqa: E402
from diffusers_reference import HostVae  # noqa: E402
from wan_sharded.bridge import memory  # noqa: E402
from wan_sharded.bridge.core_vae import CoreVae  # noqa: E402
from wan_sharded.bridge.sampling import sample_i2v  # noqa: E402
from wan_sharded.engine import OWNER, ModelHandle, open_model  # noqa: E402
from wan_sharded.engine.errors import InvalidRequestError  # noqa: E402
from wan_sharded.engine.planning.devices import GIB  # noqa: E402

SAMPLER: dict[str, Any] = {
    "node_id": None, "loader_id": None, "positive": "a boat", "negative": "blurred", "width": 64, "height": 48, "length": 5, "batch_size": 1, "seed": 7,
    "steps": 2, "cfg": 1.0, "cfg_low_noise": 0.0, "sampler_name": "unipc", "shift": 5.0, "boundary": 0.9, "switch_step": 1,
    "last_image": None, "positive_conditioning": None, "negative_conditioning": None, "core_vae": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for tensors this small
    yield
    torch.set_num_threads(threads)
    management.interrupt_current_processing(False)
    comfy.utils.set_progress_bar_global_hook(None)
    management.unload_all_models()
    OWNER.release()


@pytest.fixture
def handle(tiny_checkpoint: Path) -> ModelHandle:
    return open_model(tiny_checkpoint)


@pytest.fixture
def image() -> torch.Tensor:
    """As LoadImage gives it: [1, H, W, 3]."""
    return torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(1))


def sample(handle: ModelHandle, image: torch.Tensor, **changes: Any) -> tuple[torch.Tensor, dict, str]:
    with torch.inference_mode():  # as ComfyUI runs nodes
        return sample_i2v(**{**SAMPLER, "handle": handle, "image": image, **changes})


def test_frames_latent_and_notes(handle: ModelHandle, image: torch.Tensor) -> None:
    frames, latent, text = sample(handle, image, batch_size=2)
    assert frames.shape == (10, 48, 64, 3)
    assert latent["samples"].shape == (2, 16, 2, 6, 8)
    assert "2 steps in" in text


def test_what_is_corrected_is_said(handle: ModelHandle, image: torch.Tensor) -> None:
    frames, _, text = sample(handle, image.expand(3, -1, -1, -1), width=70, height=63, length=8)
    assert frames.shape == (5, 48, 64, 3)
    assert "70x63 is no multiple of 16; made 64x48 instead." in text
    assert "length 8 is not 4n+1; made 5 frames instead." in text
    assert "image is a batch of 3 pictures; the first was used." in text


def test_cfg_low_noise_0_is_cfg(handle: ModelHandle, image: torch.Tensor) -> None:
    same = sample(handle, image, cfg=3.0)[0]
    assert torch.equal(sample(handle, image, cfg=3.0, cfg_low_noise=3.0)[0], same)
    assert not torch.equal(sample(handle, image, cfg=3.0, cfg_low_noise=1.0)[0], same)


def test_conditioning_replaces_the_text(handle: ModelHandle, image: torch.Tensor) -> None:
    conditioning = [[torch.ones(1, 9, 32), {"pooled_output": None}]]
    one = sample(handle, image, positive_conditioning=conditioning, positive="never read")[0]
    assert torch.equal(one, sample(handle, image, positive_conditioning=conditioning, positive="nor this")[0])
    assert not torch.equal(one, sample(handle, image)[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positive_conditioning": []}, "positive_conditioning holds 0 conditionings; Wan I2V Sampler takes exactly one"),
        ({"negative_conditioning": [[torch.zeros(1, 1, 32), {}]] * 2}, "negative_conditioning holds 2 conditionings"),
        ({"positive_conditioning": [[torch.zeros(1, 9, 4096), {}]]}, "this model wants [1, tokens, 32]"),
        ({"image": torch.zeros(0, 48, 64, 3)}, "image is an empty batch"),
        ({"image": torch.full((1, 48, 64, 3), torch.nan)}, "image holds pixels that are no numbers"),
        ({"last_image": torch.zeros(0, 48, 64, 3)}, "last_image is an empty batch"),
        ({"last_image": torch.zeros(1, 48, 64, 3), "length": 1}, "need at least 5 frames"),
        ({"steps": 0}, "steps is 0"),
        ({"cfg": 0.0}, "cfg is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"sampler_name": "heun"}, "sampler_name is 'heun'"),
        ({"width": 8}, "width is 8"),
        ({"core_vae": SimpleNamespace(latent_dim=2, latent_channels=16)}, "is no video VAE with 16-channel latents"),
        ({"core_vae": SimpleNamespace(latent_dim=3, latent_channels=48)}, "is a video VAE with 48-channel latents"),
        ({"core_vae": object()}, "wan_2.1_vae.safetensors"),
        # HunyuanVideo's: the same shape of latents, other values.
        (
            {"core_vae": SimpleNamespace(latent_dim=3, latent_channels=16, first_stage_model=torch.nn.Linear(1, 1))},
            "is a Linear, not Wan's",
        ),
    ],
    ids=lambda value: type(value["core_vae"]).__name__ if isinstance(value, dict) and "core_vae" in value else str(value),
)
def test_bad_input_is_named(handle: ModelHandle, image: torch.Tensor, changes: dict, words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        sample(handle, **{"image": image, **changes})
    assert words in str(caught.value)
    assert torch.isfinite(sample(handle, image)[0]).all()


def test_what_a_conditioning_carries_in_vain_is_said(handle: ModelHandle, image: torch.Tensor) -> None:
    embeds = torch.rand(1, 7, 32, generator=torch.Generator().manual_seed(2))
    conditioning = [[embeds, {"pooled_output": None, "attention_mask": None, "strength": 0.5, "area": (1, 2, 3, 4)}]]
    _, _, text = sample(handle, image, positive_conditioning=conditioning)
    assert "positive_conditioning carries area, strength, which Wan I2V Sampler does not use." in text
    _, _, text = sample(handle, image, positive_conditioning=[[embeds, {"pooled_output": None}]])
    assert "does not use" not in text


# ---- core's VAE


def test_cores_own_wan_vae_is_taken(handle: ModelHandle) -> None:
    from comfy.ldm.wan.vae import WanVAE

    model = WanVAE(dim=16, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    CoreVae(SimpleNamespace(latent_dim=3, latent_channels=16, first_stage_model=model), handle)


class CoreLikeVae:
    """Pictures and axes as ``comfy.sd.VAE`` has them, with the tiny checkpoint's weights inside."""

    latent_dim, latent_channels = 3, 16

    def __init__(self, checkpoint: Path, *, drops_the_batch_axis: bool = False):
        self._vae, self._drops = HostVae(checkpoint), drops_the_batch_axis

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """[T, H, W, 3] in 0..1 -> [1, 16, F, h, w]."""
        return self._vae.encode((pictures * 2 - 1).permute(3, 0, 1, 2)[None])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[1, 16, F, h, w] -> [1, T, H, W, 3] in 0..1."""
        pictures = (self._vae.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)
        return pictures[0] if self._drops else pictures


@pytest.mark.parametrize("drops_the_batch_axis", [False, True])
def test_cores_vae_gives_the_same_frames(
    handle: ModelHandle, image: torch.Tensor, tiny_checkpoint: Path, drops_the_batch_axis: bool
) -> None:
    vae = CoreLikeVae(tiny_checkpoint, drops_the_batch_axis=drops_the_batch_axis)
    own, own_latent, _ = sample(handle, image, batch_size=2)
    cores, cores_latent, _ = sample(handle, image, batch_size=2, core_vae=vae)
    assert torch.allclose(own, cores, atol=1e-5)
    assert torch.allclose(own_latent["samples"], cores_latent["samples"], atol=1e-4)


def test_axes_of_cores_vae(handle: ModelHandle, tiny_checkpoint: Path) -> None:
    vae = CoreVae(CoreLikeVae(tiny_checkpoint), handle)
    with torch.inference_mode():
        latents = vae.encode(torch.rand(2, 3, 5, 48, 64) * 2 - 1)
        assert latents.shape == (2, 16, 2, 6, 8)
        assert vae.decode(latents).shape == (2, 3, 5, 48, 64)
    assert len(vae.config.latents_mean) == 16


# ---- progress and cancel


def test_progress_counts_steps(handle: ModelHandle, image: torch.Tensor) -> None:
    seen: list[tuple[int, int]] = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: seen.append((value, total)))
    sample(handle, image, steps=3, switch_step=0)
    assert [value for value, total in seen if total == 3] == [1, 2, 3]


@pytest.mark.parametrize("step", [1, 2])
def test_cancel(handle: ModelHandle, image: torch.Tensor, step: int) -> None:
    """ComfyUI's own exception comes out, and the next run is as if nothing had been."""
    expected = sample(handle, image)[0]

    def cancel(value: int, total: int, preview: Any, **_: Any) -> None:
        if value == step:
            management.interrupt_current_processing(True)

    comfy.utils.set_progress_bar_global_hook(cancel)
    with pytest.raises(management.InterruptProcessingException):
        sample(handle, image)
    comfy.utils.set_progress_bar_global_hook(None)
    assert torch.equal(sample(handle, image)[0], expected)


# ---- ComfyUI's memory management


def test_unload_models_lets_go(handle: ModelHandle, image: torch.Tensor) -> None:
    expected = sample(handle, image)[0]
    assert OWNER.loaded is not None
    assert any(isinstance(model, memory.GpuShare) for model in management.loaded_models())
    management.unload_all_models()
    gc.collect()
    assert OWNER.loaded is None
    assert torch.equal(sample(handle, image)[0], expected)


def test_registering_twice_is_once(handle: ModelHandle, image: torch.Tensor) -> None:
    for _ in range(3):
        sample(handle, image)
    assert len([model for model in management.loaded_models() if isinstance(model, memory.GpuShare)]) == 1


def test_our_shares_report_what_is_held(handle: ModelHandle, image: torch.Tensor) -> None:
    sample(handle, image)
    (share,) = [model for model in management.loaded_models() if isinstance(model, memory.GpuShare)]
    assert share.loaded_size() == OWNER.held_bytes()["cpu"] > 500_000
    assert share.model_size() == share.loaded_size()
    OWNER.release()
    assert share.loaded_size() == 0 and share.model_size() == 1


def test_another_model_that_needs_room_does_not_drop_everything(
    handle: ModelHandle, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Core asks for amounts with a fraction, and takes a rounded answer for too little."""
    expected = sample(handle, image)[0]
    with monkeypatch.context() as patch:
        patch.setattr(management, "get_free_memory", lambda *_, torch_free_too=False: (0, 0) if torch_free_too else 0)
        asked: list[float] = []
        unload = memory.GpuShare.partially_unload
        patch.setattr(memory.GpuShare, "partially_unload", lambda self, where, amount: asked.append(amount) or unload(self, where, amount))
        management.free_memory(1000.5, management.get_torch_device())
    assert asked == [1000.5]
    assert OWNER.loaded is not None
    assert torch.equal(sample(handle, image)[0], expected)


def test_loading_models_back_drops_nothing(handle: ModelHandle, image: torch.Tensor) -> None:
    """What core's ControlNet and some packs do around an encode of their own."""
    sample(handle, image)
    used = management.loaded_models(only_currently_used=True)
    assert not any(isinstance(model, memory.GpuShare) for model in used)
    held = OWNER.held_bytes()
    management.load_models_gpu(management.loaded_models())
    assert OWNER.loaded is not None and OWNER.held_bytes() == held


@pytest.mark.parametrize(
    ("newer", "older", "left_gib"), [(None, None, 2), (None, 4.0, 5), (6 * GIB, None, 7), (GIB // 2, None, 2), (6 * GIB, 0.0, 7)]
)
def test_system_memory_that_comfyuis_cache_needs_is_left(
    monkeypatch: pytest.MonkeyPatch, newer: int | None, older: float | None, left_gib: float
) -> None:
    """Below it, ComfyUI would drop finished videos from its cache after each node."""
    monkeypatch.setattr(memory, "memory_management", None if newer is None else SimpleNamespace(RAM_CACHE_HEADROOM=newer))
    monkeypatch.setattr(cli_args.args, "cache_ram", older, raising=False)
    assert memory.reserve().host_bytes == left_gib * GIB
