"""Bad input to a running ComfyUI: the node says what is wrong and what to do, and the next prompt works."""

import io
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from comfy_client import PromptFailed, PromptRejected
from comfy_server import TINY_MODEL, ComfyServer
from PIL import Image

LOADER, PHOTO, SAMPLER, PREVIEW = "1", "2", "3", "4"
WEIGHTS = "diffusion_pytorch_model.safetensors"
seeds = itertools.count(1)


def prompt(loader: dict[str, Any] | None = None, **sampler: Any) -> dict[str, Any]:
    """A small video; a new seed each time, so that ComfyUI has no cached result."""
    size = {"width": 64, "height": 48, "length": 5, "steps": 2, "seed": next(seeds)}
    defaults = {"positive": "a boat", "negative": "", "batch_size": 1, "cfg": 1.0, "cfg_low_noise": 0.0, "sampler_name": "unipc"}
    levels = {"shift": 5.0, "boundary": 0.9, "switch_step": 0}
    choices = {"high_noise_model": "none", "low_noise_model": "none", "text_encoder": "from model", "vae": "from model"}
    how = {"weight_dtype": "default", "device_map": "balanced", "execution": "auto", "offload": "auto"}
    return {
        LOADER: {"class_type": "WanShardedLoader", "inputs": {"model": TINY_MODEL, **choices, **how, **(loader or {})}},
        PHOTO: {"class_type": "LoadImage", "inputs": {"image": "wan_sharded_example.jpg"}},
        SAMPLER: {
            "class_type": "WanShardedI2VSampler",
            "inputs": {"model": [LOADER, 0], "image": [PHOTO, 0], **defaults, **levels, **size, **sampler},
        },
        PREVIEW: {"class_type": "PreviewImage", "inputs": {"images": [SAMPLER, 0]}},
    }


def complaint(server: ComfyServer, bad: dict[str, Any]) -> str:
    """What the user reads: the node's error, or what the server answers instead of queueing it."""
    try:
        server.run(bad)
    except PromptFailed as failed:
        return failed.error["exception_message"]
    except PromptRejected as rejected:
        return str(rejected)
    raise AssertionError("it worked")


