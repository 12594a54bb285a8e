"""The text encoder is loaded for a prompt it has not seen, and for no other."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from wan_sharded.engine import Callbacks, ImageToVideoRequest, ModelHandle, open_model
from wan_sharded.engine.errors import CheckpointError, InvalidRequestError
from wan_sharded.engine.owner import ModelOwner
from wan_sharded.engine.pipeline import text as text_module
from wan_sharded.engine.pipeline.image_to_video import ImageToVideo
from wan_sharded.engine.pipeline.text_encoder import FolderTextEncoder
from wan_sharded.engine.pipeline.text_encoder_file import FileTextEncoder

Request = Callable[..., ImageToVideoRequest]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the text encoders that were loaded."""
    seen: list[str] = []
    for kind in (FolderTextEncoder, FileTextEncoder):

        def watched(source: Any, *arguments: Any, real: Any = kind.load) -> Any:
            seen.append(source.name)
            return real(source, *arguments)

        monkeypatch.setattr(kind, "load", watched)
    return seen


@pytest.fixture
def quick(make_request: Request) -> Request:
    def make(**changes: object) -> ImageToVideoRequest:
        return make_request(**{"num_inference_steps": 1, "num_frames": 1, **changes})

    return make


def test_a_known_prompt_needs_no_encoder(loads: list[str], tiny_checkpoint: Path, quick: Request) -> None:
    engine, handle = ImageToVideo(ModelOwner()), open_model(tiny_checkpoint)
    first = engine(handle, quick())
    again = engine(handle, quick(seed=7))
    assert len(loads) == 1, "both prompts at once"
    assert torch.equal(first.frames, again.frames)
    engine(handle, quick(prompt=quick().negative_prompt, negative_prompt=quick().prompt))
    assert len(loads) == 1, "which of the two it was does not matter"
    engine(handle, quick(prompt="something new"))
    assert len(loads) == 2


def test_without_guidance_the_negative_prompt_is_not_encoded(loads: list[str], tiny_checkpoint: Path, quick: Request) -> None:
    engine, handle = ImageToVideo(ModelOwner()), open_model(tiny_checkpoint)
    engine(handle, quick(guidance_scale=1.0))
    engine(handle, quick(guidance_scale=1.0, negative_prompt="another"))
    assert len(loads) == 1


def test_given_embeddings_need_no_encoder(loads: list[str], tiny_checkpoint: Path, quick: Request) -> None:
    embeds = {"prompt_embeds": torch.ones(1, 7, 32), "negative_prompt_embeds": torch.zeros(1, 7, 32)}
    ImageToVideo(ModelOwner())(open_model(tiny_checkpoint), quick(**embeds))
    assert loads == []


def test_another_model_encodes_anew(loads: list[str], tiny_checkpoint: Path, tmp_path: Path, quick: Request) -> None:
    """Also one with the same files, and the same one after its files changed."""
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    engine = ImageToVideo(ModelOwner())
    engine(open_model(tiny_checkpoint), quick())
    engine(open_model(copy), quick())
    assert len(loads) == 2
    os.utime(copy / "text_encoder" / "model.safetensors", (1, 1))
    engine(open_model(copy), quick())
    assert len(loads) == 3


def test_other_experts_need_no_encoder(loads: list[str], tiny_checkpoint: Path, tmp_path: Path, quick: Request) -> None:
    """Embeddings are the text encoder's, whichever expert gets them."""
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    engine = ImageToVideo(ModelOwner())
    engine(open_model(copy), quick())
    os.utime(copy / "transformer" / "diffusion_pytorch_model.safetensors", (1, 1))
    engine(open_model(copy), quick())
    assert len(loads) == 1


def test_the_oldest_is_forgotten(loads: list[str], tiny_checkpoint: Path, quick: Request) -> None:
    engine, handle = ImageToVideo(ModelOwner()), open_model(tiny_checkpoint)
    engine._embeddings = text_module.PromptEmbeddings(capacity=2)
    for prompt in ("one", "two", "one", "three", "one"):
        engine(handle, quick(prompt=prompt, guidance_scale=1.0))
    assert len(loads) == 3, "'one' was used last when 'two' had to go"


