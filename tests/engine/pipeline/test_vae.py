"""The VAE's stages: exact in float32, in tiles and in bf16 where memory is short, stopped between chunks, and damaged ones named."""

import gc
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers_reference import HostVae
from imagined_gpus import ImaginedGpus
from imagined_machine import gpu
from safetensors.torch import load_file, save_file
from tiny_checkpoint import make_vae
from tiny_encoder_files import write_vae_file
from wan_sharded.engine import Callbacks, ImageToVideoRequest, ModelHandle, open_model
from wan_sharded.engine.checkpoints.stored import ModelFiles
from wan_sharded.engine.errors import Cancelled, CheckpointError
from wan_sharded.engine.owner import ModelOwner
from wan_sharded.engine.pipeline.image_to_video import ImageToVideo
from wan_sharded.engine.pipeline.vae import ModelVae, vae_config
from wan_sharded.engine.planning.budgets import CONTEXT_BYTES
from wan_sharded.engine.planning.devices import GIB, Machine
from wan_sharded.engine.planning.footprint import VideoShape, vae_bytes

WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
Request = Callable[..., ImageToVideoRequest]


@pytest.fixture
def quick(make_request: Request) -> Request:
    def make(**changes: object) -> ImageToVideoRequest:
        embeds = {"prompt_embeds": torch.ones(1, 3, 32), "guidance_scale": 1.0}
        return make_request(**{"num_inference_steps": 1, "num_frames": 9, **embeds, **changes})

    return make


def model_vae(model: ModelFiles, quick: Request) -> ModelVae:
    return ModelVae(model, None, quick().shape, lambda: None, lambda note: None)  # type: ignore[arg-type]


