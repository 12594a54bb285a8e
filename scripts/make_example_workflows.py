"""Build the example workflows in a real browser and save them as ComfyUI's frontend would.

Run it after a change of the node contract, in the environment of `make test`:

    .venv/bin/python scripts/make_example_workflows.py

Writes, for each example, ``example_workflows/<name>.json`` (what the user opens), ``<name>.jpg`` (its picture in the
template browser) and ``api/<name>.json`` (the same for the API queue); and ``subgraphs/<name>.json``, the blueprints in ComfyUI's node
library. The oldest supported frontend should write them: newer ones read what it wrote, not the other way round. The server sees no
GPU, so that no GPU's name gets into the files.
"""

import argparse
import io
import json
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfy_browser import ComfyPage, open_browser
from comfy_server import ComfyServer, link_pack
from PIL import Image
from playwright.sync_api import Page
from setup_env import ROOT

FOLDER = ROOT / "example_workflows"
BLUEPRINTS = ROOT / "subgraphs"
MODEL = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
# Files of ComfyUI's own Wan 2.2 template: folder in models -> names -> repository; and where in a repository each folder is.
_WAN21, _WAN22 = "Comfy-Org/Wan_2.1_ComfyUI_repackaged", "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
HIGH, LOW = (f"wan2.2_i2v_{level}_noise_14B_fp8_scaled.safetensors" for level in ("high", "low"))
HIGH_LORA, LOW_LORA = (f"wan2.2_i2v_lightx2v_4steps_lora_v1_{level}_noise.safetensors" for level in ("high", "low"))
UMT5, VAE = "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan_2.1_vae.safetensors"
MODEL_FILES = {
    "diffusion_models": {HIGH: _WAN22, LOW: _WAN22},
    "text_encoders": {UMT5: _WAN21},
    "vae": {VAE: _WAN22},
    "loras": {HIGH_LORA: _WAN22, LOW_LORA: _WAN22},
}
PROMPT = "The camera slowly moves closer. Gentle, natural motion, soft cinematic light."
PROMPT_2 = "The camera moves on, past where it was. Gentle, natural motion, soft cinematic light."
THUMBNAIL_WIDTH = 768
THUMBNAIL_MAX_BYTES = 100_000
SETTINGS = {"Comfy.Minimap.Visible": False}
# The page's own furniture, which may float above the nodes.
HIDE_MENUS = ".graph-canvas-menu, .side-tool-bar-container, .actionbar, .workflow-tabs-container, .p-toast { display: none !important; }"

NOTE_I2V = """## A photo becomes a video

1. Choose a photo in **Photo**.
2. Describe in **positive** what should happen.
3. Press **Run**.

The default **model** is downloaded on the first run (126 GB). Have it already? Choose its folder.

Out of memory on a GPU? Lower its slider. 0 is automatic, -1 leaves the GPU out."""

NOTE_FIRST_LAST = """## Two photos become a video

1. Choose how it begins in **First frame**, and how it ends in **Last frame**. Pictures of the same shape work best.
2. Describe in **positive** what happens between them.
3. Press **Run**.

Out of memory on a GPU? Lower its slider. 0 is automatic, -1 leaves the GPU out."""

NOTE_4_STEPS = """## A video in four steps

With the files of ComfyUI's own Wan 2.2 I2V template. ComfyUI offers to download those that are missing; they belong into

- `models/diffusion_models`: both experts
- `models/loras`: both LoRAs
- `models/text_encoders` and `models/vae`

1. Choose a photo in **Photo**.
2. Describe in **positive** what should happen.
3. Press **Run**.

The LoRAs are made for 4 steps at **cfg** 1 with *euler*, the experts changing after 2. Without the LoRA node: 20 steps, **cfg** 3.5, *unipc* and **switch_step** 0.

Other files, also GGUF? Choose them in the loader.

Out of memory on a GPU? Lower its slider. 0 is automatic, -1 leaves the GPU out."""


