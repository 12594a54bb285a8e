"""Which models and files the loader offers, and what a choice means. On a real ComfyUI's ``folder_paths``, whose folders are this test's own."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from locked_folders import lock
from tiny_checkpoint import make_text_encoder, make_vae
from tiny_encoder_files import write_umt5_file, write_vae_file

folder_paths = pytest.importorskip("folder_paths", reason="put a ComfyUI folder on PYTHONPATH to run this")

from wan_sharded.bridge import model_files  # noqa: E402
from wan_sharded.engine.checkpoints.hub import WAN22_I2V_HUB_ID  # noqa: E402
from wan_sharded.engine.errors import CheckpointError  # noqa: E402


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """The first folder of each category; a second one for diffusers, as extra_model_paths.yaml adds them."""
    categories = ("diffusers", "diffusion_models", "text_encoders", "vae")
    folders = {**{category: tmp_path / category for category in categories}, "extra": tmp_path / "another disk"}
    for folder in folders.values():
        folder.mkdir()
    known = {
        **folder_paths.folder_names_and_paths,
        "diffusers": ([str(folders["diffusers"]), str(folders["extra"]), str(tmp_path / "not there")], ["folder"]),
        **{category: ([str(folders[category])], {".safetensors"}) for category in categories[1:]},
    }
    known.pop("unet_gguf", None)
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
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
    for name, content in {"no json": b"{", "a list": b"[]", "no text": b"\xff\xfe", "empty": b"", "deep": b"[" * 200_000}.items():
        (roots["diffusers"] / name).mkdir()
        (roots["diffusers"] / name / "model_index.json").write_bytes(content)
    (roots["diffusers"] / "a folder" / "model_index.json").mkdir(parents=True)
    (roots["diffusers"] / "dangling").symlink_to(roots["diffusers"] / "nowhere", target_is_directory=True)
    (roots["diffusers"] / "circle").symlink_to(roots["diffusers"], target_is_directory=True)
    assert [name for name in offered() if not name.startswith("circle/")] == ["good"]


def test_a_folder_that_may_not_be_looked_into_leaves_the_others(roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a drive's lost+found."""
    index(roots["diffusers"] / "good")
    index(roots["diffusers"] / "locked")
    lock("locked", monkeypatch)
    assert "good" in offered()


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