@pytest.mark.parametrize(
    ("embeds", "words"),
    [
        (torch.zeros(1, 5, 33), "[1, 5, 33]"),
        (torch.zeros(1, 5, 4096), "[1, 5, 4096]"),
        (torch.zeros(5, 32), "[5, 32]"),
        (torch.full((1, 5, 32), torch.nan), "no numbers"),
    ],
    ids=["too wide by one", "of another encoder", "one axis short", "NaN"],
)
def test_conditioning_of_another_model(tiny_checkpoint: Path, quick: Request, embeds: torch.Tensor, words: str) -> None:
    engine, handle = ImageToVideo(ModelOwner()), open_model(tiny_checkpoint)
    with pytest.raises(InvalidRequestError) as caught:
        engine(handle, quick(prompt_embeds=embeds))
    message = str(caught.value)
    assert "conditioning" in message and words in message
    if "numbers" not in words:
        assert "this model wants [1, tokens, 32]" in message and "Load CLIP with type 'wan'" in message
    assert torch.isfinite(engine(handle, quick()).frames).all(), "and the next run works"


def damage_tokenizer(model: Path) -> None:
    for file in (model / "tokenizer").iterdir():
        file.write_bytes(b"{")


def lose_a_tensor(model: Path) -> None:
    file = model / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a tokenizer that is none": damage_tokenizer,
    "an empty tokenizer folder": lambda model: [file.unlink() for file in (model / "tokenizer").iterdir()],
    "a tensor is missing": lose_a_tensor,
    "a configuration that is none": lambda model: (model / "text_encoder" / "config.json").write_text("{"),
    "a configuration of another size": lambda model: (model / "text_encoder" / "config.json").write_text(
        (model / "text_encoder" / "config.json").read_text().replace('"d_model": 32', '"d_model": 48')
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_text_encoder_that_cannot_be_loaded(tiny_checkpoint: Path, tmp_path: Path, quick: Request, damage: str) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "wan copy"))
    DAMAGE[damage](copy)
    with pytest.raises(CheckpointError, match="wan copy") as caught:
        ImageToVideo(ModelOwner())(open_model(copy), quick())
    assert "Download it again" in str(caught.value)


def test_the_stage_is_told(tiny_checkpoint: Path, quick: Request) -> None:
    stages: list[str] = []
    engine, handle = ImageToVideo(ModelOwner()), open_model(tiny_checkpoint)
    for _ in range(2):
        engine(handle, quick(), Callbacks(on_stage=stages.append))
    assert stages.count("Encoding the prompt") == 1
    assert stages.count("Encoding the picture") == 2 and stages.count("Decoding the frames") == 2


def test_a_model_without_text_encoder(tiny_checkpoint: Path, quick: Request) -> None:
    """An error only where a prompt must be encoded."""
    engine, handle = (
        ImageToVideo(ModelOwner()),
        ModelHandle(replace(open_model(tiny_checkpoint).model, text_encoder=None, tokenizer=None, name="two experts")),
    )
    with pytest.raises(CheckpointError, match="two experts has no text encoder. Choose umt5_xxl_fp8_e4m3fn_scaled.safetensors") as caught:
        engine(handle, quick())
    assert "connect positive_conditioning" in str(caught.value)
    embeds = torch.ones(1, 7, 32)
    with pytest.raises(CheckpointError, match="negative_conditioning as well"):
        engine(handle, quick(prompt_embeds=embeds))
    assert torch.isfinite(engine(handle, quick(prompt_embeds=embeds, guidance_scale=1.0)).frames).all()
    assert torch.isfinite(engine(handle, quick(prompt_embeds=embeds, negative_prompt_embeds=embeds)).frames).all()


def test_a_text_encoder_that_was_moved(tiny_checkpoint: Path, tmp_path: Path, quick: Request) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "wan copy"))
    handle = open_model(copy)
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(CheckpointError, match="wan copy.*cannot be read"):
        ImageToVideo(ModelOwner())(handle, quick())
