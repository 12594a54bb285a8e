"""The example workflows against a running ComfyUI: every widget value, name and link, in the UI format and the API format."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from comfy_server import PACK_NAME, ComfyServer
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "example_workflows"
NAMES = ["wan_i2v", "wan_first_last_frame"]
# Nodes that only exist in the frontend.
NOTES = {"Note", "MarkdownNote"}
WIDGET_TYPES = {"COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"}
# The frontend adds a widget after these; it is saved in the UI format only.
CONTROL_VALUES = {"fixed", "increment", "decrement", "randomize"}


def ui_workflow(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def api_workflow(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


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
    values = iter(node["widgets_values"])
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


@pytest.fixture(scope="module")
def object_info(comfy_server: ComfyServer) -> dict[str, Any]:
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
def test_values_are_the_defaults_except_the_prompt(name: str, object_info: dict[str, Any]):
    for node in api_workflow(name).values():
        specs = input_specs(object_info[node["class_type"]])
        given = {key: value for key, value in node["inputs"].items() if not isinstance(value, list)}
        differing = {key for key, value in given.items() if "default" in specs[key][1] and value != specs[key][1]["default"]}
        assert differing <= {"positive"}, node["class_type"]


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
    }


def test_comfyui_lists_every_example_with_a_picture(comfy_server: ComfyServer):
    listed = comfy_server.request("/workflow_templates")
    assert sorted(listed[PACK_NAME]) == sorted(NAMES)
    for name in NAMES:
        jpeg = comfy_server.request(f"/api/workflow_templates/{PACK_NAME}/{name}.jpg")
        assert len(jpeg) < 100_000
        assert Image.open(io.BytesIO(jpeg)).format == "JPEG"
        assert comfy_server.request(f"/api/workflow_templates/{PACK_NAME}/{name}.json") == ui_workflow(name)


@pytest.mark.parametrize("node_id", ["WanShardedLoader", "WanShardedI2VSampler"])
def test_help_pages_are_served(comfy_server: ComfyServer, node_id: str):
    page = comfy_server.request(f"/extensions/{PACK_NAME}/docs/{node_id}.md").decode("utf-8")
    specs = input_specs(comfy_server.object_info(node_id)[node_id])
    missing = [name for name in specs if not name.startswith("gpu") and f"`{name}`" not in page]
    assert missing == [], f"{node_id}.md does not explain {missing}"
