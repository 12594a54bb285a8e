"""Single files of the VAE: Wan's own names and diffusers', and other VAEs are named."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import load_file, save_file
from tiny_checkpoint import make_text_encoder, make_vae
from tiny_encoder_files import original_vae_name, write_umt5_file, write_vae_file
from wan_sharded.engine.checkpoints.wan_vae_file import is_vae_file, open_wan_vae_file
from wan_sharded.engine.errors import CheckpointError

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return make_vae(torch.Generator().manual_seed(0), num_res_blocks=2)


@pytest.fixture
def write(vae: AutoencoderKLWan, tmp_path: Path) -> Callable[..., Path]:
    """A file with Wan's own names, with a change."""

    def make(change: Callable[[Tensors], object] | None = None, name: str = "vae.safetensors") -> Path:
        write_vae_file(tmp_path / name, vae)
        if change:
            tensors = load_file(tmp_path / name)
            change(tensors)
            save_file(tensors, tmp_path / name)
        return tmp_path / name

    return make


def test_the_writers_names_are_those_that_diffusers_converts(vae: AutoencoderKLWan) -> None:
    names = {original_vae_name(name): name for name in vae.state_dict()}
    assert len(names) == len(vae.state_dict())
    assert convert_wan_vae_to_diffusers(names) == {name: name for name in vae.state_dict()}


def test_the_published_names() -> None:
    """A few of wan_2.1_vae.safetensors, which has 194 tensors."""
    with torch.device("meta"):
        names = {original_vae_name(name): tuple(tensor.shape) for name, tensor in AutoencoderKLWan().state_dict().items()}
    assert len(names) == 194
    assert names["encoder.conv1.weight"] == (96, 3, 3, 3, 3)
    assert names["encoder.downsamples.3.shortcut.weight"] == (192, 96, 1, 1, 1)
    assert names["encoder.downsamples.5.time_conv.weight"] == (192, 192, 3, 1, 1)
    assert names["decoder.middle.1.to_qkv.weight"] == (1152, 384, 1, 1)
    assert names["decoder.upsamples.4.shortcut.weight"] == (384, 192, 1, 1, 1)
    assert names["decoder.upsamples.7.resample.1.weight"] == (192, 384, 3, 3)
    assert names["decoder.head.2.weight"] == (3, 96, 3, 3, 3)
    assert names["conv1.weight"] == (32, 32, 1, 1, 1) and names["conv2.weight"] == (16, 16, 1, 1, 1)


