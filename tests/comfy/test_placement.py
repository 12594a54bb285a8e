"""The picture of the placement and the measuring of GPUs, as a server gives them and as its page shows them."""

import json
import urllib.error
from collections.abc import Callable
from typing import Any

import pytest
from comfy_looks import GPUS, LOADER, LOOKS, SAMPLER, Look
from comfy_server import TINY_MODEL, ComfyServer

TWO = GPUS[2]


def gpu_bar(index: int, total: float, limit: float, *, measured: float | None = None, vae: float = 0) -> dict[str, Any]:
    parts = [
        ("cuda", 0.9, False),
        ("transformer", 5.2, False),
        ("fetched", 0.7, False),
        ("activations", 2.9, False),
        ("transformer_2", 1.0, True),
    ]
    return {
        "label": f"GPU {index} · {TWO[index]}", "total_gib": total, "limit_gib": limit, "automatic": False, "taken_gib": 0.5,
        "parts": [{"kind": kind, "gib": gib, "waiting": waiting} for kind, gib, waiting in parts],
        "vae_gib": vae, "measured_gib": measured, "left_out": False,
    }  # fmt: skip


def bars(*, measured: bool) -> list[dict[str, Any]]:
    """What the server says of the machine that README.md has in mind."""
    host = [
        {"kind": kind, "gib": gib, "waiting": waiting} for kind, gib, waiting in [("transformer", 5, False), ("transformer_2", 5, True)]
    ]
    return [
        gpu_bar(0, 15.9, 15, measured=8.7 if measured else None, vae=11.2),
        gpu_bar(1, 12, 11, measured=8.2 if measured else None),
        {
            "label": "system memory", "total_gib": 62.7, "limit_gib": 54, "automatic": True, "taken_gib": 6.7, "parts": host,
            "vae_gib": 0, "measured_gib": None, "left_out": False,
        },
    ]  # fmt: skip


# ---- the server


def refused(server: ComfyServer, body: Any) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.request("/wan_sharded/calibrate", body)
    return caught.value.code, json.loads(caught.value.read())["error"]


def test_gpus_are_named_without_measuring(comfy_server: ComfyServer) -> None:
    assert comfy_server.request("/wan_sharded/gpus") == {"gpus": [], "warnings": []}


def test_a_calibration_measures_and_plans(comfy_server: ComfyServer) -> None:
    answer = comfy_server.request(
        "/wan_sharded/calibrate", {"width": 640, "height": 640, "length": 33, "weight_dtype": "int8", "gpu3_gb": 4}
    )
    (device,) = answer["devices"]
    assert device["label"] == "CPU" and device["block"]["seconds"] > 0
    assert "int8 (computing in bf16), planned for 640x640x33" in answer["plan"]["text"]
    assert [bar["label"] for bar in answer["plan"]["bars"]] == ["CPU"]
    assert answer["plan"]["text"] in answer["text"] and "a block of width" in answer["text"]
    base = str(comfy_server.base_dir)
    assert (
        base not in answer["text"] and str(comfy_server.comfyui) not in answer["text"] and "/" not in answer["text"].replace("TFLOP/s", "")
    )


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"width": "wide"}, "width is 'wide'"),
        ({"length": 0}, "length is 0"),
        ({"height": 100_000}, "height is 100000"),
        ({"weight_dtype": "fp4"}, "weight_dtype is 'fp4'"),
        ({"gpu0_gb": "all"}, "gpu0_gb is 'all'"),
        ({"size": 5}, "size is not known here"),
        ([1], "The body is [1]"),
        (b"{", "The body is no JSON"),
    ],
    ids=str,
)
def test_bad_values_are_named(comfy_server: ComfyServer, body: Any, named: str) -> None:
    status, error = refused(comfy_server, body)
    assert status == 400 and error.startswith(named), error


def test_not_while_a_prompt_runs(comfy_server: ComfyServer, tiny_prompt: dict[str, Any]) -> None:
    with comfy_server.listen() as events:
        queued = comfy_server.queue(tiny_prompt)
        events.wait_for(lambda event: event.kind == "progress" and event.data["prompt_id"] == queued)
        status, error = refused(comfy_server, {})
        comfy_server.interrupt()
        comfy_server.wait(queued)
    assert status == 409 and error.startswith("A prompt is running")


