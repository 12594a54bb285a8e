"""The pack as a running ComfyUI sees it: which nodes there are, and their contract."""

from pathlib import Path
from typing import Any

import av
import pytest
from comfy_server import ComfyServer
from PIL import Image

EXPORT = "WanShardedVideoExport"
# Shared workflow files store widget values by position: a released order never changes, new inputs are appended.
# name of each input -> its socket type; combos are COMBO. Required ones first, as ComfyUI serves them.
LOADER_REQUIRED = {
    "model": "COMBO",
    "high_noise_model": "COMBO",
    "low_noise_model": "COMBO",
    "text_encoder": "COMBO",
    "vae": "COMBO",
    "weight_dtype": "COMBO",
    "device_map": "COMBO",
    "execution": "COMBO",
    "offload": "COMBO",
}
LORA_REQUIRED = {
    "model": "WAN_SHARDED_MODEL",
    "high_noise_lora": "COMBO",
    "high_noise_strength": "FLOAT",
    "low_noise_lora": "COMBO",
    "low_noise_strength": "FLOAT",
}
SAMPLER_REQUIRED = {
    "model": "WAN_SHARDED_MODEL",
    "image": "IMAGE",
    "positive": "STRING",
    "negative": "STRING",
    "width": "INT",
    "height": "INT",
    "length": "INT",
    "batch_size": "INT",
    "seed": "INT",
    "steps": "INT",
    "cfg": "FLOAT",
    "cfg_low_noise": "FLOAT",
    "sampler_name": "COMBO",
    "shift": "FLOAT",
    "boundary": "FLOAT",
    "switch_step": "INT",
}
SAMPLER_OPTIONAL = {
    "last_image": "IMAGE",
    "positive_conditioning": "CONDITIONING",
    "negative_conditioning": "CONDITIONING",
    "vae": "VAE",
}
EXPORT_REQUIRED = {
    "images": "IMAGE",
    "fps": "FLOAT",
    "filename_prefix": "STRING",
    "format": "COMBO",
    "quality": "INT",
}
EXPORT_OPTIONAL = {
    "audio": "AUDIO",
    "pingpong": "BOOLEAN",
    "loop_count": "INT",
    "save_output": "BOOLEAN",
    "first_frame_png": "BOOLEAN",
    "bitrate_mbps": "FLOAT",
}
CONTRACT = {
    "WanShardedLoader": (LOADER_REQUIRED, {f"gpu{index}_gb": "FLOAT" for index in range(8)}, ["WAN_SHARDED_MODEL"]),
    "WanShardedLora": (LORA_REQUIRED, {}, ["WAN_SHARDED_MODEL"]),
    "WanShardedI2VSampler": (SAMPLER_REQUIRED, SAMPLER_OPTIONAL, ["IMAGE", "LATENT"]),
    "WanShardedVideoExport": (EXPORT_REQUIRED, EXPORT_OPTIONAL, ["VIDEO", "STRING"]),
}
DEFAULTS = {
    "WanShardedLoader": {"device_map": "balanced", "weight_dtype": "default", "execution": "auto", "offload": "auto", "gpu0_gb": 0.0},
    "WanShardedLora": {"high_noise_lora": "none", "high_noise_strength": 1.0, "low_noise_lora": "none", "low_noise_strength": 1.0},
    "WanShardedI2VSampler": {"width": 832, "height": 480, "length": 81, "steps": 20, "cfg": 3.5, "shift": 5.0, "boundary": 0.9},
    "WanShardedVideoExport": {"fps": 16.0},
}


def served_inputs(info: dict, group: str) -> dict[str, str]:
    """Names and types of a node's inputs, in the order in which ComfyUI serves them."""
    types = {name: spec[0] if isinstance(spec[0], str) else "COMBO" for name, spec in info["input"].get(group, {}).items()}
    assert list(types) == info["input_order"].get(group, [])
    return types


def test_exactly_our_nodes_are_there(comfy_server: ComfyServer) -> None:
    ours = {name for name, info in comfy_server.object_info().items() if "ComfyUI-Wan-Sharded" in info.get("python_module", "")}
    assert ours == set(CONTRACT), comfy_server.log_tail()


@pytest.mark.parametrize("node_id", CONTRACT)
def test_contract_did_not_move(comfy_server: ComfyServer, node_id: str) -> None:
    required, optional, outputs = CONTRACT[node_id]
    info = comfy_server.object_info(node_id)[node_id]
    # A list of pairs: comparing dictionaries would forgive another order.
    assert list(served_inputs(info, "required").items()) == list(required.items())
    assert list(served_inputs(info, "optional").items()) == list(optional.items())
    assert info["output"] == outputs


