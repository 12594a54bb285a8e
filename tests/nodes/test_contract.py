"""The node contract did not move, and every input of it is explained.

Shared workflow files store widget values by position and nodes by id. So what is written below is a promise once it is released: inputs
are only ever appended (to the end of their group), never inserted, renamed, reordered or taken away, and the choices of a combo only grow.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HUB_ID = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)
FORMATS = (
    *("mp4 (H.264)", "mp4 (H.265)", "mp4 (H.265, 10 bit)", "mp4 (AV1)", "mp4 (AV1, 10 bit)", "webm (VP9)", "mov (ProRes)", "mkv (FFV1)"),
    *("gif", "webp", "png sequence", "mp4 (H.264, NVENC)", "mp4 (H.265, NVENC)"),
)
# What of an input's options is promised; the rest is looks, or differs between versions of ComfyUI.
PROMISED = ("default", "min", "max", "step", "options", "multiline", "control_after_generate")

Inputs = dict[str, tuple[str, dict[str, Any]]]


def number(kind: str, default: float, low: float, high: float, step: float | None = None, **more: Any) -> tuple[str, dict[str, Any]]:
    return kind, {"default": default, "min": low, "max": high, **({} if step is None else {"step": step}), **more}


def combo(*choices: str, default: str | None = None) -> tuple[str, dict[str, Any]]:
    return "COMBO", {"default": default or choices[0], "options": list(choices)}


def socket(kind: str) -> tuple[str, dict[str, Any]]:
    return kind, {}


def text(default: str = "", *, multiline: bool) -> tuple[str, dict[str, Any]]:
    return "STRING", {"default": default, "multiline": multiline}


@dataclass(frozen=True)
class Contract:
    """What is promised of one node; ``inputs`` in order, and ``outputs`` as (name, type)."""

    display_name: str
    required: Inputs
    optional: Inputs
    outputs: list[tuple[str, str]]
    output_node: bool = False
    category: str = "Wan Sharded"


CONTRACTS = {
    "WanShardedLoader": Contract(
        display_name="Wan Sharded Loader",
        required={
            # Model folders and files that ComfyUI knows come between and after these words; here there are none.
            "model": combo(HUB_ID, "single files"),
            "high_noise_model": combo("none"),
            "low_noise_model": combo("none"),
            "text_encoder": combo("from model"),
            "vae": combo("from model"),
            "weight_dtype": combo("default", "bf16", "fp16", "fp8_e4m3fn", "int8"),
            "device_map": combo("auto", "balanced", default="balanced"),
            "execution": combo("auto", "parallel", "sequential"),
            "offload": combo("auto", "cpu", "none"),
        },
        # Always eight, whatever GPUs this machine has.
        optional={f"gpu{index}_gb": number("FLOAT", 0.0, -1.0, 256.0, 0.5) for index in range(8)},
        outputs=[("model", "WAN_SHARDED_MODEL")],
    ),
    "WanShardedLora": Contract(
        display_name="Wan Sharded LoRA",
        required={
            "model": socket("WAN_SHARDED_MODEL"),
            # Files that ComfyUI knows come after this word; here there are none.
            "high_noise_lora": combo("none"),
            "high_noise_strength": number("FLOAT", 1.0, -10.0, 10.0, 0.05),
            "low_noise_lora": combo("none"),
            "low_noise_strength": number("FLOAT", 1.0, -10.0, 10.0, 0.05),
        },
        optional={},
        outputs=[("model", "WAN_SHARDED_MODEL")],
    ),
    "WanShardedI2VSampler": Contract(
        display_name="Wan I2V Sampler",
        required={
            "model": socket("WAN_SHARDED_MODEL"),
            "image": socket("IMAGE"),
            "positive": text(multiline=True),
            "negative": text(NEGATIVE, multiline=True),
            "width": number("INT", 832, 16, 8192, 16),
            "height": number("INT", 480, 16, 8192, 16),
            "length": number("INT", 81, 1, 4097, 4),
            "batch_size": number("INT", 1, 1, 64),
            "seed": number("INT", 0, 0, 2**64 - 1, control_after_generate=True),
            "steps": number("INT", 20, 1, 1000),
            "cfg": number("FLOAT", 3.5, 1.0, 100.0, 0.1),
            "cfg_low_noise": number("FLOAT", 0.0, 0.0, 100.0, 0.1),
            "sampler_name": combo("unipc", "euler", "dpm++"),
            "shift": number("FLOAT", 5.0, 0.01, 100.0, 0.1),
            "boundary": number("FLOAT", 0.9, 0.0, 1.0, 0.001),
            "switch_step": number("INT", 0, 0, 1000),
        },
        optional={
            "last_image": socket("IMAGE"),
            "positive_conditioning": socket("CONDITIONING"),
            "negative_conditioning": socket("CONDITIONING"),
            "vae": socket("VAE"),
        },
        outputs=[("frames", "IMAGE"), ("latent", "LATENT")],
    ),
    "WanShardedVideoExport": Contract(
        display_name="Video Export",
        required={
            "images": socket("IMAGE"),
            "fps": number("FLOAT", 16.0, 0.01, 1000.0, 0.01),
            "filename_prefix": text("video/wan", multiline=False),
            "format": combo(*FORMATS),
            "quality": number("INT", 19, 0, 51),
        },
        optional={
            "audio": socket("AUDIO"),
            "pingpong": ("BOOLEAN", {"default": False}),
            "loop_count": number("INT", 0, 0, 65535),
            "save_output": ("BOOLEAN", {"default": True}),
            "first_frame_png": ("BOOLEAN", {"default": False}),
            "bitrate_mbps": number("FLOAT", 0.0, 0.0, 1000.0, 0.1),
        },
        outputs=[("video", "VIDEO"), ("path", "STRING")],
        output_node=True,
    ),
}


def promised(group: dict[str, list[Any]]) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, type, what is promised) of a group of inputs, in the order in which ComfyUI serves them."""
    found = []
    for name, (kind, *rest) in group.items():
        options = rest[0] if rest else {}
        if isinstance(kind, list):  # how some versions of ComfyUI serve a combo
            kind, options = "COMBO", {**options, "options": kind}
        found.append((name, kind, {key: options[key] for key in PROMISED if key in options}))
    return found