NOTE_CORE = """## With ComfyUI's own text encoder and VAE nodes

The texts come from two **CLIP Text Encode** nodes and the VAE from **Load VAE**. So other packs' text nodes, and encoders that this pack can't read (GGUF), can take part. What is connected replaces the texts and the VAE of the loader.

1. Choose a photo in **Photo**.
2. Describe in **Positive** what should happen.
3. Press **Run**.

ComfyUI offers to download files that are missing. It manages the memory of these nodes; the loader's sliders do not count it.

Out of memory on a GPU? Lower its slider. 0 is automatic, -1 leaves the GPU out."""

NOTE_LONG = """## A longer video, clip after clip

The last frame of **First clip** is the first frame of **Second clip**. The frame that both have is dropped, and **Batch Images** joins them: 161 frames, 10 seconds.

1. Choose a photo in **Photo**.
2. Describe in **positive** of each clip what should happen in it. Both must have the same **width** and **height**.
3. Press **Run**.

**Last frame** takes frame 4095, which means the last one, however long the clip is. For a third clip, copy **Last frame**, **Second clip**, **Without its first frame** and **Joined**, and go on from there.

Each clip knows only one frame of the one before, so motion may change its speed at the seam, and colours drift with every clip.

Out of memory on a GPU? Lower its slider. 0 is automatic, -1 leaves the GPU out."""


@dataclass(frozen=True)
class Node:
    """One node of an example: where it stands, what differs from its defaults, what its inputs are linked to, and whose files it needs.

    ``models`` names folders of :data:`MODEL_FILES`; the frontend offers to download what is missing there.
    """

    type: str
    pos: tuple[int, int]
    size: tuple[int, int]
    title: str = ""
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    links: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    models: tuple[str, ...] = ()

    def described(self) -> dict[str, Any]:
        """For the page; ``models`` as the frontend wants them in a node's properties."""
        files = [(folder, name, repository) for folder in self.models for name, repository in MODEL_FILES[folder].items()]
        models = [
            {"name": name, "url": f"https://huggingface.co/{repository}/resolve/main/split_files/{folder}/{name}", "directory": folder}
            for folder, name, repository in files
        ]
        return {**vars(self), "models": models}


def example(first_title: str, note: str, last_frame: bool) -> dict[str, Node]:
    """The graph as a name -> :class:`Node` table; ids are given in this order."""
    sampler_links = {"model": ("loader", "model"), "image": ("image", "IMAGE")}
    nodes = {
        "loader": Node("WanShardedLoader", (40, 60), (420, 740), values={"model": MODEL}),
        "image": Node("LoadImage", (520, 150), (340, 340), first_title, {"image": "wan_sharded_example.jpg"}),
        "sampler": Node("WanShardedI2VSampler", (920, 60), (420, 880), values={"positive": PROMPT}, links=sampler_links),
        "export": Node("WanShardedVideoExport", (1400, 60), (420, 480), links={"images": ("sampler", "frames")}),
        "note": Node("MarkdownNote", (-340, 60), (320, 420), "How to use", values={"": note}),
    }
    if last_frame:
        nodes["last"] = Node("LoadImage", (520, 560), (340, 340), "Last frame", {"image": "wan_sharded_example_last.jpg"})
        sampler_links["last_image"] = ("last", "IMAGE")
    return nodes


def four_steps() -> dict[str, Node]:
    """ComfyUI's single files, with the LoRAs for 4 steps."""
    files = {"model": "single files", "high_noise_model": HIGH, "low_noise_model": LOW, "text_encoder": UMT5, "vae": VAE}
    loras = {"high_noise_lora": HIGH_LORA, "low_noise_lora": LOW_LORA}
    values = {"positive": PROMPT, "width": 640, "height": 640, "steps": 4, "cfg": 1, "sampler_name": "euler", "switch_step": 2}
    sampler_links = {"model": ("lora", "model"), "image": ("image", "IMAGE")}
    loaded = ("diffusion_models", "text_encoders", "vae")
    return {
        "loader": Node("WanShardedLoader", (40, 60), (420, 740), values=files, models=loaded),
        "image": Node("LoadImage", (520, 490), (380, 340), "Photo", {"image": "wan_sharded_example.jpg"}),
        "lora": Node("WanShardedLora", (520, 60), (380, 340), values=loras, links={"model": ("loader", "model")}, models=("loras",)),
        "sampler": Node("WanShardedI2VSampler", (960, 60), (420, 880), values=values, links=sampler_links),
        "export": Node("WanShardedVideoExport", (1440, 60), (420, 480), links={"images": ("sampler", "frames")}),
        "note": Node("MarkdownNote", (-340, 60), (320, 640), "How to use", values={"": NOTE_4_STEPS}),
    }


