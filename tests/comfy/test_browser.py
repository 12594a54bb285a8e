"""ComfyUI's web page with this pack, in a headless browser: two frontends, each with the classic canvas and with Nodes 2.0.

Pictures of what was seen are in .work/screenshots.
"""

import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from comfy_looks import (
    EXPORT,
    GPUS,
    LOADER,
    LOOKS,
    SAMPLER,
    Look,
    loader_of,
    make_small,
    press_run,
    shown_sliders,
    wait_for_success,
    wait_for_video,
    watch_progress,
)  # fmt: skip
from comfy_server import TINY_MODEL
from example_files import api_workflow, inputs_of, ui_workflow
from frontends import BUNDLED

pytestmark = [pytest.mark.browser, pytest.mark.slow]

# Larger than a local GPU, automatic, left out, and the server's maximum.
SLIDER_VALUES = [80, 12.5, -1, 256, 0, 7, 3.5, 1]
# The live picture, in an <img>: of ours in the classic canvas, of the frontend's own in Nodes 2.0.
PICTURE_SHOWN = """([type, nodes2]) => {
    const [node] = app.graph._nodes.filter((node) => node.type === type);
    const ours = node.widgets.find((widget) => widget.name === "wan_sharded_picture")?.element;
    const images = nodes2 ? [...document.querySelectorAll(`[data-node-id='${node.id}'] img`)] : [ours];
    return images.length === 1 && !(nodes2 && ours) && images[0]?.src.startsWith("blob:") && images[0].naturalWidth > 0;
}"""
# What the page shows each of these with.
EXPORTS = {"gif": "IMG", "webp": "IMG", "webm (VP9)": "VIDEO", "png sequence": "IMG"}
# One colour for 5 frames of 64x64, exported to each format; all nodes in sight, because the classic canvas loads what it draws. The ids.
ADD_EXPORTS = """({ formats, prefix, color }) => {
    app.graph.clear();
    app.graph.state.lastNodeId += 100; // Nodes 2.0 of frontend 1.32 shows what it knows of the last node with an id
    const add = (type, x, values) => {
        const node = LiteGraph.createNode(type);
        node.pos = [x, 0];
        for (const [name, value] of Object.entries(values)) node.widgets.find((w) => w.name === name).value = value;
        app.graph.add(node);
        return node;
    };
    const frames = add("EmptyImage", 0, { width: 64, height: 64, batch_size: 5, color });
    const exports = formats.map((format, index) => {
        const name = `${prefix}-${format.split(" ")[0]}`;
        const node = add("WanShardedVideoExport", 350 + 450 * index, { format, filename_prefix: name, first_frame_png: format.startsWith("webm") });
        frames.connect(0, node, 0);
        return node.id;
    });
    Object.assign(app.canvas.ds, { scale: 0.7, offset: [100, 250] });
    app.canvas.setDirty(true, true);
    return exports;
}"""
# Pictures and videos on a node, with their own sizes.
SHOWN = """([id, nodes_2]) => {
    const node = app.graph.getNodeById(id);
    const places = nodes_2 ? [document.querySelector(`[data-node-id='${id}']`)] : node.widgets.map((widget) => widget.element);
    const media = places.flatMap((place) => [...(place?.querySelectorAll("img, video") ?? [])]);
    if (!nodes_2) media.push(...(node.imgs ?? []));
    return media.map((each) => [each.tagName, each.naturalWidth ?? each.videoWidth, each.naturalHeight ?? each.videoHeight]);
}"""
# The example's photo into the one node on the canvas, and what comes out into an export.
AROUND_BLUEPRINT = """(values) => {
    const [blueprint] = app.graph._nodes;
    const add = (type, x) => {
        const node = LiteGraph.createNode(type);
        node.pos = [x, 0];
        app.graph.add(node);
        return node;
    };
    const photo = add("LoadImage", -400), exported = add("WanShardedVideoExport", 600);
    photo.widgets[0].value = "wan_sharded_example.jpg";
    blueprint.pos = [0, 0];
    photo.connect(0, blueprint, blueprint.findInputSlot("image"));
    blueprint.connect(blueprint.findOutputSlot("frames"), exported, exported.findInputSlot("images"));
    for (const [name, value] of Object.entries(values)) blueprint.widgets.find((w) => w.name.endsWith(name)).value = value;
    Object.assign(app.canvas.ds, { scale: 0.7, offset: [500, 250] });
    app.canvas.setDirty(true, true);
}"""
DROP = """async (name) => {
    const answer = await app.api.fetchApi(`/view?type=output&filename=${name}`);
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([await answer.blob()], name.split("&")[0], { type: answer.headers.get("Content-Type") }));
    app.graph.clear();
    app.canvas.canvas.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
}"""


