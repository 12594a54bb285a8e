"""The example workflows against a running ComfyUI: every widget value, name and link, in the UI format and the API format, and a run of each
with tiny models."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from comfy_server import PACK_NAME, TINY_MODEL, ComfyServer
from example_files import (
    CORE,
    EXPERTS,
    FILES,
    FOLDER,
    FOUR_STEPS,
    LONG,
    NAMES,
    api_workflow,
    inputs_of,
    named_model_files,
    of_type,
    ui_workflow,
)
from PIL import Image

# Widgets that are not at their defaults.
CHANGED = {
    "wan_i2v": {"positive"},
    "wan_first_last_frame": {"positive"},
    FOUR_STEPS: {"positive", "width", "height", "steps", "cfg", "sampler_name", "switch_step", *FILES},
    CORE: EXPERTS,
    LONG: {"positive", "batch_index", "length"},  # which frames are taken
}
# Nodes that only exist in the frontend.
NOTES = {"Note", "MarkdownNote"}
WIDGET_TYPES = {"COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"}
# The frontend adds a widget after these; it is saved in the UI format only.
CONTROL_VALUES = {"fixed", "increment", "decrement", "randomize"}


def input_specs(info: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """name -> (type, options), in the order of the schema: required inputs, then optional ones."""
    specs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for name, spec in specs.items()}


def is_widget(kind: Any) -> bool:
    return isinstance(kind, list) or kind in WIDGET_TYPES


def choices(kind: Any, options: dict[str, Any]) -> list[Any] | None:
    """What a combo offers, or None for other inputs."""
    if isinstance(kind, list):
        return kind
    return options["options"] if kind == "COMBO" else None


def widget_values(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """A UI node's widget values by name, by position as the frontend does it; fails unless every value is used up."""
    values = iter(node.get("widgets_values", []))
    found = {}
    for name, (kind, options) in input_specs(info).items():
        if not is_widget(kind):
            continue
        found[name] = next(values)
        if options.get("control_after_generate"):
            assert next(values) in CONTROL_VALUES
        if options.get("image_upload"):
            assert next(values) == "image"
    assert list(values) == [], f"{node['type']} has more values than widgets"
    return found


def make_small(prompt: dict[str, Any], seed: int) -> None:
    """Sizes for a CPU and the tiny checkpoint; core's Load CLIP gives way to the same at the size of the tiny file."""
    loader = inputs_of(prompt, "WanShardedLoader")
    if loader["model"] != "single files":
        loader["model"] = TINY_MODEL
    for number, sampler in enumerate(of_type(prompt, "WanShardedI2VSampler")):
        sampler.update(width=64, height=48, length=5, steps=4, seed=seed + number)
    for node in prompt.values():
        if node["class_type"] == "CLIPLoader":
            node["class_type"] = "TinyCoreClip"