def on_gpu(free_bytes: int) -> Machine:
    return Machine((gpu(0, 64, free_bytes / 0.94 / GIB),), 64 * GIB)


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_bf16_where_float32_is_too_large(tiny_checkpoint: Path, quick: Request, element_bytes: int) -> None:
    """Within rounding of float32, and said."""
    shape = VideoShape(64, 48, 9)
    room = vae_bytes(shape, decode=True, element_bytes=element_bytes, tiled=False) + 2**20
    with ImaginedGpus():
        result = ImageToVideo(ModelOwner(), lambda: on_gpu(room))(open_model(tiny_checkpoint, weight_dtype="fp32"), quick())
    with torch.inference_mode():
        video = HostVae(tiny_checkpoint).decode(result.latents)
    exact = (video[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1)
    error = float((result.frames - exact).abs().max())
    if element_bytes == 4:
        assert error <= 1e-5
        assert not [note for note in result.notes if "VAE" in note]
    else:
        assert 1e-5 < error < 0.1
        (note,) = [note for note in result.notes if "VAE decoded" in note]
        assert "in bf16: in float32 and whole it would take" in note and "GPU 0 · Imagined 64 GB may use" in note


def test_the_next_way_down_when_the_planned_one_runs_out_of_memory(tiny_checkpoint: Path, quick: Request) -> None:
    handle = open_model(tiny_checkpoint, weight_dtype="fp32")
    with ImaginedGpus() as gpus:
        engine = ImageToVideo(ModelOwner(), lambda: on_gpu(32 * GIB))
        engine(handle, quick())
        needed = gpus.peak[0]
        gpus.capacity[0] = int(0.8 * needed)
        result = engine(handle, quick())
        assert "The VAE decoded in bf16" in " ".join(result.notes)
        gpus.capacity.clear()
        assert not [note for note in engine(handle, quick()).notes if "VAE" in note], "the next run starts at the best way again"


def test_the_vae_leaves_the_gpu_when_it_is_done(tiny_checkpoint: Path, quick: Request) -> None:
    with ImaginedGpus() as gpus:
        owner = ModelOwner()
        ImageToVideo(owner, lambda: on_gpu(32 * GIB))(open_model(tiny_checkpoint, weight_dtype="fp32"), quick())
        held = owner.held_bytes()["lazy:0"]
        assert gpus.live_bytes(0) <= held + 200_000


def test_weights_make_room_for_the_vae(tiny_checkpoint: Path, quick: Request) -> None:
    """The VAE's peak must not stand on the experts' weights."""
    shape = VideoShape(64, 48, 9)
    decode = vae_bytes(shape, decode=True, element_bytes=4, tiled=False)
    handle = open_model(tiny_checkpoint, weight_dtype="fp32", max_memory_gib={0: (CONTEXT_BYTES + decode + 2**20) / GIB})
    seen: list[int] = []
    with ImaginedGpus() as gpus:
        owner = ModelOwner()
        engine = ImageToVideo(owner, lambda: on_gpu(32 * GIB))

        def on_stage(words: str) -> None:
            if words == "Decoding the frames":
                seen.append(owner.held_bytes()["lazy:0"])

        engine(handle, quick(), Callbacks(on_stage=on_stage))
        assert seen[0] > 2**19
        assert owner.held_bytes()["lazy:0"] <= 2**20, "parked while decoding"
        assert gpus.live_bytes(0) <= 2**20 + 200_000


@pytest.mark.parametrize("frames", [1, 9, 17])
def test_any_number_of_chunks(tiny_checkpoint: Path, quick: Request, frames: int, diffusers_frames: Callable) -> None:
    request = quick(num_frames=frames, prompt_embeds=None)
    result = ImageToVideo(ModelOwner())(open_model(tiny_checkpoint), request)
    assert float((result.frames - diffusers_frames(tiny_checkpoint, request)).abs().max()) <= 1e-5


def test_cancel_is_asked_between_chunks(tiny_checkpoint: Path, quick: Request) -> None:
    """Decoding 17 frames is five chunks; a stop in the middle of them must not wait for the last."""
    stage: list[str] = []
    asked: dict[str, int] = {}

    def check() -> None:
        asked[stage[-1] if stage else ""] = asked.get(stage[-1] if stage else "", 0) + 1

    engine, handle = ImageToVideo(ModelOwner()), open_model(tiny_checkpoint)
    engine(handle, quick(num_frames=17), Callbacks(check_cancelled=check, on_stage=stage.append))
    assert asked["Decoding the frames"] >= 5
    assert asked["Encoding the picture"] >= 5

    def stop() -> None:
        if stage[-1] == "Decoding the frames":
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        engine(handle, quick(num_frames=17), Callbacks(check_cancelled=stop, on_stage=stage.append))


def lose_a_tensor(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    del tensors["decoder.conv_out.weight"]
    save_file(tensors, model / WEIGHTS)


def bend_a_tensor(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors["decoder.conv_out.weight"] = torch.zeros(3, 3)
    save_file(tensors, model / WEIGHTS)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a tensor is missing": lose_a_tensor,
    "a tensor has another shape": bend_a_tensor,
    "a configuration of another size": lambda model: (model / "vae" / "config.json").write_text(
        (model / "vae" / "config.json").read_text().replace('"base_dim": 8', '"base_dim": 12')
    ),
    "a configuration with words for numbers": lambda model: (model / "vae" / "config.json").write_text(
        (model / "vae" / "config.json").read_text().replace('"base_dim": 8', '"base_dim": "eight"')
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_vae_that_cannot_be_loaded(tiny_checkpoint: Path, tmp_path: Path, quick: Request, damage: str) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "wan copy"))
    DAMAGE[damage](copy)
    engine = ImageToVideo(ModelOwner())
    with pytest.raises(CheckpointError, match="The VAE in wan copy") as caught:
        engine(open_model(copy), quick())
    assert "Download it again" in str(caught.value)
    assert torch.isfinite(engine(open_model(tiny_checkpoint), quick()).frames).all(), "and the next run works"


def test_a_precision_given_up_for_a_stage_comes_back(tiny_checkpoint: Path, quick: Request) -> None:
    """Encoding in bf16 rounds the weights; decoding in float32 afterwards must not use those."""
    vae = model_vae(open_model(tiny_checkpoint).model, quick)
    as_published = {name: tensor.clone() for name, tensor in vae._in(torch.float32).state_dict().items()}
    rounded = vae._in(torch.bfloat16).state_dict()
    assert any(not torch.equal(rounded[name].float(), tensor) for name, tensor in as_published.items())
    again = vae._in(torch.float32).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in as_published.items())


# ---- single files


@pytest.fixture(scope="module")
def published_shape() -> AutoencoderKLWan:
    """As many layers as the published VAE has, which single files take for granted."""
    return make_vae(torch.Generator().manual_seed(3), num_res_blocks=2)


@pytest.fixture
def folder(published_shape: AutoencoderKLWan, tmp_path: Path) -> Path:
    published_shape.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def files(tiny_checkpoint: Path) -> Callable[..., ModelFiles]:
    """The tiny checkpoint with another VAE."""
    model = open_model(tiny_checkpoint).model
    return lambda **parts: replace(model, **parts)


def both_ways(model: ModelFiles, quick: Request) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of a video, and the video of them."""
    vae = model_vae(model, quick)._in(torch.float32)
    video = torch.rand(1, 3, 9, 48, 64, generator=torch.Generator().manual_seed(4)) * 2 - 1
    with torch.inference_mode():
        latents = vae.encode(video).latent_dist.mode()
        return latents, vae.decode(latents, return_dict=False)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_file_gives_what_a_folder_gives(
    published_shape: AutoencoderKLWan, folder: Path, files: Callable[..., ModelFiles], tmp_path: Path, quick: Request, dtype: torch.dtype
) -> None:
    """To the last bit: in few bits too, both are widened to float32."""
    write_vae_file(tmp_path / "own.safetensors", published_shape, dtype)
    state = {name: tensor.to(dtype) for name, tensor in published_shape.state_dict().items()}
    save_file(state, tmp_path / "diffusers.safetensors")
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    expected = both_ways(files(vae=folder), quick)
    for name in ("own.safetensors", "diffusers.safetensors"):
        got = both_ways(files(vae=tmp_path / name), quick)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    model = model_vae(files(vae=tmp_path / "own.safetensors"), quick)
    assert not model._vae.training and {parameter.dtype for parameter in model._vae.parameters()} == {torch.float32}
    assert list(model.config.latents_mean) == list(published_shape.config.latents_mean)


def test_a_whole_run_with_a_file(
    published_shape: AutoencoderKLWan, folder: Path, files: Callable[..., ModelFiles], tmp_path: Path, quick: Request
) -> None:
    write_vae_file(tmp_path / "own.safetensors", published_shape)
    engine = ImageToVideo(ModelOwner())
    expected = engine(ModelHandle(files(vae=folder)), quick())
    got = engine(ModelHandle(files(vae=tmp_path / "own.safetensors")), quick())
    assert torch.equal(got.frames, expected.frames) and torch.equal(got.latents, expected.latents)


def test_in_bf16_and_back_with_a_file(
    published_shape: AutoencoderKLWan, files: Callable[..., ModelFiles], tmp_path: Path, quick: Request
) -> None:
    write_vae_file(tmp_path / "own.safetensors", published_shape)
    vae = model_vae(files(vae=tmp_path / "own.safetensors"), quick)
    exact = {name: tensor.clone() for name, tensor in vae._in(torch.float32).state_dict().items()}
    vae._in(torch.bfloat16)
    assert all(torch.equal(tensor, exact[name]) for name, tensor in vae._in(torch.float32).state_dict().items())


def test_the_file_may_go_once_the_vae_is_there(
    published_shape: AutoencoderKLWan, files: Callable[..., ModelFiles], tmp_path: Path, quick: Request
) -> None:
    write_vae_file(tmp_path / "own.safetensors", published_shape)
    vae = model_vae(files(vae=tmp_path / "own.safetensors"), quick)
    with (tmp_path / "own.safetensors").open("r+b") as file:
        file.write(b"\0" * (tmp_path / "own.safetensors").stat().st_size)
    state = vae._in(torch.float32).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in published_shape.state_dict().items())


def test_a_model_without_vae(tiny_checkpoint: Path, files: Callable[..., ModelFiles], quick: Request) -> None:
    """An error only where no other VAE is given, and before the prompt is encoded."""
    handle, stages = ModelHandle(files(vae=None, name="two experts")), []
    with pytest.raises(CheckpointError, match="two experts has no VAE. Choose wan_2.1_vae.safetensors as vae. Or connect a VAE"):
        ImageToVideo(ModelOwner())(handle, quick(prompt_embeds=None), Callbacks(on_stage=stages.append))
    assert "Encoding the prompt" not in stages
    frames = ImageToVideo(ModelOwner())(handle, quick(), vae=HostVae(tiny_checkpoint)).frames
    assert torch.equal(frames, ImageToVideo(ModelOwner())(open_model(tiny_checkpoint), quick()).frames)


def test_the_configuration_alone(folder: Path, tmp_path: Path) -> None:
    """A folder's own, and else that of Wan 2.1's VAE."""
    published = vae_config(None)
    assert published == vae_config(tmp_path / "wan_2.1_vae.safetensors")
    assert len(published["latents_mean"]) == len(published["latents_std"]) == 16
    assert (published["scale_factor_temporal"], published["scale_factor_spatial"], published["z_dim"]) == (4, 8, 16)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("-0.7571", "-0.5"))
    assert vae_config(folder)["latents_mean"][0] == -0.5
    config.write_text("{")
    with pytest.raises(CheckpointError):
        vae_config(folder)


def lose_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["decoder.head.2.weight"]


def bend_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["decoder.head.2.weight"] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    "change", [lose_one, bend_one, b"", b"PK" * 40, "truncated"], ids=["a tensor lost", "a tensor bent", "empty", "a zip", "truncated"]
)
def test_a_file_that_cannot_be_loaded(
    published_shape: AutoencoderKLWan, files: Callable[..., ModelFiles], tmp_path: Path, quick: Request, change: object
) -> None:
    """The error names the file, nothing of the VAE stays in memory, and the next run works."""
    file = tmp_path / "broken.safetensors"
    write_vae_file(file, published_shape)
    if callable(change):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    else:
        file.write_bytes(change if isinstance(change, bytes) else file.read_bytes()[:-1000])
    before = vaes()
    with pytest.raises(CheckpointError, match="broken.safetensors") as caught:
        ImageToVideo(ModelOwner())(ModelHandle(files(vae=file)), quick())
    assert "Download it again" in str(caught.value) or "Choose" in str(caught.value)
    del caught
    assert vaes() == before
    assert torch.isfinite(ImageToVideo(ModelOwner())(ModelHandle(files()), quick()).frames).all()


def vaes() -> int:
    gc.collect()
    return sum(isinstance(found, AutoencoderKLWan) for found in gc.get_objects())


def test_a_pickled_vae(files: Callable[..., ModelFiles], tmp_path: Path, quick: Request) -> None:
    with pytest.raises(CheckpointError, match="Wan2.1_VAE.pth holds pickled weights .*can run code"):
        model_vae(files(vae=tmp_path / "Wan2.1_VAE.pth"), quick)