def check_sliders(page: Any, gpus: int) -> None:
    """One slider per GPU, with its name, ending at its size; the node is high enough for all of them."""
    assert shown_sliders(page) == [f"GPU {index} · {name}" for index, name in enumerate(GPUS[gpus])]
    ends = page.on_node(LOADER, "node.widgets.filter((w) => /^gpu/.test(w.name) && !w.hidden).map((w) => w.options.max)")
    assert ends == [float(name.split()[-2]) for name in GPUS[gpus]]
    needed, given = page.on_node(LOADER, "[node.computeSize()[1], node.size[1]]")
    assert given >= needed


def test_example_runs_and_shows_everything(look: Look, open_page: Callable[..., Any]):
    page = open_page(gpus=2)
    page.open_template("wan_i2v")
    assert shown_sliders(page) == ["GPU 0 · RTX 5060 Ti 16 GB", "GPU 1 · RTX 3060 12 GB"]
    if look.nodes_2:
        text = page.page.locator("[data-node-id='1']").inner_text()
        assert "GPU 1 · RTX 3060 12 GB" in text
        assert "GPU 2" not in text
    page.screenshot(f"{look}-1-opened")

    make_small(page, seed=1 + LOOKS.index(look))
    workflow, api = page.save()
    watch_progress(page)
    press_run(page)
    page.page.wait_for_function("() => window.seen.preview > 0 || window.seen.end", timeout=120_000)
    page.page.wait_for_function(PICTURE_SHOWN, arg=[SAMPLER, look.nodes_2], timeout=30_000)
    page.screenshot(f"{look}-2-running")
    wait_for_success(page)
    seen = page.page.evaluate("() => window.seen")
    assert seen["progress"] >= 4
    assert seen["preview"] >= 1 and seen["moving"] >= 1
    assert any(re.search(r"Step \d of 4 \((high|low) noise expert\), [\d.]+ s a step, about \d+ s left", text) for text in seen["status"])

    video = wait_for_video(page)
    page.screenshot(f"{look}-3-done")
    assert video == [128, 96]
    assert "CPU" in page.text(LOADER)
    assert page.text(SAMPLER).strip() and "..." not in page.text(SAMPLER)

    # The video brings the graph back, the seed it was made with included.
    name = page.text(EXPORT).splitlines()[0]
    page.page.evaluate(DROP, f"{name}&subfolder=video")
    page.page.wait_for_function("(count) => app.graph._nodes.length === count", arg=len(workflow["nodes"]), timeout=20_000)
    page.page.wait_for_timeout(500)
    dropped, dropped_api = page.save()
    assert dropped_api == api
    for came_back, node in zip(dropped["nodes"], workflow["nodes"], strict=True):
        assert came_back["type"] == node["type"] and came_back["pos"] == pytest.approx(node["pos"], abs=0.1)  # Nodes 2.0 measures anew


def test_cancel_and_run_again(look: Look, open_page: Callable[..., Any]):
    page = open_page(gpus=1)
    page.open_template("wan_i2v")
    make_small(page, seed=200 + LOOKS.index(look))
    page.set_values(SAMPLER, steps=1000)
    watch_progress(page)
    press_run(page)
    page.page.wait_for_function("() => window.seen.progress > 1 || window.seen.end", timeout=120_000)
    page.page.get_by_role("button", name="Cancel current run").click()
    page.page.wait_for_function("() => window.seen.end", timeout=30_000)
    assert page.page.evaluate("() => window.seen.end[0]") == "execution_interrupted"

    page.set_values(SAMPLER, steps=2)
    watch_progress(page)
    press_run(page)
    wait_for_success(page)


