"""Take the pictures of the help pages and of the README: each node, and the example after a run, as a real page shows them.

    .venv/bin/python scripts/help_pictures.py

The GPUs are made up and the loader's placement is the README's (tests/support/example_report.py); everything else is as it is, made with a
tiny random model.
"""

import io
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from comfy_browser import ComfyPage, open_browser
from comfy_server import TINY_MODEL, ComfyServer, prepare_base
from demo import HEIGHT, LENGTH, STEPS, WIDTH, tiny_checkpoint
from frontends import fetch_frontend
from PIL import Image
from setup_env import ROOT

GPUS = ["RTX 5060 Ti 16 GB", "RTX 3060 12 GB"]
# Node -> the template that shows it best, and how wide it is drawn.
NODES = {
    "WanShardedLoader": ("wan_i2v", 560),
    "WanShardedI2VSampler": ("wan_i2v", 460),
    "WanShardedLora": ("wan_i2v_lightx2v_4steps", 460),
    "WanShardedVideoExport": ("wan_i2v", 460),
}
LORAS = [f"wan2.2_i2v_lightx2v_4steps_lora_v1_{level}_noise.safetensors" for level in ("high", "low")]
HELP = ROOT / "js" / "docs" / "images"
EXAMPLE = ROOT / "docs" / "images" / "example-workflow.jpg"
EXAMPLE_WIDTH = 1400
# What the page lays over the canvas.
NOTHING_ELSE = ".graph-canvas-menu, .side-tool-bar-container, .actionbar, .workflow-tabs-container, .p-toast { display: none !important; }"
ALONE = """([type, width]) => {
    const [node] = app.graph._nodes.filter((node) => node.type === type);
    for (const other of [...app.graph._nodes]) if (other !== node) app.graph.remove(other);
    const [, needed] = node.computeSize();
    node.setSize([width, type === "WanShardedLoader" ? needed + 150 : needed]);
    Object.assign(app.canvas.ds, { scale: 1, offset: [80 - node.pos[0], 120 - node.pos[1]] });
    app.canvas.setDirty(true, true);
    const { left, top } = app.canvas.canvas.getBoundingClientRect();
    return { x: left + 80 - 12, y: top + 120 - 58, width: node.size[0] + 24, height: node.size[1] + 70 };
}"""


def example_placement() -> list[Any]:
    """The README's placement, as text and as bars."""
    pack = ModuleType("wan_sharded")
    pack.__path__ = [str(ROOT)]
    sys.modules["wan_sharded"] = pack
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from example_report import example_plan
    from wan_sharded.engine.planning.bars import as_json
    from wan_sharded.engine.reports import plan_bars, plan_report

    plan = example_plan()
    return [plan_report(plan), as_json(plan_bars(plan, own_vae=True))]


def take_example(page: Any) -> Image.Image:
    """The whole example after a run."""
    page.open_template("wan_i2v")
    page.set_values("WanShardedLoader", model=TINY_MODEL)
    page.set_values("WanShardedI2VSampler", width=WIDTH, height=HEIGHT, length=LENGTH, steps=STEPS)
    page.page.evaluate("() => app.queuePrompt(0)")
    page.page.wait_for_function("() => [...document.querySelectorAll('video')].some((video) => video.readyState >= 2)", timeout=120_000)
    page.page.add_style_tag(content=NOTHING_ELSE)
    page.page.evaluate("() => { app.canvas.ds.fitToBounds([-370, 0, 2260, 1110], { zoom: 1 }); app.canvas.setDirty(true, true); }")
    page.page.wait_for_timeout(2500)
    clip = page.page.evaluate(
        "() => { const { scale, offset } = app.canvas.ds, place = app.canvas.canvas.getBoundingClientRect();"
        " return { x: place.left + (offset[0] - 370) * scale, y: place.top + offset[1] * scale, width: 2260 * scale, height: 1110 * scale }; }"
    )
    picture = Image.open(io.BytesIO(page.page.screenshot(clip=clip))).convert("RGB")
    return picture.resize((EXAMPLE_WIDTH, round(EXAMPLE_WIDTH * picture.height / picture.width)), Image.Resampling.LANCZOS)


def save(picture: Image.Image, file: Path) -> None:
    picture.save(file, quality=88, optimize=True)
    print(f"{file.relative_to(ROOT)}: {picture.size}, {file.stat().st_size} bytes")


def take(page: Any, node_type: str, width: int) -> Image.Image:
    """One node, alone on the canvas."""
    page.page.add_style_tag(content=NOTHING_ELSE)
    clip = page.page.evaluate(ALONE, [node_type, width])
    page.page.wait_for_timeout(1500)
    return Image.open(io.BytesIO(page.page.screenshot(clip=clip))).convert("RGB")


def main() -> None:
    HELP.mkdir(exist_ok=True)
    placement = example_placement()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        prepare_base(base, tiny_checkpoint(base / "tiny"))
        for name in LORAS:  # a file that is missing would be framed in red
            (base / "models" / "loras").mkdir(parents=True, exist_ok=True)
            (base / "models" / "loras" / name).touch()
        frontend = fetch_frontend()
        arguments = ["--front-end-root", str(frontend)] if frontend else []
        with ComfyServer(base, extra_arguments=arguments) as server, open_browser() as browser:
            for node_type, (template, width) in NODES.items():
                page = ComfyPage(browser, server.url, gpu_names=GPUS, settings={"Comfy.Minimap.Visible": False})
                page.open_template(template)
                if node_type == "WanShardedLoader":
                    page.set_values(node_type, gpu0_gb=15, gpu1_gb=11)
                    page.on_node(node_type, "node.onExecuted({ text: [argument[0]], placement: [argument[1]] })", placement)
                save(take(page, node_type, width), HELP / f"{node_type}.jpg")
                page.close()
            page = ComfyPage(browser, server.url, gpu_names=GPUS, settings={"Comfy.Minimap.Visible": False})
            save(take_example(page), EXAMPLE)


if __name__ == "__main__":
    main()