def core_text_and_vae(negative: str) -> dict[str, Node]:
    """ComfyUI's nodes for the texts and the VAE; ``negative`` as the sampler has it by default."""
    files = {"model": "single files", "high_noise_model": HIGH, "low_noise_model": LOW}
    links = {
        "model": ("loader", "model"),
        "image": ("image", "IMAGE"),
        "positive_conditioning": ("positive", "CONDITIONING"),
        "negative_conditioning": ("negative", "CONDITIONING"),
        "vae": ("vae", "VAE"),
    }
    clip = {"clip": ("clip", "CLIP")}
    return {
        "loader": Node("WanShardedLoader", (40, 60), (420, 740), values=files, models=("diffusion_models",)),
        "clip": Node("CLIPLoader", (520, 60), (380, 110), values={"clip_name": UMT5, "type": "wan"}, models=("text_encoders",)),
        "positive": Node("CLIPTextEncode", (520, 220), (380, 130), "Positive", {"text": PROMPT}, clip),
        "negative": Node("CLIPTextEncode", (520, 400), (380, 150), "Negative", {"text": negative}, clip),
        "vae": Node("VAELoader", (520, 600), (380, 60), values={"vae_name": VAE}, models=("vae",)),
        "image": Node("LoadImage", (520, 710), (380, 340), "Photo", {"image": "wan_sharded_example.jpg"}),
        "sampler": Node("WanShardedI2VSampler", (960, 60), (420, 880), links=links),
        "export": Node("WanShardedVideoExport", (1440, 60), (420, 480), links={"images": ("sampler", "frames")}),
        "note": Node("MarkdownNote", (-340, 60), (320, 560), "How to use", values={"": NOTE_CORE}),
    }


def long_video() -> dict[str, Node]:
    """Two clips, the second from the last frame of the first."""
    first = {"model": ("loader", "model"), "image": ("image", "IMAGE")}
    second = {"model": ("loader", "model"), "image": ("last", "IMAGE")}
    last_frame, all_but_the_first = {"batch_index": 4095, "length": 1}, {"batch_index": 1, "length": 4096}
    joined = {"image1": ("first", "frames"), "image2": ("rest", "IMAGE")}
    return {
        "loader": Node("WanShardedLoader", (40, 60), (420, 740), values={"model": MODEL}),
        "image": Node("LoadImage", (-360, 60), (340, 340), "Photo", {"image": "wan_sharded_example.jpg"}),
        "first": Node("WanShardedI2VSampler", (520, 60), (420, 880), "First clip", {"positive": PROMPT}, first),
        "last": Node("ImageFromBatch", (1000, 60), (300, 110), "Last frame", last_frame, {"image": ("first", "frames")}),
        "second": Node("WanShardedI2VSampler", (1360, 60), (420, 880), "Second clip", {"positive": PROMPT_2}, second),
        "rest": Node(
            "ImageFromBatch", (1840, 60), (420, 110), "Without its first frame", all_but_the_first, {"image": ("second", "frames")}
        ),
        "joined": Node("ImageBatch", (1840, 230), (420, 60), "Joined", links=joined),
        "export": Node("WanShardedVideoExport", (1840, 350), (420, 480), links={"images": ("joined", "IMAGE")}),
        "note": Node("MarkdownNote", (1000, 230), (300, 710), "How to use", values={"": NOTE_LONG}),
    }


def examples(negative: str) -> dict[str, dict[str, Node]]:
    """All of them by name. New ones come last: the number of an example is part of its id."""
    return {
        "wan_i2v": example("Photo", NOTE_I2V, last_frame=False),
        "wan_first_last_frame": example("First frame", NOTE_FIRST_LAST, last_frame=True),
        "wan_i2v_lightx2v_4steps": four_steps(),
        "wan_i2v_core_text_vae": core_text_and_vae(negative),
        "wan_i2v_long": long_video(),
    }