def test_missing_files_are_offered_for_download(look: Look, open_page: Callable[..., Any]):
    """By ComfyUI, which knows where they are from the template."""
    page = open_page(gpus=1)
    page.open_template("wan_i2v_lightx2v_4steps")
    if look.frontend == BUNDLED:
        page.page.get_by_text("Missing Models").wait_for(timeout=20_000)
    else:
        page.page.get_by_text("6 issues found").wait_for(timeout=20_000)
        page.page.get_by_role("button", name="View details").click()
    for file in inputs_of(api_workflow("wan_i2v_lightx2v_4steps"), LOADER).values():
        if str(file).endswith(".safetensors"):
            page.page.get_by_text(file).locator("visible=true").first.wait_for(timeout=10_000)
    page.screenshot(f"{look}-missing")
    page.page.keyboard.press("Escape")
    page.load(ui_workflow("wan_i2v"))  # the next tab shows what this one shows last, with this dialog


def test_a_blueprint_from_the_node_library_makes_a_video(look: Look, open_page: Callable[..., Any]):
    page = open_page(gpus=2)
    page.open()
    page.load({"nodes": [], "links": [], "last_node_id": 0, "last_link_id": 0, "version": 0.4})
    page.page.keyboard.press("n")
    page.page.get_by_text("Subgraph Blueprints" if look.frontend == BUNDLED else "Comfy Blueprints").first.click()
    page.page.get_by_text("Wan I2V in 4 steps on all GPUs").first.wait_for(timeout=20_000)
    page.page.get_by_text("Wan I2V on all GPUs").first.click()
    if look.frontend != BUNDLED:  # newer ones carry it under the pointer until it is put somewhere
        page.page.mouse.click(1000, 600, delay=50)
    page.page.wait_for_function("() => app.graph._nodes.length === 1", timeout=20_000)
    page.page.keyboard.press("n")
    page.page.evaluate(
        AROUND_BLUEPRINT, {"model": TINY_MODEL, "width": 128, "height": 96, "length": 17, "steps": 4, "seed": 300 + LOOKS.index(look)}
    )
    assert shown_sliders(page) == ["GPU 0 · RTX 5060 Ti 16 GB", "GPU 1 · RTX 3060 12 GB"], "inside"
    watch_progress(page)
    press_run(page)
    wait_for_success(page)
    video = wait_for_video(page)
    page.screenshot(f"{look}-blueprint")
    assert video == [128, 96]
    assert "CPU" in page.text(LOADER) and page.text(SAMPLER).strip()


def test_a_file_survives_machines_with_other_gpus(look: Look, open_page: Callable[..., Any]):
    page = open_page(gpus=8)
    page.open_template("wan_first_last_frame")
    page.screenshot(f"{look}-gpus-8")
    check_sliders(page, 8)
    page.set_values(LOADER, **{f"gpu{index}_gb": value for index, value in enumerate(SLIDER_VALUES)})
    workflow, api = page.save()
    original = loader_of(workflow)["widgets_values"]
    assert original[-8:] == SLIDER_VALUES
    for gpus in (1, 0, 4):
        page.close()
        page = open_page(gpus=gpus)
        page.open()
        page.load(workflow)
        page.screenshot(f"{look}-gpus-{gpus}")
        check_sliders(page, gpus)
        workflow, visited = page.save()
        assert loader_of(workflow)["widgets_values"] == original
        assert visited["1"]["inputs"] == api["1"]["inputs"]


def test_a_workflow_names_files_in_folders_as_another_system_does(
    look: Look, open_page: Callable[..., Any], server_with: Callable[[str], Any]
):
    """Windows writes them with a backslash, and a server elsewhere would refuse the value."""
    folder = server_with(look.frontend).base_dir / "models" / "diffusion_models" / f"on-{LOOKS.index(look)}"
    folder.mkdir(parents=True)
    try:
        for level in ("high", "low"):
            (folder / f"{level}.safetensors").touch()
        page = open_page()
        page.open()
        workflow = ui_workflow("wan_i2v")
        values = {"high_noise_model": f"{folder.name}\\high.safetensors", "low_noise_model": f"{folder.name}\\gone.safetensors"}
        page.load(workflow)
        page.set_values(LOADER, **values)
        windows, _ = page.save()
        page.load(windows)
        inputs = page.save()[1]["1"]["inputs"]
        assert inputs["high_noise_model"] == f"{folder.name}/high.safetensors"
        assert inputs["low_noise_model"] == values["low_noise_model"], "it is not here, and is seen to be missing"
        assert inputs["model"] == loader_of(workflow)["widgets_values"][0]
    finally:
        shutil.rmtree(folder)