def frames_of(video: Path) -> np.ndarray:
    with av.open(str(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


@pytest.fixture(scope="module")
def named_files(comfy_server: ComfyServer, tiny_single_files: Path) -> Iterator[dict[str, str]]:
    """Tiny models of the right kinds, under the names that the examples ask for, in the server's folders: name -> folder."""
    with named_model_files(comfy_server.base_dir / "models", tiny_single_files) as placed:
        yield placed


@pytest.fixture(scope="module")
def object_info(comfy_server: ComfyServer, named_files: dict[str, str]) -> dict[str, Any]:
    return comfy_server.object_info()


def nodes_of(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for node in workflow["nodes"] if node["type"] not in NOTES]


@pytest.mark.parametrize("name", NAMES)
def test_ui_values_are_valid_and_are_those_of_the_api_file(name: str, object_info: dict[str, Any]):
    api = api_workflow(name)
    ui_nodes = nodes_of(ui_workflow(name))
    assert {str(node["id"]): node["type"] for node in ui_nodes} == {key: node["class_type"] for key, node in api.items()}
    for node in ui_nodes:
        info = object_info[node["type"]]
        values = widget_values(node, info)
        api_inputs = api[str(node["id"])]["inputs"]
        assert values == {key: value for key, value in api_inputs.items() if not isinstance(value, list)}
        specs = input_specs(info)
        for key, value in values.items():
            kind, options = specs[key]
            offered = choices(kind, options)
            if offered is not None:
                assert value in offered, (node["type"], key)
            elif kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"], (node["type"], key)


@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_defaults_but_for_these(name: str, object_info: dict[str, Any]):
    differing: set[str] = set()
    for node in api_workflow(name).values():
        specs = input_specs(object_info[node["class_type"]])
        given = {key: value for key, value in node["inputs"].items() if not isinstance(value, list)}
        differing |= {key for key, value in given.items() if "default" in specs[key][1] and value != specs[key][1]["default"]}
    assert differing == CHANGED[name]


def test_four_steps_are_those_of_the_loras():
    sampler = inputs_of(api_workflow(FOUR_STEPS), "WanShardedI2VSampler")
    wanted = {"width": 640, "height": 640, "length": 81, "steps": 4, "cfg": 1, "shift": 5, "sampler_name": "euler", "switch_step": 2}
    assert {key: sampler[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("name", "folders"),
    [(FOUR_STEPS, {"diffusion_models", "text_encoders", "vae", "loras"}), (CORE, {"diffusion_models", "text_encoders", "vae"})],
)
def test_missing_files_are_offered_for_download(name: str, folders: set[str], named_files: dict[str, str]):
    """By the frontend, which reads a node's ``properties.models`` and looks for the names among its widgets."""
    offered = {}
    for node in nodes_of(ui_workflow(name)):
        for model in node["properties"].get("models", []):
            assert model["name"] in node["widgets_values"]
            assert model["url"].startswith("https://huggingface.co/Comfy-Org/Wan_2.")
            assert model["url"].endswith(f"/resolve/main/split_files/{model['directory']}/{model['name']}")
            offered[model["name"]] = model["directory"]
    assert offered == {file: folder for file, folder in named_files.items() if folder in folders}


@pytest.mark.parametrize("name", NAMES)
def test_every_example_runs(name: str, comfy_server: ComfyServer, named_files: dict[str, str]):
    prompt = api_workflow(name)
    make_small(prompt, seed=10 * NAMES.index(name))
    inputs_of(prompt, "WanShardedLoader")["gpu7_gb"] = 100 + NAMES.index(
        name
    )  # no such GPU here; else ComfyUI has cached results, and shows no text
    entry = comfy_server.run(prompt)
    (video,) = comfy_server.outputs(entry)
    assert video.suffix == ".mp4" and video.stat().st_size > 0
    texts = {prompt[key]["class_type"]: output["text"][0] for key, output in entry["outputs"].items() if "text" in output}
    assert "4 steps in" in texts["WanShardedI2VSampler"]
    assert "high noise expert" in texts["WanShardedLoader"]
    if name == FOUR_STEPS:
        assert "found" not in texts["WanShardedLoader"], "every file is named"
        assert "at strength 1 changes" in texts["WanShardedLora"]


def test_the_loras_change_the_video(comfy_server: ComfyServer, named_files: dict[str, str]):
    videos = []
    for strength in (1.0, 0.0):
        prompt = api_workflow(FOUR_STEPS)
        inputs_of(prompt, "WanShardedI2VSampler").update(width=64, height=48, length=5, seed=5)
        inputs_of(prompt, "WanShardedLora").update(high_noise_strength=strength, low_noise_strength=strength)
        inputs_of(prompt, "WanShardedVideoExport")["filename_prefix"] = f"lora_{strength}"
        (video,) = comfy_server.outputs(comfy_server.run(prompt))
        videos.append(frames_of(video))
    assert np.abs(videos[0] - videos[1]).mean() > 1


def test_the_long_video_goes_on_from_the_last_frame(comfy_server: ComfyServer):
    """Two clips of 5 frames are 9, and ComfyUI's nodes take the frames that the example says they do."""
    prompt = api_workflow(LONG)
    make_small(prompt, seed=70)
    (video,) = comfy_server.outputs(comfy_server.run(prompt))
    joined = frames_of(video)
    assert len(joined) == 9
    alone = api_workflow(LONG)
    make_small(alone, seed=70)
    titles = {node["_meta"]["title"]: key for key, node in alone.items()}
    export = inputs_of(alone, "WanShardedVideoExport")
    clips = {}
    for title in ("First clip", "Second clip"):
        export["images"] = [titles[title], 0]
        (video,) = comfy_server.outputs(comfy_server.run(alone))
        clips[title] = frames_of(video)
    expected = np.concatenate([clips["First clip"], clips["Second clip"][1:]])
    assert np.abs(joined - expected).mean() < 3  # both are compressed
    assert np.abs(joined - expected[::-1]).mean() > 6


def test_cores_texts_and_vae_are_used(comfy_server: ComfyServer, named_files: dict[str, str]):
    videos = []
    for text in ("a boat", "a house"):
        prompt = api_workflow(CORE)
        make_small(prompt, seed=80)
        next(node for node in prompt.values() if node["_meta"]["title"] == "Positive")["inputs"]["text"] = text
        (video,) = comfy_server.outputs(comfy_server.run(prompt))
        videos.append(frames_of(video))
    assert np.abs(videos[0] - videos[1]).mean() > 0


@pytest.mark.parametrize("name", NAMES)
def test_links_join_matching_slots_in_both_formats(name: str, object_info: dict[str, Any]):
    ui, api = ui_workflow(name), api_workflow(name)
    nodes = {node["id"]: node for node in ui["nodes"]}
    found = set()
    for link_id, origin, origin_slot, target, target_slot, kind in ui["links"]:
        socket = nodes[target]["inputs"][target_slot]
        output = nodes[origin]["outputs"][origin_slot]
        assert socket["link"] == link_id
        assert link_id in output["links"]
        assert object_info[nodes[origin]["type"]]["output"][origin_slot] == kind
        assert object_info[nodes[origin]["type"]]["output_name"][origin_slot] == output["name"]
        assert input_specs(object_info[nodes[target]["type"]])[socket["name"]][0] == kind
        found.add((str(target), socket["name"], str(origin), origin_slot))
    in_api = {(key, name, *value) for key, node in api.items() for name, value in node["inputs"].items() if isinstance(value, list)}
    assert found == in_api


@pytest.mark.parametrize("name", NAMES)
def test_required_inputs_are_all_there(name: str, object_info: dict[str, Any]):
    for node in api_workflow(name).values():
        assert set(object_info[node["class_type"]]["input"]["required"]) <= set(node["inputs"]), node["class_type"]


@pytest.mark.parametrize("name", NAMES)
def test_nodes_do_not_overlap(name: str):
    title_height = 30
    boxes = []
    for node in ui_workflow(name)["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes.append((node["type"], x, y - title_height, x + width, y + height))
    for index, (kind, left, top, right, bottom) in enumerate(boxes):
        for other, x0, y0, x1, y1 in boxes[index + 1 :]:
            assert right <= x0 or x1 <= left or bottom <= y0 or y1 <= top, f"{kind} and {other}"
    # Those that grow: with the number of GPUs, and with what they show after a run.
    for kind, left, _, right, bottom in boxes:
        if kind in ("WanShardedLoader", "WanShardedI2VSampler", "WanShardedVideoExport"):
            below = [other for other, x0, y0, x1, _ in boxes if x0 < right and left < x1 and y0 >= bottom]
            assert below == [], f"below {kind}"


def test_files_name_no_machine():
    for path in FOLDER.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in ("RTX", "GeForce", "cuda", "/home/", "C:\\") if word in text], path.name


def test_there_are_examples_for_first_and_last_frame():
    images = {
        name: [node["inputs"]["image"] for node in api_workflow(name).values() if node["class_type"] == "LoadImage"] for name in NAMES
    }
    assert images == {
        "wan_i2v": ["wan_sharded_example.jpg"],
        "wan_first_last_frame": ["wan_sharded_example.jpg", "wan_sharded_example_last.jpg"],
        FOUR_STEPS: ["wan_sharded_example.jpg"],
        CORE: ["wan_sharded_example.jpg"],
        LONG: ["wan_sharded_example.jpg"],
    }


def test_comfyui_lists_every_example_with_a_picture(comfy_server: ComfyServer):
    listed = comfy_server.request("/workflow_templates")
    assert sorted(listed[PACK_NAME]) == sorted(NAMES)
    for name in NAMES:
        jpeg = comfy_server.request(f"/api/workflow_templates/{PACK_NAME}/{name}.jpg")
        assert len(jpeg) < 100_000
        assert Image.open(io.BytesIO(jpeg)).format == "JPEG"
        assert comfy_server.request(f"/api/workflow_templates/{PACK_NAME}/{name}.json") == ui_workflow(name)


@pytest.mark.parametrize("node_id", ["WanShardedLoader", "WanShardedLora", "WanShardedI2VSampler"])
def test_help_pages_are_served(comfy_server: ComfyServer, node_id: str):
    page = comfy_server.request(f"/extensions/{PACK_NAME}/docs/{node_id}.md").decode("utf-8")
    specs = input_specs(comfy_server.object_info(node_id)[node_id])
    missing = [name for name in specs if not name.startswith("gpu") and f"`{name}`" not in page]
    assert missing == [], f"{node_id}.md does not explain {missing}"


@pytest.mark.parametrize("path", sorted((FOLDER.parent / "subgraphs").glob("*.json")), ids=lambda path: path.stem)
def test_blueprints_fit_the_nodes(comfy_server: ComfyServer, path: Path):
    """Every widget's value, and every widget that the outer node shows. Run in a browser by test_browser.py."""
    listed = comfy_server.request("/global_subgraphs").values()
    assert path.stem in {entry["name"] for entry in listed if entry["info"]["node_pack"].endswith(PACK_NAME)}
    blueprint = json.loads(path.read_text(encoding="utf-8"))
    (outer,) = blueprint["nodes"]
    (inner,) = blueprint["definitions"]["subgraphs"]
    assert outer["type"] == inner["id"] and outer["title"] == inner["name"] == path.stem
    assert [(i["name"], i["type"]) for i in outer["inputs"]] == [("image", "IMAGE")]
    assert [(o["name"], o["type"]) for o in outer["outputs"]] == [("frames", "IMAGE")]
    values = {}
    for node in inner["nodes"]:
        info = comfy_server.object_info(node["type"])[node["type"]]
        values[str(node["id"])] = widget_values(node, info)
    for node_id, widget in outer["properties"]["proxyWidgets"]:
        assert widget in values[node_id]
