"""The loader node's work on a real ComfyUI's ``folder_paths``, whose folders are this test's own, with tiny real models."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import make_text_encoder, make_vae
from tiny_encoder_files import write_umt5_file, write_vae_file
from tiny_single_files import file_names

cli_args = pytest.importorskip("comfy.cli_args", reason="put a ComfyUI folder on PYTHONPATH to run this")
if not torch.cuda.is_available():
    cli_args.args.cpu = True  # before comfy.model_management looks for a GPU

import folder_paths  # noqa: E402
from wan_sharded.bridge import loading  # noqa: E402
from wan_sharded.engine import OWNER, ModelHandle  # noqa: E402
from wan_sharded.engine.checkpoints.hub import WAN22_I2V_HUB_ID  # noqa: E402
from wan_sharded.engine.checkpoints.stored import HIGH_NOISE, LOW_NOISE  # noqa: E402
from wan_sharded.engine.errors import CheckpointError, InvalidRequestError  # noqa: E402

HIGH, LOW = (file_names("fp8_scaled_old")[part] for part in (HIGH_NOISE, LOW_NOISE))
UMT5, VAE = "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan_2.1_vae.safetensors"
WIDGETS: dict[str, Any] = {
    "node_id": None, "model": "single files", "high_noise_model": "none", "low_noise_model": "none", "text_encoder": "from model",
    "vae": "from model", "weight_dtype": "default", "device_map": "balanced", "execution": "auto", "offload": "auto", "sliders_gib": [0.0] * 8,
}  # fmt: skip
CHOICES = ("model", "high_noise_model", "low_noise_model", "text_encoder", "vae")


@pytest.fixture(scope="module")
def written(tiny_single_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of ComfyUI's names. Read-only."""
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(0)
    for name in (HIGH, LOW):
        shutil.copy(tiny_single_files / name, folder)
    write_umt5_file(folder / UMT5, make_text_encoder(64, generator), b"a tokenizer", "fp8_scaled_old")
    write_vae_file(folder / VAE, make_vae(generator, num_res_blocks=2))
    return folder