def as_listed(inputs: Inputs) -> list[tuple[str, str, dict[str, Any]]]:
    # A list: comparing dictionaries would forgive another order.
    return [(name, kind, options) for name, (kind, options) in inputs.items()]


def test_the_nodes_are_these(served: dict[str, dict[str, Any]]) -> None:
    assert list(served) == list(CONTRACTS)


@pytest.mark.parametrize("node_id", CONTRACTS)
def test_names(served: dict[str, dict[str, Any]], node_id: str) -> None:
    node, contract = served[node_id], CONTRACTS[node_id]
    assert (node["name"], node["display_name"], node["category"]) == (node_id, contract.display_name, contract.category)
    assert node["output_node"] is contract.output_node
    assert not node["deprecated"] and not node["experimental"]


@pytest.mark.parametrize("node_id", CONTRACTS)
def test_inputs_did_not_move(served: dict[str, dict[str, Any]], node_id: str) -> None:
    inputs, contract = served[node_id]["input"], CONTRACTS[node_id]
    assert promised(inputs.get("required", {})) == as_listed(contract.required)
    assert promised(inputs.get("optional", {})) == as_listed(contract.optional)


@pytest.mark.parametrize("node_id", CONTRACTS)
def test_outputs_did_not_move(served: dict[str, dict[str, Any]], node_id: str) -> None:
    node = served[node_id]
    assert list(zip(node["output_name"], node["output"], strict=True)) == CONTRACTS[node_id].outputs
    assert not any(node["output_is_list"])


@pytest.mark.parametrize("node_id", CONTRACTS)
def test_everything_has_a_tooltip(served: dict[str, dict[str, Any]], node_id: str) -> None:
    node = served[node_id]
    groups = (node["input"].get("required", {}), node["input"].get("optional", {}))
    silent = [name for group in groups for name, spec in group.items() if not (len(spec) > 1 and spec[1].get("tooltip", "").strip())]
    assert silent == []
    assert node["description"] and all(node["output_tooltips"])


@pytest.mark.parametrize("node_id", CONTRACTS)
def test_the_help_page_names_every_input_and_output(node_id: str) -> None:
    contract = CONTRACTS[node_id]
    page = (ROOT / "js" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {contract.display_name}\n")
    names = [*contract.required, *contract.optional, *(name for name, _ in contract.outputs)]
    assert [name for name in names if f"`{name}`" not in page] == []


@pytest.mark.parametrize("node_id", CONTRACTS)
def test_an_example_workflow_uses_it(node_id: str) -> None:
    folder = ROOT / "example_workflows"
    opened = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    queued = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((folder / "api").glob("*.json"))]
    assert any(node["type"] == node_id for workflow in opened for node in workflow["nodes"])
    assert any(node["class_type"] == node_id for prompt in queued for node in prompt.values())