@pytest.mark.parametrize("node_id", DEFAULTS)
def test_defaults(comfy_server: ComfyServer, node_id: str) -> None:
    inputs = comfy_server.object_info(node_id)[node_id]["input"]
    served = {name: spec[1].get("default") for group in inputs.values() for name, spec in group.items() if len(spec) > 1}
    assert {name: served.get(name) for name in DEFAULTS[node_id]} == DEFAULTS[node_id]


@pytest.mark.parametrize("node_id", CONTRACT)
def test_everything_is_explained(comfy_server: ComfyServer, node_id: str) -> None:
    info = comfy_server.object_info(node_id)[node_id]
    assert info["description"]
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            assert len(spec) > 1 and spec[1].get("tooltip"), f"{node_id}.{name} has no tooltip"
    assert all(info["output_tooltips"]), f"an output of {node_id} has no tooltip"


def test_the_tiny_model_is_offered(comfy_server: ComfyServer) -> None:
    spec = comfy_server.object_info("WanShardedLoader")["WanShardedLoader"]["input"]["required"]["model"]
    choices = spec[1]["options"] if spec[0] == "COMBO" else spec[0]
    assert any("wan-tiny" in choice for choice in choices)
    assert "Wan-AI/Wan2.2-I2V-A14B-Diffusers" in choices


def test_the_javascript_is_served(comfy_server: ComfyServer) -> None:
    files = [path for path in comfy_server.request("/extensions") if "ComfyUI-Wan-Sharded" in path]
    assert files
    for path in files:
        assert comfy_server.request(path)


def saved_files(server: ComfyServer, entry: dict[str, Any], node_id: str) -> list[Path]:
    folders = {"output": server.output_dir, "temp": server.base_dir / "temp"}
    return [folders[file["type"]] / file["subfolder"] / file["filename"] for file in entry["outputs"][node_id]["images"]]


def test_cores_video_nodes_take_every_export(comfy_server: ComfyServer) -> None:
    formats = [
        choice for choice in comfy_server.object_info(EXPORT)[EXPORT]["input"]["required"]["format"][1]["options"] if "NVENC" not in choice
    ]
    prompt: dict[str, Any] = {"frames": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 5, "color": 4000}}}
    for index, name in enumerate(formats):
        ours = {"images": ["frames", 0], "fps": 16.0, "filename_prefix": f"ours_{index}", "format": name, "quality": 19}
        prompt[f"export {name}"] = {"class_type": EXPORT, "inputs": ours}
        cores = {"video": [f"export {name}", 0], "filename_prefix": f"core_{index}", "format": "mp4", "codec": "auto"}
        prompt[name] = {"class_type": "SaveVideo", "inputs": cores}
    entry = comfy_server.run(prompt)
    for name in formats:
        (file,) = saved_files(comfy_server, entry, name)
        with av.open(str(file)) as container:
            frames = list(container.decode(video=0))
        assert (file.suffix, len(frames), frames[0].width, frames[0].height) == (".mp4", 5, 64, 64), name


@pytest.mark.parametrize("format", ["mp4 (H.264)", "mp4 (H.265)", "mp4 (AV1)", "webm (VP9)"])
def test_cores_load_video_reads_an_export(comfy_server: ComfyServer, format: str) -> None:
    frames = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 5, "color": 0x8040C0}}
    export = {"images": ["1", 0], "fps": 16.0, "filename_prefix": "to_load", "format": format, "quality": 19, "first_frame_png": True}
    entry = comfy_server.run({"1": frames, "2": {"class_type": EXPORT, "inputs": export}})
    file = entry["outputs"]["2"]["text"][0].split("\n")[0]
    loaded = {
        "1": {"class_type": "LoadVideo", "inputs": {"file": f"{file} [output]"}},
        "2": {"class_type": "GetVideoComponents", "inputs": {"video": ["1", 0]}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    }
    pictures = saved_files(comfy_server, comfy_server.run(loaded), "3")
    assert len(pictures) == 5
    with Image.open(pictures[0]) as picture:
        assert picture.size == (64, 64)
        assert all(
            abs(found - sent) <= 4 for found, sent in zip(picture.convert("RGB").getpixel((32, 32)), (0x80, 0x40, 0xC0), strict=True)
        )