@pytest.fixture
def models(written: Path, tiny_single_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's models folder with all of them, and with a folder in diffusers format."""
    places = {"diffusion_models": (HIGH, LOW), "text_encoders": (UMT5,), "vae": (VAE,)}
    for category, names in places.items():
        (tmp_path / category).mkdir()
        for name in names:
            shutil.copy(written / name, tmp_path / category)
    shutil.copytree(tiny_single_files / "diffusers", tmp_path / "diffusers" / "tiny")
    known = {**folder_paths.folder_names_and_paths, "diffusers": ([str(tmp_path / "diffusers")], ["folder"])}
    known |= {category: ([str(tmp_path / category)], {".safetensors"}) for category in places}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def load(**widgets: Any) -> tuple[ModelHandle, str]:
    return loading.make_handle(**{**WIDGETS, **widgets})[:2]


def fingerprint(**widgets: Any) -> str:
    return loading.fingerprint(**{name: value for name, value in {**WIDGETS, **widgets}.items() if name in CHOICES})


def expert_files(handle: ModelHandle) -> list[str]:
    return [next(iter(expert.tensors.values())).file.name for expert in handle.model.experts.values()]


def test_a_folder_is_described_without_loading(models: Path) -> None:
    handle, report = load(model="tiny")
    assert isinstance(handle, ModelHandle) and handle.model.notes == ()
    assert "planned for 832x480x81" in report and "high noise expert" in report
    assert OWNER.loaded is None


def test_single_files_are_described_without_loading(models: Path) -> None:
    handle, report = load(high_noise_model=HIGH, low_noise_model=LOW, text_encoder=UMT5, vae=VAE)
    assert expert_files(handle) == [HIGH, LOW]
    assert (handle.model.text_encoder, handle.model.vae) == (models / "text_encoders" / UMT5, models / "vae" / VAE)
    assert handle.model.notes == () and "planned for 832x480x81" in report
    assert OWNER.loaded is None


def test_what_was_found_is_shown_and_logged(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        handle, report = load(low_noise_model=LOW)
    assert expert_files(handle) == [HIGH, LOW]
    assert report.splitlines()[:3] == [
        f"high_noise_model: found {HIGH}, which goes with {LOW}.",
        f"text_encoder: found {UMT5}.",
        f"vae: found {VAE}.",
    ]
    assert "planned for 832x480x81" in report
    assert [line for line in report.splitlines()[:3] if f"Wan Sharded Loader: {line}" not in caplog.text] == []
    assert str(models) not in report


def test_files_replace_parts_of_a_folder(models: Path) -> None:
    handle, _ = load(model="tiny", low_noise_model=LOW, vae=VAE)
    assert expert_files(handle) == ["diffusion_pytorch_model.safetensors", LOW]
    assert handle.model.vae == models / "vae" / VAE and handle.model.text_encoder == models / "diffusers" / "tiny" / "text_encoder"


def test_the_default_model_with_files(models: Path) -> None:
    """The server runs offline here, and would say so if it were asked."""
    handle, report = load(model=WAN22_I2V_HUB_ID, high_noise_model=HIGH)
    assert expert_files(handle) == [HIGH, LOW]
    assert f"{WAN22_I2V_HUB_ID} is not on this computer and not downloaded" in report


def test_new_files_of_a_folder_are_noticed(models: Path) -> None:
    """ComfyUI would else hand out the loader's old output, and with it what the old files' headers said."""
    before = fingerprint(model="tiny")
    assert before == fingerprint(model="tiny") != ""
    (models / "diffusers" / "tiny" / "transformer" / "config.json").touch()
    assert fingerprint(model="tiny") != before
    assert fingerprint(model="not here") == fingerprint(model=WAN22_I2V_HUB_ID) == fingerprint() == ""


def test_every_file_that_is_used_is_noticed(models: Path) -> None:
    """Those that were found by themselves, too."""
    seen = {fingerprint(high_noise_model=HIGH)}
    for file in ("diffusion_models/" + HIGH, "diffusion_models/" + LOW, "text_encoders/" + UMT5, "vae/" + VAE):
        os.utime(models / file, ns=(1, (models / file).stat().st_mtime_ns + 1))
        seen.add(fingerprint(high_noise_model=HIGH))
    assert len(seen) == 5
    (models / "vae" / VAE).unlink()
    assert fingerprint(high_noise_model=HIGH) not in seen
    assert fingerprint(model="tiny", vae=VAE) == "", "the node itself says what is wrong"
    assert fingerprint(model="tiny") != fingerprint(model="tiny", high_noise_model=HIGH)


def test_the_fingerprint_names_no_folder(models: Path) -> None:
    """ComfyUI writes it into every saved video."""
    assert fingerprint(model="tiny").isalnum() and fingerprint(high_noise_model=HIGH).isalnum()


def test_widgets_that_other_nodes_fill(models: Path) -> None:
    """ComfyUI says None, for it asks before those nodes run."""
    assert {fingerprint(**{widget: None}) for widget in CHOICES} == {""}


@pytest.mark.parametrize(
    ("widgets", "words"),
    [
        ({}, "no file for the high noise expert and the low noise expert. Choose high_noise_model and low_noise_model"),
        ({"high_noise_model": HIGH, "low_noise_model": HIGH}, f"{HIGH} is chosen for both experts"),
        ({"high_noise_model": LOW, "low_noise_model": HIGH}, "Choose it as low_noise_model"),
        (
            {"high_noise_model": HIGH, "text_encoder": "gone.safetensors"},
            f"text_encoder: there is no file 'gone.safetensors' here. .*{UMT5}",
        ),
        ({"model": "not here", "vae": VAE}, "There is no model 'not here' here"),
    ],
    ids=str,
)
def test_what_cannot_be(models: Path, widgets: dict[str, str], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        load(**widgets)


def test_unknown_words(models: Path) -> None:
    with pytest.raises(InvalidRequestError, match="weight_dtype is 'fp4'"):
        load(model="tiny", weight_dtype="fp4")