def test_exports_are_shown_and_come_back(look: Look, open_page: Callable[..., Any]):
    page = open_page()
    page.open()
    ids = page.page.evaluate(
        ADD_EXPORTS, {"formats": [*EXPORTS, "mov (ProRes)"], "prefix": f"shown-{look}", "color": 1000 + LOOKS.index(look)}
    )
    _, api = page.save()
    watch_progress(page)
    page.page.evaluate("() => { app.queuePrompt(0); }")
    wait_for_success(page)
    shown: dict[str, Any] = {}
    for _ in range(40):
        shown = {format: page.page.evaluate(SHOWN, [node_id, look.nodes_2]) for node_id, format in zip(ids, EXPORTS, strict=False)}
        if all(media and all(64 in size for _, *size in media) for media in shown.values()):
            break
        page.page.wait_for_timeout(250)
    page.screenshot(f"{look}-exports")
    assert {format: {tuple(each) for each in media} for format, media in shown.items()} == {
        format: {(tag, 64, 64)} for format, tag in EXPORTS.items()
    }
    for node_id, format in zip(ids, EXPORTS, strict=False):
        text = page.page.evaluate(
            "(id) => app.graph.getNodeById(id).widgets.find((w) => w.name === 'wan_sharded_text').element.value", node_id
        )
        assert f"shown-{look}-{format.split()[0]}_0000" in text

    for kind, extension in (("webm", "webm"), ("webm", "png"), ("webp", "webp"), ("mov", "mov")):
        page.page.evaluate(DROP, f"shown-{look}-{kind}_00001_.{extension}")
        page.page.wait_for_function("(count) => app.graph._nodes.length === count", arg=len(api), timeout=20_000)
        page.page.wait_for_timeout(500)
        assert page.save()[1] == api, f"{kind}, {extension}"


@pytest.fixture
def example(look: Look, kept_page: Callable[[Look], Any]) -> tuple[Any, dict[str, Any]]:
    """A tab that shows the example on a server with one GPU, and what the file holds."""
    page = kept_page(look)
    page.load(ui_workflow("wan_i2v"))
    return page, page.save()[0]


def test_files_without_the_last_sliders(example: tuple[Any, dict[str, Any]]):
    page, workflow = example
    loader = loader_of(workflow)
    loader["widgets_values"] = loader["widgets_values"][:-6]
    loader.pop("widgets_values_named", None)  # newer frontends write both
    page.load(workflow)
    _, api = page.save()
    assert api["1"]["inputs"]["gpu7_gb"] == 0
    assert api["1"]["inputs"]["offload"] == "auto"


def test_the_text_is_not_saved_and_survives_a_reload_of_the_graph(example: tuple[Any, dict[str, Any]]):
    page, before = example
    page.on_node(LOADER, "node.onExecuted({ text: ['first line', 'second line'] })")
    assert page.text(LOADER) == "first line\nsecond line"
    after, api = page.save()
    assert "first line" not in str(after) + str(api)
    assert loader_of(after)["widgets_values"] == loader_of(before)["widgets_values"]
    page.load(after)  # what undo does
    assert page.text(LOADER) == "first line\nsecond line"
    assert page.on_node(LOADER, "node.widgets.find((w) => w.name === 'wan_sharded_text').element.readOnly")


def test_status_events_find_their_node_also_in_a_subgraph(look: Look, example: tuple[Any, dict[str, Any]]):
    page, _ = example
    send = "([node, text]) => app.api.dispatchCustomEvent('wan_sharded.status', { node, text })"
    page.page.evaluate(send, ["3", "on the canvas"])
    assert page.text(SAMPLER) == "on the canvas"
    for unknown in ("99", "1:2:3", "3.0.1", "", None):
        page.page.evaluate(send, [unknown, "for nobody"])

    outer = page.page.evaluate("() => app.graph.convertToSubgraph(new Set([app.graph.getNodeById(1)])).node.id")
    inner = page.on_node(LOADER, "node.id")
    page.page.evaluate(send, [f"{outer}:{inner}", "inside a subgraph"])
    assert page.text(LOADER) == "inside a subgraph"
    page.screenshot(f"{look}-subgraph")
    assert page.text(SAMPLER) == "on the canvas"
