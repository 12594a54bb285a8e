"""Take the pictures of the help pages, one of which the README shows as well: each node as a real page shows it.

    .venv/bin/python scripts/help_pictures.py

The loader's GPUs are made up and its placement is the README's (tests/support/example_report.py); everything else is as it is.
"""

import io
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from comfy_browser import ComfyPage, fetch_frontend, open_browser
from comfy_server import ComfyServer, link_pack
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
        link_pack(base / "custom_nodes")
        shutil.copytree(ROOT / "example_workflows" / "input", base / "input")
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
                picture = take(page, node_type, width)
                file = HELP / f"{node_type}.jpg"
                picture.save(file, quality=88, optimize=True)
                print(f"{file.relative_to(ROOT)}: {picture.size}, {file.stat().st_size} bytes")
                page.close()


if __name__ == "__main__":
    main()
