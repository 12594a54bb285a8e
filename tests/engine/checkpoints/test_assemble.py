"""A model put together: what files replace, what must fit together, and what is said where it does not."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import wan_sharded.engine.handle as handle_module
from locked_folders import lock
from safetensors.torch import load_file, save_file
from tiny_checkpoint import make_text_encoder, make_vae
from tiny_encoder_files import write_umt5_file, write_vae_file
from tiny_single_files import file_names
from wan_files import SMALL, i2v_expert, write_safetensors
from wan_sharded.engine import open_model
from wan_sharded.engine.checkpoints.assemble import _check_different, assemble_model, closest, with_partner
from wan_sharded.engine.checkpoints.diffusers_folder import open_diffusers_folder
from wan_sharded.engine.checkpoints.stored import HIGH_NOISE, LOW_NOISE, ModelFiles
from wan_sharded.engine.errors import CheckpointError

FORM = "fp8_scaled_old"
HUB_ID = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
Files = dict[str, Path]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A text encoder with a tokenizer inside, one without, and a VAE. Read-only."""
    folder = tmp_path_factory.mktemp("parts")
    generator = torch.Generator().manual_seed(0)
    encoder = make_text_encoder(64, generator)
    names = {"text_encoder": "umt5_xxl_fp8_e4m3fn_scaled", "without_tokenizer": "umt5-xxl-enc-bf16", "vae": "wan_2.1_vae"}
    files = {part: folder / f"{name}.safetensors" for part, name in names.items()}
    write_umt5_file(files["text_encoder"], encoder, b"a tokenizer", "fp16")
    write_umt5_file(files["without_tokenizer"], encoder, None, "bf16")
    write_vae_file(files["vae"], make_vae(generator, num_res_blocks=2))
    return files


@pytest.fixture
def experts(tiny_single_files: Path, tmp_path: Path) -> Files:
    """Both experts' files, to be damaged."""
    names = {"high_noise": file_names(FORM)[HIGH_NOISE], "low_noise": file_names(FORM)[LOW_NOISE]}
    return {slot: Path(shutil.copy(tiny_single_files / name, tmp_path / name)) for slot, name in names.items()}


@pytest.fixture
def folder(tiny_single_files: Path) -> ModelFiles:
    return open_diffusers_folder(tiny_single_files / "diffusers")


def files_of(model: ModelFiles, part: str) -> set[Path]:
    return {tensor.file for tensor in model.experts[part].tensors.values()}


# ---- what it is put together from


def test_everything_from_files(experts: Files, parts: Files) -> None:
    model = assemble_model(None, **experts, text_encoder=parts["text_encoder"], vae=parts["vae"])
    assert model.name == f"wan2.2_i2v_high_noise_14B_{FORM} + wan2.2_i2v_low_noise_14B_{FORM}"
    assert (files_of(model, HIGH_NOISE), files_of(model, LOW_NOISE)) == ({experts["high_noise"]}, {experts["low_noise"]})
    assert (model.text_encoder, model.tokenizer, model.vae) == (parts["text_encoder"], None, parts["vae"])
    assert model.boundary_ratio is None and model.notes == ()


def test_experts_alone_are_enough(experts: Files) -> None:
    """For who has CONDITIONING and a VAE already."""
    model = assemble_model(None, **experts)
    assert (model.text_encoder, model.tokenizer, model.vae) == (None, None, None)


def test_a_folder_as_it_is(folder: ModelFiles) -> None:
    assert assemble_model(folder) == folder


def test_files_replace_parts_of_a_folder(folder: ModelFiles, experts: Files, parts: Files) -> None:
    model = assemble_model(replace(folder, notes=("kept",)), low_noise=experts["low_noise"], vae=parts["vae"])
    assert model.name == f"diffusers + wan2.2_i2v_low_noise_14B_{FORM}"
    assert model.experts[HIGH_NOISE] == folder.experts[HIGH_NOISE]
    assert files_of(model, LOW_NOISE) == {experts["low_noise"]}
    assert (model.text_encoder, model.tokenizer, model.vae) == (folder.text_encoder, folder.tokenizer, parts["vae"])
    assert model.boundary_ratio == folder.boundary_ratio and model.notes == ("kept",)