@pytest.fixture
def tiny_prompt() -> dict[str, Any]:
    from setup_env import ROOT

    prompt = json.loads((ROOT / "example_workflows" / "api" / "wan_i2v.json").read_text(encoding="utf-8"))
    prompt["1"]["inputs"]["model"] = TINY_MODEL
    prompt["3"]["inputs"] |= {"width": 128, "height": 96, "length": 17, "steps": 6, "seed": 4711}
    return prompt


def test_a_run_sends_the_placement_twice(comfy_server: ComfyServer, tiny_prompt: dict[str, Any]) -> None:
    """With the loader's output, which history keeps, and after the run for the size that was made."""
    tiny_prompt["3"]["inputs"]["seed"] += 1
    tiny_prompt["1"]["inputs"]["gpu7_gb"] = 3  # not as another test's loader, which ComfyUI would remember
    with comfy_server.listen() as events:
        entry = comfy_server.run(tiny_prompt)
        (sent,) = events.of("wan_sharded.placement")
    ((planned,),) = [entry["outputs"]["1"]["placement"]]
    assert [bar["label"] for bar in planned] == ["CPU"]
    assert sent.data["node"] == "1"
    (made,) = sent.data["bars"]
    kinds = {part["kind"]: part["gib"] for part in made["parts"]}
    assert kinds["activations"] < {part["kind"]: part["gib"] for part in planned[0]["parts"]}["activations"]


def test_a_loader_from_the_cache_shows_the_run(comfy_server: ComfyServer, tiny_prompt: dict[str, Any]) -> None:
    """ComfyUI remembers the handle that an equal loader of another workflow made; the placement still goes to the loader of this one."""
    tiny_prompt["1"]["inputs"]["gpu7_gb"] = 4
    comfy_server.run(tiny_prompt)
    other = {("57:1" if key == "1" else key): value for key, value in tiny_prompt.items()}
    other["3"]["inputs"] |= {"model": ["57:1", 0], "seed": 4713}
    with comfy_server.listen() as events:
        comfy_server.run(other)
        cached = [event.data["nodes"] for event in events.of("execution_cached")]
        texts = [event.data for event in events.of("wan_sharded.status") if event.data["node"] != "3"]
        (placement,) = events.of("wan_sharded.placement")
    assert any("57:1" in nodes for nodes in cached)
    assert {text["node"] for text in texts} == {placement.data["node"]} == {"57:1"}
    assert "high noise expert" in texts[-1]["text"], "all there is on this node: ComfyUI sends nothing of a loader that it does not run"


# ---- the page


ELEMENT = "node.widgets.find((w) => w.name === 'wan_sharded_placement').element"


def seen(page: Any) -> list[str]:
    """What the picture says to a screen reader, bar by bar."""
    return page.on_node(LOADER, f"[...{ELEMENT}.querySelectorAll('[role=group]')].map((row) => row.getAttribute('aria-label'))")


def pieces(page: Any, row: int) -> list[str]:
    return page.on_node(
        LOADER, f"[...{ELEMENT}.querySelectorAll('[role=group]')[{row}].querySelectorAll('[role=img]')].map((p) => p.title)"
    )


def widget_values(page: Any) -> list[Any]:
    (node,) = [node for node in page.save()[0]["nodes"] if node["type"] == LOADER]
    return node["widgets_values"]


MEASURED = [
    f"GPU 0 · {TWO[0]}, 10.7 of 15.0 GiB · peak 8.7",
    f"GPU 1 · {TWO[1]}, 10.7 of 11.0 GiB · peak 8.2",
    "System memory, 10.0 of 54.0 GiB",
]


