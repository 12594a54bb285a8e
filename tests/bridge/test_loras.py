"""The LoRA node's work on a real ComfyUI's ``folder_paths``, whose folders are this test's own, and on a tiny real model."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_loras import HIGH_NOISE_NAME, LOW_NOISE_NAME, expert_shapes, write_lora, write_pair

folder_paths = pytest.importorskip("folder_paths", reason="put a ComfyUI folder on PYTHONPATH to run this")

from wan_sharded.bridge import loras  # noqa: E402
from wan_sharded.engine import ModelHandle, open_model  # noqa: E402
from wan_sharded.engine.checkpoints.stored import HIGH_NOISE, LOW_NOISE  # noqa: E402
from wan_sharded.engine.errors import CheckpointError, InvalidRequestError  # noqa: E402

PLAIN = "any expert.safetensors"


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's loras folder: lightx2v's pair, and one file that is for either expert."""
    write_pair(tiny_checkpoint, tmp_path / "loras")
    write_lora(tmp_path / "loras" / PLAIN, expert_shapes(tiny_checkpoint / "transformer"), "kohya", rank=2)
    known = {**folder_paths.folder_names_and_paths, "loras": ([str(tmp_path / "loras")], {".safetensors", ".pt"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path / "loras"


@pytest.fixture
def handle(tiny_checkpoint: Path) -> ModelHandle:
    return open_model(tiny_checkpoint)


def add(handle: ModelHandle, high: str = "none", low: str = "none", **strengths: float) -> tuple[ModelHandle, str]:
    values: dict[str, Any] = {"high_noise_strength": 1.0, "low_noise_strength": 1.0, **strengths}
    return loras.add_loras(handle, high_noise_lora=high, low_noise_lora=low, **values)


def test_choices(folder: Path) -> None:
    assert loras.lora_choices() == ["none", PLAIN, HIGH_NOISE_NAME, LOW_NOISE_NAME]


def test_a_pair(folder: Path, handle: ModelHandle) -> None:
    added, text = add(handle, HIGH_NOISE_NAME, LOW_NOISE_NAME, high_noise_strength=0.5, low_noise_strength=-1.25)
    assert {part: [(choice.file.path, choice.strength) for choice in choices] for part, choices in added.loras.items()} == {
        HIGH_NOISE: [(folder / HIGH_NOISE_NAME, 0.5)],
        LOW_NOISE: [(folder / LOW_NOISE_NAME, -1.25)],
    }
    assert added.model is handle.model and not handle.loras, "the handle that came in is what it was"
    assert text.splitlines() == [
        f"High noise expert: {HIGH_NOISE_NAME} at strength 0.5 changes 55 weights (rank 4) and 95 other parameters as a whole.",
        f"Low noise expert: {LOW_NOISE_NAME} at strength -1.25 changes 55 weights (rank 4) and 95 other parameters as a whole.",
    ]


def test_each_expert_for_itself(folder: Path, handle: ModelHandle) -> None:
    assert add(handle)[0] == handle
    assert add(handle)[1] == "No LoRA is chosen: the model is as it was."
    high, text = add(handle, high=HIGH_NOISE_NAME)
    assert list(high.loras) == [HIGH_NOISE] and "Low noise" not in text
    low, _ = add(handle, low=LOW_NOISE_NAME)
    assert list(low.loras) == [LOW_NOISE]
    both, text = add(handle, PLAIN, PLAIN)
    assert [choices[0].file.path.name for choices in both.loras.values()] == [PLAIN, PLAIN]
    assert "changes 57 weights (rank 2)." in text


def test_a_strength_of_zero(folder: Path, handle: ModelHandle) -> None:
    added, text = add(handle, HIGH_NOISE_NAME, LOW_NOISE_NAME, high_noise_strength=0.0)
    assert list(added.loras) == [LOW_NOISE]
    assert f"High noise expert: {HIGH_NOISE_NAME} has a strength of 0 and is left out." in text


def test_nodes_in_a_row(folder: Path, handle: ModelHandle) -> None:
    first, _ = add(handle, HIGH_NOISE_NAME, LOW_NOISE_NAME)
    second, _ = add(first, high=PLAIN, high_noise_strength=0.3)
    assert [(choice.file.path.name, choice.strength) for choice in second.loras[HIGH_NOISE]] == [(HIGH_NOISE_NAME, 1.0), (PLAIN, 0.3)]
    assert second.loras[LOW_NOISE] == first.loras[LOW_NOISE] and len(first.loras[HIGH_NOISE]) == 1


def test_the_wrong_expert(folder: Path, handle: ModelHandle) -> None:
    with pytest.raises(CheckpointError, match=f"high_noise_lora is {LOW_NOISE_NAME}, .* for the low noise expert.* low_noise_lora"):
        add(handle, high=LOW_NOISE_NAME)
    with pytest.raises(CheckpointError, match=f"low_noise_lora is {HIGH_NOISE_NAME}, .* for the high noise expert.* high_noise_lora"):
        add(handle, PLAIN, HIGH_NOISE_NAME, low_noise_strength=0.0)


@pytest.mark.parametrize("name", ["my lora.safetensors", "../secret.safetensors", "/etc/passwd", "", "sub/../any expert.safetensors"])
def test_unknown_files(name: str, folder: Path, handle: ModelHandle) -> None:
    save_file({}, folder.parent / "secret.safetensors")
    with pytest.raises(CheckpointError, match=r"low_noise_lora: there is no file '.*' here\. Choose one of: .*models/loras"):
        add(handle, low=name)


def test_an_empty_folder(folder: Path, handle: ModelHandle) -> None:
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="there is no file 'gone.safetensors' here. There is no other."):
        add(handle, high="gone.safetensors")


def test_files_that_cannot_be_added(folder: Path, handle: ModelHandle) -> None:
    (folder / "old.pt").write_bytes(b"")
    save_file({"lora_unet_down_blocks_0_proj_in.lora_up.weight": torch.zeros(2, 2)}, folder / "sd.safetensors")
    name = "diffusion_model.blocks.0.self_attn.q"
    save_file(
        {f"{name}.lora_down.weight": torch.zeros(2, 1536), f"{name}.lora_up.weight": torch.zeros(1536, 2)}, folder / "small.safetensors"
    )
    for file, words in {
        "old.pt": "old.pt is a pickled file",
        "sd.safetensors": "sd.safetensors belongs to a Stable Diffusion model",
        "small.safetensors": "width 1536, as Wan 2.1 1.3B has, the low noise expert has 48",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            add(handle, low=file)


@pytest.mark.parametrize("strength", [math.nan, math.inf])
def test_strengths_that_are_no_numbers(strength: float, folder: Path, handle: ModelHandle) -> None:
    with pytest.raises(InvalidRequestError, match="low_noise_strength is (nan|inf)"):
        add(handle, low=LOW_NOISE_NAME, low_noise_strength=strength)


def test_keys_that_fit_nothing_are_named(folder: Path, handle: ModelHandle, caplog: pytest.LogCaptureFixture) -> None:
    image_layers = {f"diffusion_model.blocks.{block}.cross_attn.norm_k_img.diff": torch.zeros(48) for block in range(5)}
    save_file({**load_file(folder / PLAIN), **image_layers}, folder / PLAIN)
    with caplog.at_level(logging.INFO):
        _, text = add(handle, low=PLAIN)
    first = ", ".join(list(image_layers)[:3])
    assert text.splitlines()[1] == f"Left out, since this expert has no weights of that name or shape: {first}, ... (5 in all)"
    assert [record.levelno for record in caplog.records if first in record.message] == [logging.WARNING]
    assert any(PLAIN in record.message and "strength 1" in record.message for record in caplog.records)


def test_a_changed_file_is_noticed(folder: Path) -> None:
    names = (HIGH_NOISE_NAME, LOW_NOISE_NAME)
    before = loras.fingerprint(*names)
    assert before and before == loras.fingerprint(*names)
    os.utime(folder / LOW_NOISE_NAME, ns=(1, 1))
    assert loras.fingerprint(*names) != before
    assert loras.fingerprint(HIGH_NOISE_NAME, "none") == loras.fingerprint(HIGH_NOISE_NAME, None)
    assert loras.fingerprint("none", "none") == loras.fingerprint("gone.safetensors", "none") == loras.fingerprint(None, None)


def test_names_of_what_is_shown(folder: Path, handle: ModelHandle, tiny_checkpoint: Path) -> None:
    """High heels are for both experts; what a name might say otherwise is told."""
    write_lora(folder / "high_heels.safetensors", expert_shapes(tiny_checkpoint / "transformer"), "kohya", rank=2)
    folder_paths.filename_list_cache.clear()
    added, text = add(handle, "high_heels.safetensors", "high_heels.safetensors")
    assert len(added.loras) == 2
    assert text.count("Its name has 'high' in it") == 1
    write_lora(folder / "low_heels.safetensors", expert_shapes(tiny_checkpoint / "transformer"), "kohya", rank=2)
    folder_paths.filename_list_cache.clear()
    with pytest.raises(CheckpointError, match="whose name says that it is for the high noise expert"):
        add(handle, low="high_heels.safetensors")


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_that_leads_nowhere(folder: Path, handle: ModelHandle) -> None:
    (folder / "gone.safetensors").symlink_to(folder / "nothing.safetensors")
    folder_paths.filename_list_cache.clear()
    with pytest.raises(CheckpointError, match="'gone.safetensors' is a link that leads nowhere"):
        add(handle, high="gone.safetensors")