def check_it_still_works(server: ComfyServer) -> None:
    entry = server.run(prompt())
    assert len(entry["outputs"][PREVIEW]["images"]) == 5


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated": (
        lambda model: truncate(model / "transformer_2" / WEIGHTS),
        [f"transformer_2/{WEIGHTS} is truncated", "Download it again"],
    ),
    "zero bytes": (lambda model: (model / "transformer" / WEIGHTS).write_bytes(b""), ["0 bytes", "Download it again"]),
    "absurd header": (
        lambda model: (model / "transformer" / WEIGHTS).write_bytes(b"\xff" * 7 + b"\x7f" + b"\0" * 100),
        ["no complete safetensors file", "Download it again"],
    ),
    "expert missing": (lambda model: shutil.rmtree(model / "transformer_2"), ["lacks its low noise expert", "Complete the download"]),
    "pickled": (
        lambda model: (model / "vae" / WEIGHTS).rename(model / "vae" / "diffusion_pytorch_model.bin"),
        ["pickled weights", "Use a safetensors version"],
    ),
    "configuration": (lambda model: (model / "transformer" / "config.json").write_text("{"), ["config.json is no valid JSON"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_models(comfy_server: ComfyServer, tiny_checkpoint: Path, damage: str) -> None:
    do, words = DAMAGE[damage]
    name = f"broken {damage}"
    folder = comfy_server.base_dir / "models" / "diffusers" / name
    shutil.copytree(tiny_checkpoint, folder)
    try:
        do(folder)
        message = complaint(comfy_server, prompt({"model": name}))
        for word in words:
            assert word in message
    finally:
        shutil.rmtree(folder)
    check_it_still_works(comfy_server)


@pytest.mark.parametrize(
    ("loader", "sampler", "words"),
    [
        ({"model": "not-here"}, {}, ["not-here", TINY_MODEL]),
        ({"model": "../wan-tiny"}, {}, ["../wan-tiny"]),
        ({"model": "single files"}, {}, ["no file for the high noise expert", "Choose high_noise_model and low_noise_model"]),
        ({"model": "single files", "high_noise_model": "gone_high.safetensors"}, {}, ["gone_high.safetensors"]),
        ({"text_encoder": "gone.safetensors"}, {}, ["text_encoder", "gone.safetensors"]),
        ({"vae": "../vae/gone.safetensors"}, {}, ["vae", "gone.safetensors"]),
        ({"weight_dtype": "fp4"}, {}, ["fp4"]),
        ({"gpu0_gb": 1000.0}, {}, ["gpu0_gb"]),
        ({}, {"width": 8192, "height": 8192, "length": 4097}, ["length is 4097; Wan takes 1 to 4093"]),
        ({}, {"width": 8192, "height": 8192, "length": 4093}, ["8192x8192x4093 needs", "are free", "smaller or shorter"]),
        ({}, {"sampler_name": "heun"}, ["heun"]),
        ({}, {"steps": 0}, ["steps"]),
        ({}, {"cfg": 0.5}, ["cfg"]),
        ({}, {"length": 1, "last_image": [PHOTO, 0]}, ["length is 1", "at least 5 frames"]),
        ({}, {"width": 1_000_000}, ["width"]),
    ],
    ids=str,
)
def test_values_that_cannot_be(comfy_server: ComfyServer, loader: dict[str, Any], sampler: dict[str, Any], words: list[str]) -> None:
    message = complaint(comfy_server, prompt(loader, **sampler))
    for word in words:
        assert word in message
    check_it_still_works(comfy_server)


WRONG_FILES: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "wan_high.safetensors", "no complete safetensors file"),
    "not read": (b"anything", "wan_high.ckpt", "pickled"),
    "no GGUF": (b"anything", "wan_high.gguf", "is no whole GGUF file"),
    "something else": (b"\x02\0\0\0\0\0\0\0{}", "wan_high.safetensors", "is a file without tensors"),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_files_that_are_no_expert(comfy_server: ComfyServer, kind: str) -> None:
    content, name, words = WRONG_FILES[kind]
    folder = comfy_server.base_dir / "models" / "diffusion_models"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    partner = name.replace("high", "low")
    (folder / partner).write_bytes(content)
    try:
        for low in ("none", partner):
            message = complaint(comfy_server, prompt({"model": "single files", "high_noise_model": name, "low_noise_model": low}))
            assert words in message and name in message
        message = complaint(comfy_server, prompt({"low_noise_model": partner}))
        assert words in message and partner in message
        (folder / partner).unlink()
        message = complaint(comfy_server, prompt({"model": "single files", "high_noise_model": name}))
        assert "Choose low_noise_model" in message
    finally:
        (folder / name).unlink()
        (folder / partner).unlink(missing_ok=True)
    check_it_still_works(comfy_server)


def test_the_hub_without_a_network(comfy_server: ComfyServer) -> None:
    """The default of the example workflows; the server runs with HF_HUB_OFFLINE=1 here."""
    message = complaint(comfy_server, prompt({"model": "Wan-AI/Wan2.2-I2V-A14B-Diffusers"}))
    assert "Wan-AI/Wan2.2-I2V-A14B-Diffusers is not on this computer yet" in message and "models/diffusers" in message


def test_what_is_corrected_is_shown_on_the_node(comfy_server: ComfyServer) -> None:
    entry = comfy_server.run(prompt(width=72, height=50, length=8))
    (text,) = entry["outputs"][SAMPLER]["text"]
    assert "72x50 is no multiple of 16; made 64x48 instead." in text
    assert "length 8 is not 4n+1; made 5 frames instead." in text
    assert len(entry["outputs"][PREVIEW]["images"]) == 5


def test_both_executions_make_the_same_picture(comfy_server: ComfyServer) -> None:
    """Through the queue as well; a server without a GPU has one device, which computes it all either way."""
    results = []
    for execution in ("sequential", "parallel"):
        entry = comfy_server.run(prompt({"execution": execution}, seed=11))
        files = [comfy_server.request(f"/view?{urlencode(image)}") for image in entry["outputs"][PREVIEW]["images"]]
        results.append(np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]).astype(int))
        assert "high noise expert" in entry["outputs"][LOADER]["text"][0]
    assert results[0].std() > 1
    assert np.abs(results[0] - results[1]).max() <= 1


def test_a_model_that_is_repaired_works_without_a_restart(comfy_server: ComfyServer, tiny_checkpoint: Path) -> None:
    folder = comfy_server.base_dir / "models" / "diffusers" / "repaired"
    shutil.copytree(tiny_checkpoint, folder)
    try:
        truncate(folder / "transformer" / WEIGHTS)
        bad = prompt({"model": "repaired"})
        assert "is truncated" in complaint(comfy_server, bad)
        shutil.copy(tiny_checkpoint / "transformer" / WEIGHTS, folder / "transformer" / WEIGHTS)
        comfy_server.run(bad)
    finally:
        shutil.rmtree(folder)


def test_interrupt_and_go_on(comfy_server: ComfyServer) -> None:
    long = prompt(steps=1000, length=17)
    with comfy_server.listen() as events:
        prompt_id = comfy_server.queue(long)
        # Its own: on a busy machine the last messages of the prompt before may come only now.
        events.wait_for(lambda event: event.kind == "progress" and event.data["prompt_id"] == prompt_id and event.data["value"] >= 2)
        comfy_server.interrupt()
        entry = comfy_server.wait(prompt_id)
    kinds = [kind for kind, _ in entry["status"]["messages"]]
    assert "execution_interrupted" in kinds and "execution_error" not in kinds
    check_it_still_works(comfy_server)