def test_the_tokenizer_is_the_files_own_or_else_the_folders(folder: ModelFiles, parts: Files) -> None:
    assert assemble_model(folder, text_encoder=parts["text_encoder"]).tokenizer is None
    assert assemble_model(folder, text_encoder=parts["without_tokenizer"]).tokenizer == folder.tokenizer


def test_forms_may_differ(tiny_single_files: Path) -> None:
    model = assemble_model(
        None,
        high_noise=tiny_single_files / file_names("gguf_q8_0")[HIGH_NOISE],
        low_noise=tiny_single_files / file_names("original_bf16")[LOW_NOISE],
    )
    assert [expert.stored_dtype for expert in model.experts.values()] == ["GGUF:Q8_0", "BF16"]


def test_the_fingerprint_covers_every_file(folder: ModelFiles, experts: Files, parts: Files, tmp_path: Path) -> None:
    own = {part: Path(shutil.copy(parts[part], tmp_path)) for part in ("text_encoder", "vae")}
    seen = {folder.fingerprint}
    for files in (experts, {**experts, **own}):
        for base in (None, folder):
            seen.add(assemble_model(base, **files).fingerprint)
    assert len(seen) == 5
    for file in [*experts.values(), *own.values()]:
        os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))
        seen.add(assemble_model(None, **experts, **own).fingerprint)
    assert len(seen) == 9


# ---- what does not fit together