@pytest.mark.browser
@pytest.mark.slow
def test_the_picture(look: Look, open_page: Callable[..., Any]) -> None:
    name = f"placement-{look}"
    page = open_page(gpus=2)
    page.open_template("wan_i2v")
    before = widget_values(page)
    assert len(before) == 17 and seen(page) == []
    page.screenshot(f"{name}-empty")

    page.on_node(LOADER, "node.onExecuted({ text: ['planned'], placement: [argument] })", bars(measured=False))
    assert [row.split(" · peak")[0] for row in MEASURED] == seen(page)
    send = "([node, bars]) => app.api.dispatchCustomEvent('wan_sharded.placement', { node, bars })"
    page.page.evaluate(send, ["1", bars(measured=True)])
    assert seen(page) == MEASURED
    assert pieces(page, 0) == [
        "CUDA itself: 0.9 GiB", "High noise expert: 5.2 GiB", "Blocks being fetched: 0.7 GiB", "Activations: 2.9 GiB",
        "Low noise expert, waiting: 1.0 GiB", "Free for this pack: 4.3 GiB", "Above the limit: 0.4 GiB", "Other programs: 0.5 GiB",
        "VAE, in its turn: 11.2 GiB", "Slider: 15.0 GiB", "Measured peak: 8.7 GiB",
    ]  # fmt: skip
    page.page.wait_for_timeout(500)
    page.screenshot(f"{name}-measured")
    limit, bar = page.page.evaluate(
        "() => [document.querySelector('[data-mark=limit]'), document.querySelector('[data-mark=limit]').parentElement].map((e) => { const r = e.getBoundingClientRect(); return [r.left + r.width / 2, r.width, r.left]; })"
    )
    assert (limit[0] - bar[2]) / bar[1] == pytest.approx(15 / 15.9, abs=0.01)
    inside = page.page.evaluate(
        "() => { const e = document.querySelector('[data-mark=limit]').closest('[aria-label=\"Memory of each GPU\"]'); return [e.scrollHeight, e.clientHeight]; }"
    )
    assert inside[0] <= inside[1] + 1, "the picture is cut off"

    assert widget_values(page) == before
    workflow, prompt = page.save()
    assert not [
        name for name in prompt["1"]["inputs"] if name.startswith("wan_sharded") or "Measure" in name
    ] and "measured" not in json.dumps(workflow)
    page.load(workflow)
    assert seen(page) == MEASURED, "lost when the graph was loaded again"
    page.open()
    page.load(workflow)
    assert seen(page) == MEASURED, "lost when the page was loaded again"
    assert page.text(LOADER) == "planned"
    page.on_node(LOADER, "node.onExecuted({ text: ['does not fit'], placement: [[]] })")
    assert seen(page) == []


@pytest.mark.browser
@pytest.mark.slow
def test_the_button_measures(look: Look, open_page: Callable[..., Any]) -> None:
    page = open_page(gpus=2, **{"Comfy.ColorPalette": "light"})
    page.open_template("wan_i2v")
    page.set_values(LOADER, weight_dtype="int8")
    page.set_values(SAMPLER, width=640, height=640, length=33)
    before = widget_values(page)
    if look.nodes_2:
        page.page.get_by_role("button", name="Measure GPUs").click()
    else:
        page.on_node(LOADER, "node.widgets.find((w) => w.type === 'button').callback()")
    page.page.wait_for_function("() => document.querySelector('[data-kind=activations]')", timeout=60_000)
    text = page.text(LOADER)
    assert "a block of width" in text and "int8 (computing in bf16), planned for 640x640x33" in text
    assert seen(page)[0].startswith("CPU, ")
    assert widget_values(page) == before
    page.screenshot(f"placement-light-{look}")


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("look", LOOKS[:1], ids=str)
def test_the_button_says_why_not(open_page: Callable[..., Any]) -> None:
    page = open_page(gpus=2)
    page.open_template("wan_i2v")
    page.set_values(SAMPLER, length=100_001)
    page.on_node(LOADER, "node.widgets.find((w) => w.type === 'button').callback()")
    page.page.wait_for_function("() => [...document.querySelectorAll('textarea')].some((a) => a.value.includes('could not be measured'))")
    assert page.text(LOADER) == "The GPUs could not be measured: length is 100001; Wan takes 1 to 4093."
