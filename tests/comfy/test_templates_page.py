"""Every example workflow dropped on ComfyUI's page and run there with tiny models, and a slider moved by hand; in two frontends, each with the
classic canvas and with Nodes 2.0."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from comfy_looks import LOADER, LOOKS, SAMPLER, Look, press_run, wait_for_success, wait_for_video, watch_progress
from comfy_server import TINY_MODEL, ComfyServer
from example_files import CORE, FOUR_STEPS, LONG, NAMES, api_workflow, named_model_files, ui_workflow
from frontends import BUNDLED, NEW_FRONTEND

pytestmark = [pytest.mark.browser, pytest.mark.slow]

DROP_TEXT = """([name, text]) => {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([text], name, { type: "application/json" }));
    app.graph.clear();
    app.canvas.canvas.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
}"""
# On every node of a type, because some examples have two samplers.
SET_ALL = """([type, values]) => {
    for (const node of app.graph._nodes.filter((node) => node.type === type))
        for (const [name, value] of Object.entries(values)) node.widgets.find((w) => w.name === name).value = value;
}"""
# The node is drawn high enough for its video; its size alone may be right already, and the canvas still show the one before.
VIDEO_INSIDE = """(nodes2) => {
    const [node] = app.graph._nodes.filter((node) => node.type === "WanShardedVideoExport");
    const video = document.querySelector("video").getBoundingClientRect(), { scale, offset } = app.canvas.ds;
    const end = nodes2
        ? document.querySelector(`[data-node-id='${node.id}']`).getBoundingClientRect().bottom
        : app.canvas.canvas.getBoundingClientRect().top + (node.boundingRect[1] + node.boundingRect[3] + offset[1]) * scale;
    return video.height > 0 && video.bottom <= end + 1;
}"""
# Where the classic canvas has drawn a widget: left, top, width and height on the screen.
DRAWN = """(name) => {
    const [node] = app.graph._nodes.filter((node) => node.type === "WanShardedLoader");
    const widget = node.widgets.find((w) => w.name === name), { scale, offset } = app.canvas.ds;
    const place = app.canvas.canvas.getBoundingClientRect();
    const [left, top] = [node.pos[0] + offset[0], node.pos[1] + (widget.last_y ?? widget.y) + offset[1]];
    return [place.left + left * scale, place.top + top * scale, node.size[0] * scale, LiteGraph.NODE_WIDGET_HEIGHT * scale];
}"""


@pytest.fixture(scope="module")
def page_with_files(
    kept_page: Callable[[Look], Any], server_with: Callable[[str], ComfyServer], tiny_single_files: Path
) -> Iterator[Callable[[Look], Any]]:
    """A tab of each look, of a server that has the files which the examples name."""
    with ExitStack() as files:
        for frontend in (BUNDLED, NEW_FRONTEND):
            files.enter_context(named_model_files(server_with(frontend).base_dir / "models", tiny_single_files))
        yield kept_page


def drop(page: Any, name: str, workflow: dict[str, Any]) -> None:
    page.page.evaluate(DROP_TEXT, [f"{name}.json", json.dumps(workflow)])
    page.page.wait_for_function("(count) => app.graph._nodes.length === count", arg=len(workflow["nodes"]), timeout=20_000)
    page.page.wait_for_timeout(500)


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_example_is_what_it_says_and_runs(name: str, look: Look, page_with_files: Callable[[Look], Any]) -> None:
    page, workflow = page_with_files(look), ui_workflow(name)
    drop(page, name, workflow)
    page.screenshot(f"{look}-dropped-{name}")
    _, prompt = page.save()
    expected = api_workflow(name)
    assert {key: node["inputs"] for key, node in prompt.items()} == {key: node["inputs"] for key, node in expected.items()}

    for node in workflow["nodes"]:
        if node["type"] == "CLIPLoader":  # core's own takes no text encoder of another size than the real one
            node["type"] = "TinyCoreClip"
    if name == CORE:
        drop(page, name, workflow)
    if name != FOUR_STEPS:  # which has files of its own
        page.set_values(LOADER, model=TINY_MODEL)
    small = {"width": 64, "height": 48, "length": 9, "steps": 4, "seed": 1000 + 10 * NAMES.index(name) + LOOKS.index(look)}
    page.page.evaluate(SET_ALL, [SAMPLER, small])
    watch_progress(page)
    press_run(page)
    wait_for_success(page)
    assert wait_for_video(page) == [64, 48]
    page.page.wait_for_function(VIDEO_INSIDE, arg=look.nodes_2, timeout=10_000)
    seen = page.page.evaluate("() => window.seen")
    assert seen["progress"] >= (8 if name == LONG else 4) and seen["preview"] >= 1
    page.screenshot(f"{look}-ran-{name}")


def test_a_slider_moved_by_hand(look: Look, page_with_files: Callable[[Look], Any]) -> None:
    """By dragging, in both; by its number and from the keyboard, in Nodes 2.0. What is shown, and what is queued, is half a GiB's multiple."""
    page = page_with_files(look)
    page.page.bring_to_front()
    drop(page, "wan_i2v", ui_workflow("wan_i2v"))
    mouse = page.page.mouse
    if look.nodes_2:
        handle = page.page.locator("[data-node-id='1'] [role=slider]").first
        box = handle.bounding_box()
        track = handle.locator("..").bounding_box()
        start, end = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2), track["x"] + track["width"] / 2
    else:
        left, top, width, height = page.page.evaluate(DRAWN, "gpu0_gb")
        start, end = (left + width * 0.1, top + height / 2), left + width / 2
    mouse.move(*start)
    mouse.down()
    for step in range(1, 6):
        page.page.wait_for_timeout(50)  # the canvas looks at the pointer once a frame
        mouse.move(start[0] + (end - start[0]) * step / 5, start[1])
    mouse.up()
    value = queued_slider(page)
    assert value == pytest.approx(7.5, abs=2) and value % 0.5 == 0  # about the middle of -1 to 16
    if look.nodes_2:
        number = page.page.locator("[data-node-id='1'] input[aria-label='gpu0_gb']")
        assert float(number.input_value()) == value
        handle.focus()
        page.page.keyboard.press("ArrowRight")
        page.page.keyboard.press("ArrowRight")
        assert queued_slider(page) == value + 1
        number.click(click_count=3)
        page.page.keyboard.type("12.5")
        page.page.keyboard.press("Tab")
        assert queued_slider(page) == 12.5
    page.screenshot(f"{look}-slider-by-hand")


def queued_slider(page: Any) -> float:
    """GPU 0's limit as it would be queued."""
    page.page.wait_for_timeout(300)
    return page.save()[1]["1"]["inputs"]["gpu0_gb"]
