"""LoRAs put on a handle from Python: which end up where, and what is refused before anything is loaded."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_loras import HIGH_NOISE_NAME, LOW_NOISE_NAME, expert_shapes, write_lora, write_pair
from wan_sharded.engine import ModelHandle, open_model, with_loras
from wan_sharded.engine.checkpoints.stored import HIGH_NOISE, LOW_NOISE
from wan_sharded.engine.errors import CheckpointError, InvalidRequestError


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lightx2v's pair, and one file that is for either expert. In a folder whose name says nothing about the files."""
    folder = tmp_path_factory.mktemp("low") / "high"
    write_pair(tiny_checkpoint, folder)
    write_lora(folder / "any.safetensors", expert_shapes(tiny_checkpoint / "transformer"), "kohya", rank=2)
    return folder


@pytest.fixture
def handle(tiny_checkpoint: Path) -> ModelHandle:
    return open_model(tiny_checkpoint)


def chosen(handle: ModelHandle) -> dict[str, list[tuple[str, float]]]:
    return {part: [(choice.file.path.name, choice.strength) for choice in choices] for part, choices in handle.loras.items()}


def test_a_pair(folder: Path, handle: ModelHandle) -> None:
    added = with_loras(handle, high_noise=[(str(folder / HIGH_NOISE_NAME), 1.0)], low_noise=[(folder / LOW_NOISE_NAME, -0.5)])
    assert chosen(added) == {HIGH_NOISE: [(HIGH_NOISE_NAME, 1.0)], LOW_NOISE: [(LOW_NOISE_NAME, -0.5)]}
    assert added.model is handle.model and handle.loras == {}, "the handle that came in is what it was"


def test_they_add_up(folder: Path, handle: ModelHandle) -> None:
    any_expert = folder / "any.safetensors"
    first = with_loras(handle, high_noise=[(folder / HIGH_NOISE_NAME, 1.0), (any_expert, 0.25)])
    second = with_loras(first, high_noise=[(any_expert, 2)], low_noise=[(any_expert, 0.75)])
    assert chosen(first) == {HIGH_NOISE: [(HIGH_NOISE_NAME, 1.0), ("any.safetensors", 0.25)]}
    assert chosen(second) == {
        HIGH_NOISE: [(HIGH_NOISE_NAME, 1.0), ("any.safetensors", 0.25), ("any.safetensors", 2)],
        LOW_NOISE: [("any.safetensors", 0.75)],
    }


def test_none_and_a_strength_of_zero(folder: Path, handle: ModelHandle) -> None:
    assert with_loras(handle) == handle
    assert with_loras(handle, low_noise=[(folder / LOW_NOISE_NAME, 0.0)]) == handle


def test_the_wrong_expert(folder: Path, handle: ModelHandle) -> None:
    with pytest.raises(CheckpointError, match=f"{LOW_NOISE_NAME} is given for the high noise expert, .* low noise expert. Give it as low_"):
        with_loras(handle, high_noise=[(folder / LOW_NOISE_NAME, 1.0)])
    with pytest.raises(CheckpointError, match="Give it as high_noise. If it is meant for both, give the file a name without 'high'"):
        with_loras(handle, low_noise=[(folder / HIGH_NOISE_NAME, 0.0)])


def test_it_must_fit_the_expert(tmp_path: Path, handle: ModelHandle) -> None:
    name = "diffusion_model.blocks.0.self_attn.q"
    small = {f"{name}.lora_down.weight": torch.zeros(2, 1536), f"{name}.lora_up.weight": torch.zeros(1536, 2)}
    save_file(small, tmp_path / "small.safetensors")
    with pytest.raises(CheckpointError, match="width 1536, as Wan 2.1 1.3B has, the low noise expert has 48"):
        with_loras(handle, low_noise=[(tmp_path / "small.safetensors", 1.0)])


def test_files_that_are_none(tmp_path: Path, handle: ModelHandle) -> None:
    with pytest.raises(CheckpointError, match="gone.safetensors"):
        with_loras(handle, high_noise=[(tmp_path / "gone.safetensors", 1.0)])
    with pytest.raises(CheckpointError, match="old.pt is a pickled file"):
        with_loras(handle, high_noise=[(tmp_path / "old.pt", 1.0)])


@pytest.mark.parametrize("strength", [math.nan, math.inf, "1", None])
def test_strengths_that_are_no_numbers(strength: float, folder: Path, handle: ModelHandle) -> None:
    with pytest.raises(InvalidRequestError, match=r"The strength of any.safetensors is (nan|inf|1|None); choose a number"):
        with_loras(handle, low_noise=[(folder / "any.safetensors", strength)])