# ---- files


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_files_are_what_comfyui_lists_and_gguf(roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a pack that registers GGUF, ComfyUI lists none."""
    assert model_files.expert_choices() == ["none"]
    put(roots["diffusion_models"], "a.safetensors", "b.gguf", "wan/deep/er/C.GGUF", "notes.txt")
    assert model_files.expert_choices() == ["none", "a.safetensors", "b.gguf", str(Path("wan/deep/er/C.GGUF"))]
    elsewhere = tmp_path / "elsewhere"
    put(elsewhere, "d.gguf", "b.gguf")
    known = folder_paths.folder_names_and_paths
    monkeypatch.setitem(known, "unet_gguf", ([str(roots["diffusion_models"]), str(elsewhere)], {".gguf"}))
    assert model_files.expert_choices()[1:] == ["a.safetensors", "b.gguf", "d.gguf", str(Path("wan/deep/er/C.GGUF"))]
    assert (
        choose("single files", high_noise_model="b.gguf", low_noise_model="d.gguf").files["high_noise_model"]
        == roots["diffusion_models"] / "b.gguf"
    )


def test_gguf_files_come_and_go_without_a_restart(roots: dict[str, Path]) -> None:
    for name in ("new.gguf", "below/new.gguf"):
        put(roots["diffusion_models"], name)
        assert str(Path(name)) in model_files.expert_choices()
        (roots["diffusion_models"] / name).unlink()
        assert str(Path(name)) not in model_files.expert_choices()


def test_links_in_a_circle_end(roots: dict[str, Path]) -> None:
    put(roots["diffusion_models"], "wan.gguf")
    (roots["diffusion_models"] / "circle").symlink_to(roots["diffusion_models"], target_is_directory=True)
    (roots["diffusion_models"] / "self").symlink_to(roots["diffusion_models"] / "self")
    (roots["diffusion_models"] / "gone.gguf").symlink_to(roots["diffusion_models"] / "nowhere")
    found = model_files.expert_choices()
    assert found[1] == str(Path("circle/circle/circle/circle/wan.gguf")) and "wan.gguf" in found and "gone.gguf" not in found


def choose(model: str, **widgets: str) -> model_files.Choice:
    unused = {"high_noise_model": "none", "low_noise_model": "none", "text_encoder": "from model", "vae": "from model"}
    return model_files.choose(model, **{**unused, **widgets})


PAIR = {"high_noise_model": "wan_high.safetensors", "low_noise_model": "wan_low.safetensors"}


@pytest.fixture
def files(roots: dict[str, Path]) -> dict[str, Path]:
    put(roots["diffusion_models"], *PAIR.values(), "flux.safetensors")
    return roots


def test_what_a_choice_means(files: dict[str, Path]) -> None:
    index(files["diffusers"] / "mine")
    folder = files["diffusion_models"]
    none = {"text_encoder": None, "vae": None}
    both = {slot: folder / name for slot, name in PAIR.items()}
    assert choose("mine") == model_files.Choice(files["diffusers"] / "mine", {"high_noise_model": None, "low_noise_model": None, **none})
    assert choose("mine", **PAIR) == model_files.Choice(files["diffusers"] / "mine", {**both, **none})
    lone = choose("mine", high_noise_model=PAIR["high_noise_model"])
    assert lone.files["low_noise_model"] is None and lone.notes == ()
    chosen = choose("single files", **PAIR)
    assert chosen.model is None and chosen.files == {**both, **none}


def test_a_lone_expert_brings_its_partner(files: dict[str, Path]) -> None:
    for slot, name in PAIR.items():
        chosen = choose("single files", **{slot: name})
        assert [file and file.name for file in chosen.files.values()] == [*PAIR.values(), None, None]
        assert "which goes with" in chosen.notes[0]
    (files["diffusion_models"] / "wan_low.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"Choose low_noise_model; there is .*flux\.safetensors"):
        choose("single files", high_noise_model="wan_high.safetensors")


def test_the_default_model_is_not_downloaded_for_files(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who only chooses files, and leaves the model as it stands, means the files."""
    monkeypatch.setattr(model_files, "cached_folder", lambda _: None)
    chosen = choose(WAN22_I2V_HUB_ID, high_noise_model="wan_high.safetensors")
    assert chosen.model is None and f"{WAN22_I2V_HUB_ID} is not on this computer" in chosen.notes[0]
    assert chosen.files["low_noise_model"] == files["diffusion_models"] / "wan_low.safetensors"
    assert choose(WAN22_I2V_HUB_ID).model == WAN22_I2V_HUB_ID
    monkeypatch.setattr(model_files, "cached_folder", lambda _: files["diffusers"])
    chosen = choose(WAN22_I2V_HUB_ID, high_noise_model="wan_high.safetensors")
    assert (chosen.model, chosen.files["low_noise_model"], chosen.notes) == (WAN22_I2V_HUB_ID, None, ())


def test_files_that_are_no_longer_there(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "outside.safetensors").write_bytes(b"")
    put(files["diffusion_models"], "hidden.txt")
    for name in ("gone.safetensors", "../outside.safetensors", str(tmp_path / "outside.safetensors"), "hidden.txt", ""):
        with pytest.raises(CheckpointError) as caught:
            choose("single files", **{**PAIR, "low_noise_model": name})
        words = str(caught.value)
        assert f"low_noise_model: there is no file {name!r} here" in words
        assert "wan_low.safetensors" in words and "models/diffusion_models" in words
    for widget, folder in (("text_encoder", "text_encoders"), ("vae", "vae")):
        with pytest.raises(CheckpointError, match=f"{widget}: there is no file 'gone' here. There is no other. .*models/{folder}"):
            choose("single files", **PAIR, **{widget: "gone"})


def test_a_text_encoder_and_a_vae_are_found_by_what_they_are(files: dict[str, Path], tmp_path: Path) -> None:
    assert choose("single files", **PAIR).notes == (
        "text_encoder: found no UMT5 text encoder in models/text_encoders. Choose one, or connect CONDITIONING to Wan I2V Sampler.",
        "vae: found no Wan 2.1 VAE in models/vae. Choose one, or connect a VAE to Wan I2V Sampler.",
    )
    generator = torch.Generator().manual_seed(0)
    encoder, vae = make_text_encoder(64, generator), make_vae(generator, num_res_blocks=2)
    put(files["text_encoders"], "umt5_xxl_broken.safetensors")
    write_umt5_file(files["text_encoders"] / "another.safetensors", encoder, b"a tokenizer", "fp16")
    # Qwen-Image's VAE is one of the same shape.
    write_vae_file(files["vae"] / "qwen_image_vae.safetensors", vae)
    put(files["vae"], "a_wan_vae.safetensors")
    chosen = choose("single files", **PAIR)
    assert chosen.files["text_encoder"] == files["text_encoders"] / "another.safetensors"
    assert chosen.notes[0] == "text_encoder: found another.safetensors." and chosen.files["vae"] is None
    write_umt5_file(files["text_encoders"] / "umt5_xxl_fp16.safetensors", encoder, b"a tokenizer", "fp16")
    write_vae_file(files["vae"] / "wan_2.1_vae.safetensors", vae)
    chosen = choose("single files", **PAIR)
    assert [chosen.files[part] and chosen.files[part].name for part in ("text_encoder", "vae")] == [
        "umt5_xxl_fp16.safetensors",
        "wan_2.1_vae.safetensors",
    ]
    named = choose("single files", **PAIR, text_encoder="another.safetensors", vae="qwen_image_vae.safetensors")
    assert [named.files[part].name for part in ("text_encoder", "vae")] == ["another.safetensors", "qwen_image_vae.safetensors"]
    assert named.notes == ()


def test_headers_are_read_once(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI asks for a fingerprint at every prompt."""
    read: list[Path] = []
    part = dataclasses.replace(model_files._PARTS["text_encoder"], is_one=lambda path: bool(read.append(path)))
    monkeypatch.setitem(model_files._PARTS, "text_encoder", part)
    put(files["text_encoders"], "umt5.safetensors")
    for _ in range(3):
        choose("single files", **PAIR)
    assert len(read) == 1
    (files["text_encoders"] / "umt5.safetensors").write_bytes(b"new")
    choose("single files", **PAIR)
    assert len(read) == 2


def test_one_expert_that_is_not_there(files: dict[str, Path]) -> None:
    """Its own slot is named, not its partner's."""
    with pytest.raises(CheckpointError, match=r"high_noise_model: there is no file 'wan_high_gone\.safetensors'"):
        choose(model_files.SINGLE_FILES, high_noise_model="wan_high_gone.safetensors")