def refused(**files: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        assemble_model(None, **files)
    return str(caught.value)


def test_a_missing_expert_is_named(experts: Files) -> None:
    assert "no file for the low noise expert. Choose low_noise_model" in refused(high_noise=experts["high_noise"])
    assert "no file for the high noise expert. Choose high_noise_model" in refused(low_noise=experts["low_noise"])
    assert "Choose high_noise_model and low_noise_model, or a model that has both" in refused()


@pytest.mark.parametrize("how", ["the same path", "a symlink", "a hard link"])
def test_one_file_twice(experts: Files, tmp_path: Path, how: str) -> None:
    plain = experts["high_noise"].rename(tmp_path / "wan.safetensors")
    other = plain if how == "the same path" else tmp_path / "other.safetensors"
    if how == "a symlink":
        other.symlink_to(plain)
    elif how == "a hard link":
        other.hardlink_to(plain)
    assert "wan.safetensors is chosen for both experts" in refused(high_noise=plain, low_noise=other)


def test_drives_that_number_no_files(experts: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network drives of Windows give every file the number 0, and so take any two for the same."""
    stat = Path.stat

    def numberless(self: Path, **how: bool) -> os.stat_result:
        found = list(stat(self, **how))
        found[1] = found[2] = 0
        return os.stat_result(found)

    model = assemble_model(None, **experts)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", numberless)
        patch.setattr(Path, "samefile", lambda self, other: True)
        _check_different(model.experts)


def test_a_folders_own_expert_in_the_other_place(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(num_blocks=2, num_heads=1, head_dim=128)
    file = folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(CheckpointError, match="chosen for both experts"):
        assemble_model(open_diffusers_folder(folder), high_noise=file)


def test_places_changed_by_name(experts: Files, tmp_path: Path) -> None:
    words = refused(high_noise=experts["low_noise"], low_noise=experts["high_noise"])
    assert "low_noise_14B" in words and "Choose it as low_noise_model" in words
    for level, slot in (("HighNoise", "low_noise"), ("LowNoise", "high_noise")):
        (tmp_path / level).mkdir()
        experts[slot] = experts[slot].rename(tmp_path / level / "wan.safetensors")
    assert "LowNoise/wan.safetensors was chosen as the high noise expert" in refused(**experts)


def test_experts_of_different_models(experts: Files, tmp_path: Path) -> None:
    other = write_safetensors(tmp_path / "other_low_noise.safetensors", i2v_expert(**SMALL))
    words = refused(high_noise=experts["high_noise"], low_noise=other)
    assert experts["high_noise"].name in words and other.name in words and "ffn_dim is 512 and 256" in words


def test_an_expert_of_another_model_than_the_folders(folder: ModelFiles, tmp_path: Path) -> None:
    other = write_safetensors(tmp_path / "other_low_noise.safetensors", i2v_expert(**SMALL))
    with pytest.raises(CheckpointError, match="diffusers/transformer and other_low_noise.safetensors are not the experts of one model"):
        assemble_model(folder, low_noise=other)


def test_wrong_parts_are_named(experts: Files, parts: Files) -> None:
    words = refused(**experts, text_encoder=parts["vae"])
    assert parts["vae"].name in words and "umt5_xxl_fp8_e4m3fn_scaled.safetensors as text_encoder" in words
    words = refused(**experts, vae=parts["text_encoder"])
    assert parts["text_encoder"].name in words and "wan_2.1_vae.safetensors as vae" in words
    words = refused(high_noise=parts["vae"], low_noise=experts["low_noise"])
    assert parts["vae"].name in words and "Choose it as vae" in words


def test_a_text_encoder_of_another_width(experts: Files, parts: Files, tmp_path: Path) -> None:
    wide = {slot: write_safetensors(tmp_path / f"wan_{slot}.safetensors", i2v_expert(**{**SMALL, "text": 4096})) for slot in experts}
    assert "is a UMT5 encoder 32 wide, but wan_high_noise.safetensors takes text 4096 wide" in refused(
        **wide, text_encoder=parts["text_encoder"]
    )


def test_a_text_encoder_without_a_tokenizer(experts: Files, parts: Files) -> None:
    words = refused(**experts, text_encoder=parts["without_tokenizer"])
    assert "umt5-xxl-enc-bf16.safetensors has no tokenizer inside" in words and "Choose umt5_xxl_fp8_e4m3fn_scaled" in words


def test_damage_is_found_here(experts: Files) -> None:
    tensors = load_file(experts["low_noise"])
    del tensors["head.modulation"]
    save_file(tensors, experts["low_noise"])
    assert "lacks 1 tensors" in refused(**experts)
    experts["low_noise"].write_bytes(experts["low_noise"].read_bytes()[:-100])
    assert "is truncated" in refused(**experts)


# ---- one expert chosen


def test_a_partner_is_found_by_name() -> None:
    names = ["wan_high.safetensors", "wan_low.safetensors", "other_low.safetensors"]
    note = "low_noise_model: found wan_low.safetensors, which goes with wan_high.safetensors."
    assert with_partner("wan_high.safetensors", None, names) == ("wan_high.safetensors", "wan_low.safetensors", [note])
    high, low, (note,) = with_partner(None, "wan_low.safetensors", names)
    assert (high, low) == ("wan_high.safetensors", "wan_low.safetensors") and note.startswith("high_noise_model: found wan_high")
    assert with_partner("a", "b", names) == ("a", "b", [])
    assert with_partner(None, None, names) == (None, None, [])


def test_no_partner() -> None:
    with pytest.raises(CheckpointError, match=r"low_noise_model is not chosen.* Choose low_noise_model; there is x\.gguf, lowest\.gguf\."):
        with_partner("high_a.gguf", None, ["high_a.gguf", "x.gguf", "lowest.gguf"])
    with pytest.raises(CheckpointError, match="there is no other file"):
        with_partner("wan.gguf", None, ["wan.gguf"])
    with pytest.raises(CheckpointError, match="Choose it as low_noise_model"):
        with_partner("wan_low.gguf", None, ["wan_low.gguf", "wan_high.gguf"])


def test_long_lists_are_cut_to_what_is_alike() -> None:
    names = [f"model {index:03}" for index in range(200)] + ["wan low"]
    assert closest("wan low", names).startswith("wan low, ") and closest("wan low", names).count(",") == 11
    assert closest("wan", []) == ""


# ---- open_model


def test_python_users_give_paths(experts: Files, parts: Files) -> None:
    handle = open_model(
        high_noise_model=str(experts["high_noise"]),
        low_noise_model=experts["low_noise"],
        text_encoder=str(parts["text_encoder"]),
        vae=parts["vae"],
        weight_dtype="int8",
    )
    assert files_of(handle.model, LOW_NOISE) == {experts["low_noise"]}
    assert (handle.model.vae, handle.model.notes, handle.weight_dtype) == (parts["vae"], (), "int8")


@pytest.mark.parametrize(("high", "low"), [("HighNoise/a-high", "LowNoise/a-low"), ("high/model", "low/model"), ("one/high", "two/low")])
def test_two_paths_are_taken_as_they_are(experts: Files, tmp_path: Path, high: str, low: str) -> None:
    """Also where the low noise expert's name is one of a file beside the high noise expert."""
    chosen = {"high_noise": tmp_path / f"{high}.safetensors", "low_noise": tmp_path / f"{low}.safetensors"}
    for slot, file in chosen.items():
        file.parent.mkdir()
        shutil.copy(experts[slot], file)
    if chosen["high_noise"].name != chosen["low_noise"].name:
        shutil.copy(experts["low_noise"], chosen["high_noise"].with_name(chosen["low_noise"].name))
    model = open_model(high_noise_model=chosen["high_noise"], low_noise_model=chosen["low_noise"]).model
    assert (files_of(model, HIGH_NOISE), files_of(model, LOW_NOISE)) == ({chosen["high_noise"]}, {chosen["low_noise"]})
    assert model.notes == ()


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "a\0b.safetensors"])
def test_names_that_can_be_none(name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_model(high_noise_model=name, low_noise_model="low.safetensors")
    with pytest.raises(CheckpointError, match="There is no folder"):
        open_model(f"./{name}")


def test_a_folder_that_may_not_be_looked_into(experts: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    lock("locked", monkeypatch)
    with pytest.raises(CheckpointError, match="There is no folder"):
        open_model("./locked/model")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_model(high_noise_model="locked/high.safetensors", low_noise_model=experts["low_noise"])


def test_one_path_finds_the_other_beside_it(experts: Files) -> None:
    for slot in experts:
        model = open_model(**{f"{slot}_model": experts[slot]}).model
        assert (files_of(model, HIGH_NOISE), files_of(model, LOW_NOISE)) == ({experts["high_noise"]}, {experts["low_noise"]})
        assert len(model.notes) == 1 and "which goes with" in model.notes[0]
    experts["low_noise"].unlink()
    with pytest.raises(CheckpointError, match="low_noise_model is not chosen"):
        open_model(high_noise_model=experts["high_noise"])


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_model(high_noise_model=tmp_path / "nothing_high.safetensors")
    with pytest.raises(CheckpointError, match="Choose high_noise_model and low_noise_model"):
        open_model()


def test_a_folder_keeps_the_expert_that_is_not_replaced(tiny_single_files: Path, experts: Files) -> None:
    folder = tiny_single_files / "diffusers"
    model = open_model(folder, high_noise_model=experts["high_noise"]).model
    assert files_of(model, HIGH_NOISE) == {experts["high_noise"]}
    assert {file.parent for file in files_of(model, LOW_NOISE)} == {folder / "transformer_2"}


def test_the_hub_is_not_asked_where_both_experts_are_files(
    experts: Files, parts: Files, tiny_single_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {f"{slot}_model": file for slot, file in experts.items()}
    monkeypatch.setattr(handle_module, "download_model", lambda *_: pytest.fail("downloaded"))
    monkeypatch.setattr(handle_module, "cached_folder", lambda _: None)
    model = open_model(HUB_ID, **both).model
    assert model.text_encoder is None and f"{HUB_ID} was not downloaded" in model.notes[0]
    assert open_model(HUB_ID, **both, text_encoder=parts["text_encoder"], vae=parts["vae"]).model.notes == ()
    monkeypatch.setattr(handle_module, "cached_folder", lambda _: tiny_single_files / "diffusers")
    model = open_model(HUB_ID, **both).model
    assert model.vae == tiny_single_files / "diffusers" / "vae" and model.notes == ()


def test_the_hub_is_asked_for_the_other_expert(experts: Files, tiny_single_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle_module, "download_model", lambda *_: tiny_single_files / "diffusers")
    model = open_model(HUB_ID, high_noise_model=experts["high_noise"]).model
    assert files_of(model, HIGH_NOISE) == {experts["high_noise"]}
    assert {file.parent.name for file in files_of(model, LOW_NOISE)} == {"transformer_2"}
