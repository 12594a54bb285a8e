"""Model folders: what a whole one says, and what is said of each way to be broken. Nothing here reads a tensor."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from wan_sharded.engine import open_model
from wan_sharded.engine.checkpoints.diffusers_folder import is_diffusers_folder, open_diffusers_folder
from wan_sharded.engine.checkpoints.stored import HIGH_NOISE
from wan_sharded.engine.errors import CheckpointError, InvalidRequestError
from wan_sharded.engine.loaded import LoadedModel
from wan_sharded.engine.weights.holding import empty_transformer
from wan_sharded.engine.weights.precision import resolve_precision
from wan_sharded.engine.weights.reading import TensorReader

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_a_whole_model(tiny_checkpoint: Path) -> None:
    folder = open_diffusers_folder(tiny_checkpoint)
    assert folder.vae == tiny_checkpoint / "vae" and folder.text_encoder == tiny_checkpoint / "text_encoder"
    assert folder.tokenizer == tiny_checkpoint / "tokenizer"
    assert folder.boundary_ratio == 0.9
    assert set(folder.experts) == {"transformer", "transformer_2"}
    for part, files in folder.experts.items():
        assert files.stored_dtype == "F32"
        assert len([name for name in files.tensors if name.endswith("attn1.to_q.weight")]) == 5
        assert {stored.file for stored in files.tensors.values()} == {tiny_checkpoint / part / WEIGHTS}


def test_a_model_in_several_files(make_checkpoint: Callable[..., Path], tiny_checkpoint: Path) -> None:
    several, one = (open_diffusers_folder(path) for path in (make_checkpoint(sharded=True), tiny_checkpoint))
    for part in ("transformer", "transformer_2"):
        assert len({stored.file for stored in several.experts[part].tensors.values()}) >= 3
        found = [{n: (e.dtype, e.shape) for n, e in model.experts[part].tensors.items()} for model in (several, one)]
        assert found[0] == found[1]


def test_the_stored_dtype(tiny_checkpoint_bf16: Path) -> None:
    """What most of the elements have: diffusers keeps some small tensors of a bf16 model in float32."""
    assert open_diffusers_folder(tiny_checkpoint_bf16).experts["transformer"].stored_dtype == "BF16"


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A model to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "wan copy"))


@pytest.fixture
def sharded_copy(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_checkpoint(sharded=True), tmp_path / "wan copy"))


def test_the_fingerprint_changes_with_the_files(copy: Path) -> None:
    before = open_diffusers_folder(copy).fingerprint
    assert open_diffusers_folder(copy).fingerprint == before
    for part in ("transformer", "transformer_2", "vae", "text_encoder"):
        file = next((copy / part).glob("*.safetensors"))
        os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))
        after = open_diffusers_folder(copy).fingerprint
        assert after != before
        before = after


def test_lists_recognise_models_cheaply(copy: Path, tmp_path: Path) -> None:
    assert is_diffusers_folder(copy)
    assert not is_diffusers_folder(tmp_path)
    edit(copy / "model_index.json", _class_name="StableDiffusionPipeline")
    assert not is_diffusers_folder(copy)
    (copy / "model_index.json").write_text("[]")
    assert not is_diffusers_folder(copy)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def replace_tensor(file: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = load_file(file)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, file)


def truncate(file: Path, keep: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])


def only_pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


# what is done to the folder -> the words that must be in the message, one of them the remedy
DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no such folder": (lambda model: shutil.rmtree(model), ["There is no folder", "wan copy", "Check the name"]),
    "an empty folder": (
        lambda model: (shutil.rmtree(model), model.mkdir()),
        ["wan copy", "model_index.json is missing", "Choose a folder like"],
    ),
    "another model": (
        lambda model: edit(model / "model_index.json", _class_name="FluxPipeline"),
        ["wan copy is a FluxPipeline model", "Choose a WanImageToVideoPipeline model"],
    ),
    "text to video": (
        lambda model: edit(model / "transformer" / "config.json", in_channels=16),
        ["wan copy/transformer takes 16 channels", "takes 36", "Choose an I2V model"],
    ),
    "Wan 2.1, with one expert": (
        lambda model: (edit(model / "model_index.json", transformer_2=[None, None]), shutil.rmtree(model / "transformer_2")),
        ["wan copy has one expert", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"],
    ),
    "unreadable index": (
        lambda model: (model / "model_index.json").write_text("{"),
        ["model_index.json is no valid JSON", "Download it again"],
    ),
    "index in the wrong encoding": (
        lambda model: (model / "model_index.json").write_bytes(b"\xff\xfe{"),
        ["model_index.json is no valid JSON"],
    ),
    "index that is a list": (lambda model: (model / "model_index.json").write_text("[]"), ["model_index.json does not hold a JSON object"]),
    "unreadable configuration": (lambda model: (model / "transformer" / "config.json").write_text("?"), ["config.json is no valid JSON"]),
    "no high noise expert": (lambda model: shutil.rmtree(model / "transformer"), ["lacks its high noise expert", "Complete the download"]),
    "no low noise expert": (lambda model: shutil.rmtree(model / "transformer_2"), ["lacks its low noise expert", "Complete the download"]),
    "no VAE": (lambda model: shutil.rmtree(model / "vae"), ["lacks its vae", "Complete the download"]),
    "no text encoder": (lambda model: shutil.rmtree(model / "text_encoder"), ["lacks its text encoder", "Complete the download"]),
    "no tokenizer": (lambda model: shutil.rmtree(model / "tokenizer"), ["lacks its tokenizer", "Complete the download"]),
    "an expert without weights": (
        lambda model: (model / "transformer_2" / WEIGHTS).unlink(),
        ["wan copy/transformer_2 holds no safetensors"],
    ),
    "an expert with pickled weights": (
        lambda model: only_pickled(model / "transformer"),
        ["pickled", "can run code", "Use a safetensors version"],
    ),
    "a VAE with pickled weights": (lambda model: only_pickled(model / "vae"), ["pickled", "Use a safetensors version"]),
    "another VAE": (lambda model: edit(model / "vae" / "config.json", z_dim=48), ["48-channel latents", "Download the model again"]),
    "an expert of zero bytes": (
        lambda model: truncate(model / "transformer" / WEIGHTS, 0),
        [f"transformer/{WEIGHTS}", "0 bytes", "Download"],
    ),
    "a truncated expert": (
        lambda model: truncate(model / "transformer_2" / WEIGHTS, 0.7),
        [f"transformer_2/{WEIGHTS} is truncated", "Download"],
    ),
    "a truncated VAE": (lambda model: truncate(model / "vae" / WEIGHTS, 0.7), [f"vae/{WEIGHTS} is truncated", "Download it again"]),
    "a truncated text encoder": (
        lambda model: truncate(model / "text_encoder" / "model.safetensors", 0.99),
        ["text_encoder/model.safetensors is truncated", "Download it again"],
    ),
    "an expert of another kind": (
        lambda model: edit(model / "transformer" / "config.json", _class_name="FluxTransformer2DModel"),
        ["transformer in wan copy is a FluxTransformer2DModel", "WanTransformer3DModel"],
    ),
    "fewer blocks than configured": (
        lambda model: edit(model / "transformer" / "config.json", num_layers=10**9),
        ["has the weights of 5 blocks", "num_layers 1000000000", "Download it again"],
    ),
    "more blocks than configured": (lambda model: edit(model / "transformer" / "config.json", num_layers=4), ["5 blocks", "num_layers 4"]),
    "an expert without tensors": (lambda model: save_file({}, model / "transformer" / WEIGHTS), ["wan copy/transformer holds no tensors"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_at_the_loader(copy: Path, damage: str) -> None:
    do, words = DAMAGE[damage]
    do(copy)
    with pytest.raises(CheckpointError) as caught:
        open_model(copy)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_of_several(sharded_copy: Path) -> None:
    lost = sorted((sharded_copy / "transformer_2").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"wan copy/transformer_2 lacks {lost.name}. Complete the download."):
        open_model(sharded_copy)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": {"a": 5}}'])
def test_a_damaged_index_of_several_files(sharded_copy: Path, content: str) -> None:
    (index,) = (sharded_copy / "transformer").glob("*.index.json")
    index.write_text(content)
    with pytest.raises(CheckpointError, match="Download it again|Complete the download"):
        open_model(sharded_copy)


# ---- what shows when the experts are built, before any weight is read


def build(model: Path) -> None:
    handle = open_model(model)
    LoadedModel(handle, resolve_precision("default", "F32", on_gpu=False)[0], TensorReader())


BUILD_DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a tensor of the wrong shape": (
        lambda model: replace_tensor(model / "transformer" / WEIGHTS, "blocks.3.attn1.to_q.weight", torch.zeros(48, 47)),
        [
            "wan copy/transformer: tensor blocks.3.attn1.to_q.weight is [48, 47], but its configuration (config.json) wants [48, 48]",
            "Download it again",
        ],
    ),
    "a missing tensor": (
        lambda model: replace_tensor(model / "transformer_2" / WEIGHTS, "proj_out.weight", None),
        ["wan copy/transformer_2 does not match", "1 missing, such as proj_out.weight", "Download it again"],
    ),
    "an unknown tensor": (
        lambda model: replace_tensor(model / "transformer" / WEIGHTS, "blocks.0.adapter.weight", torch.zeros(2)),
        ["1 unknown, such as blocks.0.adapter.weight"],
    ),
    "a configuration of another width": (
        lambda model: edit(model / "transformer" / "config.json", num_attention_heads=4),
        ["(config.json) wants"],
    ),
    "a configuration with words for numbers": (
        lambda model: edit(model / "transformer" / "config.json", num_attention_heads="three"),
        ["wan copy/transformer", "config.json", "Download it again"],
    ),
    "a configuration that cannot be": (
        lambda model: edit(model / "transformer" / "config.json", qk_norm="none such", patch_size=7),
        ["wan copy/transformer", "config.json", "Download it again"],
    ),
}


@pytest.mark.parametrize("damage", BUILD_DAMAGE)
def test_damage_is_named_before_weights_are_read(copy: Path, damage: str) -> None:
    do, words = BUILD_DAMAGE[damage]
    do(copy)
    with pytest.raises(CheckpointError) as caught:
        build(copy)
    for word in words:
        assert word in str(caught.value)


# ---- the handle


def test_a_handle_is_light_and_equal_to_its_like(tiny_checkpoint: Path) -> None:
    one, same = (open_model(tiny_checkpoint, max_memory_gib={0: 4}, node_id=node) for node in ("1", "2"))
    assert one == same, "the node that shows it is no part of what it is"
    assert one != open_model(tiny_checkpoint, max_memory_gib={0: 5})
    assert one != open_model(tiny_checkpoint, max_memory_gib={0: 4}, weight_dtype="bf16")


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"weight_dtype": "fp4"}, "weight_dtype is 'fp4'; choose one of default, bf16"),
        ({"device_map": "sequential"}, "device_map is 'sequential'; choose one of auto, balanced"),
        ({"offload": "disk"}, "offload is 'disk'; choose one of auto, cpu, none"),
        ({"execution": "fast"}, "execution is 'fast'; choose one of auto, parallel, sequential"),
    ],
)
def test_unknown_choices(tiny_checkpoint: Path, choice: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        open_model(tiny_checkpoint, **choice)


@pytest.mark.parametrize("name", ["/does/not/exist", "no-such-folder", "./models/wan", "C:\\models\\wan"])
def test_paths_that_lead_nowhere(name: str) -> None:
    with pytest.raises(CheckpointError, match="There is no folder .* Check the name"):
        open_model(name)


def test_a_hub_id_without_network() -> None:
    """The tests run with HF_HUB_OFFLINE=1, as ComfyUI does where there is no network."""
    with pytest.raises(CheckpointError, match="someone/something is not on this computer yet"):
        open_model("someone/something")


def test_a_tensor_with_an_absurd_number(copy: Path) -> None:
    """Python refuses to read numbers of thousands of digits."""
    (weights,) = (copy / "transformer").glob("*.safetensors")
    save_file({**load_file(weights), f"blocks.{'9' * 5000}.scale_shift_table": torch.ones(1)}, weights)
    handle = open_model(copy)
    with pytest.raises(CheckpointError, match="tensors 1 unknown"):
        empty_transformer(handle.model.experts[HIGH_NOISE])