BUILD = """async ([workflowId, nodes]) => {
    const blank = { id: workflowId, revision: 0, last_node_id: 0, last_link_id: 0, nodes: [], links: [], groups: [], config: {}, extra: {}, version: 0.4 };
    await app.loadGraphData(blank);
    const made = {};
    for (const [name, spec] of Object.entries(nodes)) {
        const node = made[name] = LiteGraph.createNode(spec.type);
        app.graph.add(node);
        if (spec.title) node.title = spec.title;
        if (spec.models.length) node.properties.models = spec.models;
        for (const [widgetName, value] of Object.entries(spec.values)) {
            const widget = node.widgets.find((w) => w.name === widgetName) ?? node.widgets[0];
            widget.value = value;
            if (spec.type === "LoadImage") widget.callback?.(value);
        }
    }
    for (const [name, spec] of Object.entries(nodes)) {
        for (const [input, [origin, output]] of Object.entries(spec.links)) {
            made[origin].connect(made[origin].findOutputSlot(output), made[name], made[name].findInputSlot(input));
        }
    }
    await new Promise((done) => setTimeout(done, 1500));  // pictures load and may resize their nodes
    for (const [name, spec] of Object.entries(nodes)) {
        made[name].pos = spec.pos;
        made[name].setSize(spec.size);
    }
    const left = Math.min(...Object.values(nodes).map((spec) => spec.pos[0]));
    const right = Math.max(...Object.values(nodes).map((spec) => spec.pos[0] + spec.size[0]));
    const scale = Math.min(0.8, 1560 / (right - left));
    Object.assign(app.canvas.ds, { scale, offset: [90 / scale - left, 210] });  // right of the sidebar
    app.canvas.setDirty(true, true);
    await new Promise((done) => setTimeout(done, 1500));
    const { workflow, output } = await app.graphToPrompt();
    return JSON.stringify({ workflow, output });  // drops what is undefined, as saving does
}"""


@dataclass(frozen=True)
class Blueprint:
    """Nodes of an example that become one, and their widgets that it shows, as ``(node, widget)``."""

    example: str
    nodes: tuple[str, ...]
    widgets: tuple[tuple[str, str], ...]


_SHOWN = tuple(("sampler", name) for name in ("positive", "width", "height", "length", "steps", "seed"))
_FILES = tuple(("loader", name) for name in ("high_noise_model", "low_noise_model"))
BLUEPRINT_NODES = {
    "Wan I2V on all GPUs": Blueprint("wan_i2v", ("loader", "sampler"), (("loader", "model"), *_SHOWN)),
    "Wan I2V in 4 steps on all GPUs": Blueprint("wan_i2v_lightx2v_4steps", ("loader", "lora", "sampler"), (*_FILES, *_SHOWN)),
}
# Nodes are found by their place in the example, which gave them their ids.
COLLAPSE = """([title, ids, widgets]) => {
    const items = new Set(ids.map((id) => app.graph.getNodeById(id)));
    const { node } = app.graph.convertToSubgraph(items);
    node.title = node.subgraph.name = title;
    node.properties.proxyWidgets = widgets.map(([id, name]) => [String(id), name]);
    node.setSize([420, node.computeSize()[1]]);
    app.canvas.selectItems([node]);
}"""

# Boxes in screen pixels, titles included, around everything on the canvas.
BOUNDS = """() => {
    const { scale, offset } = app.canvas.ds;
    const { left, top } = app.canvas.canvas.getBoundingClientRect();
    const boxes = app.graph._nodes.map((n) => [n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]);
    const low = (i) => Math.min(...boxes.map((b) => b[i])), high = (i) => Math.max(...boxes.map((b) => b[i]));
    const x = (value) => left + (value + offset[0]) * scale, y = (value) => top + (value + offset[1]) * scale;
    return [x(low(0)), y(low(1)), x(high(2)), y(high(3))];
}"""


