"""Which model folders the loader offers. On a real ComfyUI's ``folder_paths``, whose folders are this test's own."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

folder_paths = pytest.importorskip("folder_paths", reason="put a ComfyUI folder on PYTHONPATH to run this")

from wan_sharded.bridge import model_files  # noqa: E402
from wan_sharded.engine.checkpoints.hub import WAN22_I2V_HUB_ID  # noqa: E402
from wan_sharded.engine.errors import CheckpointError, UnsupportedError  # noqa: E402


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """The first folder of each of the two categories; a second one for diffusers, as extra_model_paths.yaml adds them."""
    folders = {"diffusers": tmp_path / "diffusers", "diffusion_models": tmp_path / "diffusion_models", "extra": tmp_path / "another disk"}
    for folder in folders.values():
        folder.mkdir()
    known = {
        **folder_paths.folder_names_and_paths,
        "diffusers": ([str(folders["diffusers"]), str(folders["extra"]), str(tmp_path / "not there")], ["folder"]),
        "diffusion_models": ([str(folders["diffusion_models"])], {".safetensors"}),
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    yield folders


def index(folder: Path, pipeline: str = "WanImageToVideoPipeline") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(f'{{"_class_name": "{pipeline}"}}')


def offered() -> list[str]:
    first, *folders, last = model_files.model_choices()
    assert first == WAN22_I2V_HUB_ID == model_files.default_model_choice() and last == "single files"
    return folders


def test_folders_of_both_categories_and_of_extra_paths(roots: dict[str, Path]) -> None:
    assert offered() == []
    index(roots["diffusers"] / "one")
    index(roots["diffusion_models"] / "two")
    index(roots["extra"] / "three")
    index(roots["diffusers"] / "Wan-AI" / "four")
    index(roots["diffusers"] / "flux", "FluxPipeline")
    (roots["diffusers"] / "empty").mkdir()
    (roots["diffusers"] / "a file").write_text("")
    assert offered() == ["Wan-AI/four", "one", "three", "two"]
    assert model_files.resolve_model("Wan-AI/four") == roots["diffusers"] / "Wan-AI" / "four"
    assert model_files.resolve_model("three") == roots["extra"] / "three"
    assert model_files.resolve_model(WAN22_I2V_HUB_ID) == WAN22_I2V_HUB_ID


def test_a_model_that_is_copied_while_the_server_runs(roots: dict[str, Path]) -> None:
    """Its folder is there long before its index; the choice must not need a restart."""
    for folder in (roots["diffusers"] / "flat", roots["diffusers"] / "Wan-AI" / "nested"):
        (folder / "transformer").mkdir(parents=True)
        assert folder.name not in " ".join(offered())
        index(folder)
        assert folder.name in " ".join(offered())
        shutil.rmtree(folder)
        assert folder.name not in " ".join(offered())


def test_damaged_folders_are_not_offered(roots: dict[str, Path]) -> None:
    index(roots["diffusers"] / "good")
    for name, content in {"no json": b"{", "a list": b"[]", "no text": b"\xff\xfe", "empty": b""}.items():
        (roots["diffusers"] / name).mkdir()
        (roots["diffusers"] / name / "model_index.json").write_bytes(content)
    (roots["diffusers"] / "a folder" / "model_index.json").mkdir(parents=True)
    (roots["diffusers"] / "dangling").symlink_to(roots["diffusers"] / "nowhere", target_is_directory=True)
    (roots["diffusers"] / "circle").symlink_to(roots["diffusers"], target_is_directory=True)
    assert [name for name in offered() if not name.startswith("circle/")] == ["good"]


def test_unknown_models_are_named_with_what_there_is(roots: dict[str, Path]) -> None:
    """Workflow files travel: the folder may have another name here."""
    index(roots["diffusers"] / "mine")
    with pytest.raises(CheckpointError) as caught:
        model_files.resolve_model("yours")
    message = str(caught.value)
    assert "There is no model 'yours' here" in message
    assert WAN22_I2V_HUB_ID in message and "mine" in message and "models/diffusers" in message


def test_a_name_cannot_leave_the_folders(roots: dict[str, Path], tmp_path: Path) -> None:
    """Prompts come from the network."""
    index(tmp_path / "outside")
    for name in ("../outside", str(tmp_path / "outside"), "mine/../../outside"):
        with pytest.raises(CheckpointError, match="There is no model"):
            model_files.resolve_model(name)


def test_single_files_are_refused_by_name() -> None:
    unused = {"high_noise_model": ("none", "none"), "vae": ("from model", "from model")}
    model_files.refuse_single_files("mine", **unused)
    with pytest.raises(UnsupportedError, match="model 'single files'"):
        model_files.refuse_single_files("single files", **unused)
    with pytest.raises(UnsupportedError, match="high_noise_model 'wan_high.safetensors'.* Choose a model folder"):
        model_files.refuse_single_files("mine", **{**unused, "high_noise_model": ("wan_high.safetensors", "none")})