@pytest.mark.parametrize("original", [True, False], ids=["Wan's names", "diffusers' names"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_both_namings_and_every_dtype(vae: AutoencoderKLWan, tmp_path: Path, original: bool, dtype: torch.dtype) -> None:
    file = tmp_path / "vae.safetensors"
    if original:
        write_vae_file(file, vae, dtype)
    else:
        save_file({name: tensor.to(dtype) for name, tensor in vae.state_dict().items()}, file)
    found = open_wan_vae_file(file)
    assert {name: stored.shape for name, stored in found.tensors.items()} == {n: tuple(t.shape) for n, t in vae.state_dict().items()}
    assert {**vae.config, **found.config, "decoder_base_dim": None} == dict(vae.config)
    assert is_vae_file(file)


def test_other_widths_and_a_narrower_decoder(tmp_path: Path) -> None:
    """As the lightened VAEs have."""
    for sizes in ({"base_dim": 12}, {"base_dim": 8, "decoder_base_dim": 4}):
        write_vae_file(tmp_path / "vae.safetensors", AutoencoderKLWan(**sizes))  # type: ignore[arg-type]
        config = open_wan_vae_file(tmp_path / "vae.safetensors").config
        assert {name: config[name] for name in sizes} == sizes


def wan22(tensors: Tensors) -> None:
    tensors["conv2.weight"] = torch.ones(48, 48, 1, 1, 1)


def only(key: str, *sizes: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors.clear()
        tensors[key] = torch.ones(sizes)

    return change


def inside(tensors: Tensors) -> None:
    for key in list(tensors):
        tensors[f"vae.{key}"] = tensors.pop(key)


FOREIGN: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "Wan 2.2 5B's": (wan22, "is the video VAE of Wan 2.2 TI2V 5B"),
    "Stable Diffusion's": (only("decoder.conv_in.weight", 2, 2, 3, 3), "is an image VAE"),
    "in a checkpoint": (only("first_stage_model.decoder.conv_in.weight", 2, 2, 3, 3), "is a whole checkpoint with an image VAE"),
    "HunyuanVideo's": (only("decoder.conv_in.conv.weight", 2, 2, 3, 3, 3), "is the VAE of another video model"),
    "a preview's": (only("decoder.1.weight", 2, 2, 3, 3), "is a small VAE for previews"),
    "a Wan expert": (only("blocks.0.self_attn.norm_q.weight", 4), "is a part of a Wan model"),
    "inside a larger file": (inside, "is a VAE inside a larger file"),
    "anything": (only("weight", 2), "holds no VAE that is known here"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_another_vae_is_named(write: Callable[..., Path], kind: str) -> None:
    change, words = FOREIGN[kind]
    file = write(change, "foreign.safetensors")
    with pytest.raises(CheckpointError, match="foreign.safetensors") as caught:
        open_wan_vae_file(file)
    assert words in str(caught.value) and "Choose wan_2.1_vae.safetensors as vae." in str(caught.value)
    assert not is_vae_file(file)


def test_a_text_encoder_is_named(tmp_path: Path) -> None:
    write_umt5_file(tmp_path / "umt5.safetensors", make_text_encoder(64, torch.Generator()), None, "fp16")
    with pytest.raises(CheckpointError, match="umt5.safetensors is a UMT5 text encoder, not Wan 2.1's VAE"):
        open_wan_vae_file(tmp_path / "umt5.safetensors")


def put(key: str, value: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({key: value})


DAMAGED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "a tensor is missing": (lambda tensors: tensors.pop("decoder.head.2.bias"), "lacks 1 tensors, such as decoder.conv_out.bias"),
    "the first tensor is missing": (lambda tensors: tensors.pop("encoder.conv1.weight"), "has not the tensors of Wan 2.1's VAE"),
    "another shape": (put("decoder.head.2.bias", torch.ones(4)), "tensor decoder.head.2.bias is [4], but should be [3]"),
    "a number for a tensor": (put("encoder.conv1.weight", torch.ones(())), "has not the tensors of Wan 2.1's VAE"),
    "no channels": (put("encoder.conv1.weight", torch.ones(0, 3, 3, 3, 3)), "but should be [0]"),
    "a layer without a number": (put("decoder.upsamples.abc.residual.0.gamma", torch.ones(1)), "has not the tensors of Wan 2.1's VAE"),
    "whole numbers": (put("decoder.head.2.bias", torch.ones(3, dtype=torch.int8)), "is stored as I8"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_named(write: Callable[..., Path], damage: str) -> None:
    change, words = DAMAGED[damage]
    with pytest.raises(CheckpointError, match="damaged.safetensors") as caught:
        open_wan_vae_file(write(change, "damaged.safetensors"))
    assert words in str(caught.value)


def test_another_number_of_residual_blocks(tmp_path: Path) -> None:
    """diffusers' names of one; Wan's own names are only known for two."""
    one = make_vae(torch.Generator().manual_seed(0))
    save_file(one.state_dict(), tmp_path / "one.safetensors")
    assert open_wan_vae_file(tmp_path / "one.safetensors").config["num_res_blocks"] == 1


@pytest.mark.parametrize("name", ["empty.safetensors", "short.safetensors", "Wan2.1_VAE.pth", "vae.gguf"])
def test_what_is_no_whole_file(write: Callable[..., Path], tmp_path: Path, name: str) -> None:
    whole = write().read_bytes()
    (tmp_path / name).write_bytes({"empty.safetensors": b"", "short.safetensors": whole[:-100]}.get(name, whole))
    with pytest.raises(CheckpointError, match=name):
        open_wan_vae_file(tmp_path / name)
    assert not is_vae_file(tmp_path / name)