def thumbnail(page: Page) -> bytes:
    """A JPEG of the nodes on the canvas, below :data:`THUMBNAIL_MAX_BYTES`."""
    x0, y0, x1, y1 = page.evaluate(BOUNDS)
    margin = 20
    clip = {"x": max(x0 - margin, 0), "y": max(y0 - margin, 0), "width": x1 - x0 + 2 * margin, "height": y1 - y0 + 2 * margin}
    page.add_style_tag(content=HIDE_MENUS)
    picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    picture = picture.resize((THUMBNAIL_WIDTH, round(THUMBNAIL_WIDTH * picture.height / picture.width)), Image.Resampling.LANCZOS)
    for quality in range(90, 20, -5):
        jpeg = io.BytesIO()
        picture.save(jpeg, "JPEG", quality=quality, optimize=True)
        if jpeg.tell() < THUMBNAIL_MAX_BYTES:
            break
    return jpeg.getvalue()


def as_json(value: Any) -> str:
    """JSON as committed: readable, UTF-8, the same at each run."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_examples(page: Page, negative: str) -> None:
    """Build every example in an open page and write its three files."""
    (FOLDER / "api").mkdir(parents=True, exist_ok=True)
    for number, (name, nodes) in enumerate(examples(negative).items(), start=1):
        workflow_id = f"00000000-0000-4000-8000-{number:012d}"
        saved = json.loads(page.evaluate(BUILD, [workflow_id, {key: node.described() for key, node in nodes.items()}]))
        (FOLDER / f"{name}.json").write_text(as_json(saved["workflow"]), encoding="utf-8")
        (FOLDER / "api" / f"{name}.json").write_text(as_json(saved["output"]), encoding="utf-8")
        (FOLDER / f"{name}.jpg").write_bytes(thumbnail(page))
        print(f"{name}: {len(saved['workflow']['nodes'])} nodes")


def write_blueprints(tab: ComfyPage, user_folder: Path, negative: str) -> None:
    """Have the page publish each blueprint, as its menu does, and keep the files, with the same ids at each run."""
    BLUEPRINTS.mkdir(exist_ok=True)
    for number, (title, blueprint) in enumerate(BLUEPRINT_NODES.items(), start=1):
        nodes = examples(negative)[blueprint.example]
        ids = {name: place for place, name in enumerate(nodes, start=1)}
        tab.page.evaluate(BUILD, [f"00000000-0000-4000-9000-{number:012d}", {key: node.described() for key, node in nodes.items()}])
        widgets = [(ids[node], widget) for node, widget in blueprint.widgets]
        tab.page.evaluate(COLLAPSE, [title, [ids[name] for name in blueprint.nodes], widgets])
        tab.page.evaluate("() => { app.extensionManager.command.execute('Comfy.PublishSubgraph'); }")
        name = tab.page.locator(".p-dialog input").first
        name.fill(title)
        name.press("Enter")
        tab.page.wait_for_timeout(3000)  # the page saves it on the server
        published = json.loads((user_folder / "subgraphs" / f"{title}.json").read_text(encoding="utf-8"))
        text = as_json(published)
        for place, uuid in enumerate(dict.fromkeys(re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", text))):
            text = text.replace(uuid, f"00000000-0000-4000-a000-{number:08d}{place:04d}")
        (BLUEPRINTS / f"{title}.json").write_text(text, encoding="utf-8")
        print(f"{title}: {len(blueprint.nodes)} nodes, {len(blueprint.widgets)} widgets")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--browser", help="the Chromium to use")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        link_pack(Path(base, "custom_nodes"))
        shutil.copytree(FOLDER / "input", Path(base, "input"))
        for folder, names in MODEL_FILES.items():
            for name in names:  # only to be choices
                file = Path(base, "models", folder, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
        with ComfyServer(Path(base), environment={"CUDA_VISIBLE_DEVICES": ""}) as server, open_browser(arguments.browser) as browser:
            tab = ComfyPage(browser, server.url, settings=SETTINGS)
            tab.open()
            sampler = server.object_info("WanShardedI2VSampler")["WanShardedI2VSampler"]
            negative = sampler["input"]["required"]["negative"][1]["default"]
            write_examples(tab.page, negative)
            write_blueprints(tab, Path(base, "user", "default"), negative)


if __name__ == "__main__":
    main()
