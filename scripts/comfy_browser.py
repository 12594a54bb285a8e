"""Drive ComfyUI's web page in a headless Chromium, with the frontend that came with ComfyUI or a newer one.

    with open_browser() as browser:
        page = ComfyPage(browser, server.url, nodes_2=False)
        page.open_template("wan_i2v")

Used by tests/comfy/test_browser.py and scripts/make_example_workflows.py.
"""

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comfy_server import PACK_NAME
from playwright.sync_api import Browser, Error, Route, sync_playwright
from setup_env import WORK

SCREENSHOTS = WORK / "screenshots"
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
LOADED = "() => !!(window.app?.graph && window.app.extensionManager && window.LiteGraph?.registered_node_types?.WanShardedLoader)"
# Runs inside the page: the nodes of one type on the canvas and in its subgraphs.
FIND_NODES = """(type) => {
    const graphs = [app.graph, ...(app.graph.subgraphs?.values() ?? [])];
    return graphs.flatMap((graph) => graph._nodes ?? graph.nodes).filter((node) => node.type === type);
}"""


class BrowserMissing(Exception):
    """There is no Chromium to drive; the message says how to get one."""


@contextmanager
def open_browser(executable: str | None = None) -> Iterator[Browser]:
    """A headless Chromium: ``executable``, else the one ``CHROMIUM`` names, else the system's, else playwright's own.

    Raises:
        BrowserMissing: none of them is there.
    """
    _keep_priorities_low()
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = executable or os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=CHROMIUM_ARGUMENTS)
        except Error as error:
            remedy = "Install Chromium, or run `python -m playwright install chromium`, or set CHROMIUM to its path."
            raise BrowserMissing(f"no Chromium: {error.message.splitlines()[0]}. {remedy}") from None
        yield browser
        browser.close()


def _keep_priorities_low() -> None:
    """Have root's Chromium, started from here, do without a higher priority than others: on two cores, one that draws takes both."""
    if sys.platform == "linux" and os.geteuid() == 0:
        drop_from_bounding_set, cap_sys_nice = 24, 23  # linux/prctl.h, linux/capability.h
        ctypes.CDLL(None).prctl(drop_from_bounding_set, cap_sys_nice, 0, 0, 0)  # where that is refused, it takes it


class ComfyPage:
    """ComfyUI's page in a tab of its own.

    Args:
        browser: from :func:`open_browser`.
        url: of the server.
        nodes_2: show Nodes 2.0 (Vue) instead of the classic canvas.
        gpu_names: imitate a server that sees these GPUs ("RTX 3060 12 GB"); None leaves the server's own.
        settings: further settings of ComfyUI's frontend.
    """

    def __init__(
        self,
        browser: Browser,
        url: str,
        *,
        nodes_2: bool = False,
        gpu_names: list[str] | None = None,
        settings: dict[str, Any] | None = None,
    ):
        self.url = url.rstrip("/")
        # One context for all tabs: what it cached need not be fetched and compiled again.
        context = browser.contexts[0] if browser.contexts else browser.new_context(viewport={"width": 1700, "height": 1150})
        self.page = context.new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        chosen = {"Comfy.VueNodes.Enabled": nodes_2, "Comfy.TutorialCompleted": True, "Comfy.UseNewMenu": "Top", **(settings or {})}
        self.page.request.post(f"{self.url}/settings", data=chosen)
        if gpu_names is not None:
            self.page.route("**/object_info", imitate_gpus(gpu_names))

    def _go_to(self, query: str) -> None:
        self.page.goto(f"{self.url}/{query}")
        self.page.wait_for_function(LOADED, timeout=120_000)

    def open(self, query: str = "") -> None:
        """Load ComfyUI's page and wait until the pack's nodes are there."""
        self._go_to(query)
        self.page.wait_for_timeout(1500)

    def open_template(self, name: str) -> None:
        """Open an example workflow the way a link to ComfyUI's template browser does."""
        self._go_to(f"?template={name}&source={PACK_NAME}")
        self.page.wait_for_function("() => app.graph._nodes.some((node) => node.type === 'WanShardedLoader')", timeout=60_000)
        self.page.wait_for_timeout(1500)

    def load(self, workflow: dict[str, Any]) -> None:
        """Open a workflow file's content."""
        self.page.evaluate("async (text) => { await app.loadGraphData(JSON.parse(text)); }", json.dumps(workflow))
        self.page.wait_for_timeout(1000)

    def save(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What "Save" and "Export (API)" would write: the UI and the API format."""
        saved = json.loads(self.page.evaluate("async () => JSON.stringify(await app.graphToPrompt())"))
        return saved["workflow"], saved["output"]

    def on_node(self, node_type: str, expression: str, argument: Any = None) -> Any:
        """Evaluate JavaScript with the one node of this type as ``node`` and ``argument`` as ``argument``."""
        script = f"([type, argument]) => {{ const [node] = ({FIND_NODES})(type); return ({expression}); }}"
        return self.page.evaluate(script, [node_type, argument])

    def set_values(self, node_type: str, **values: Any) -> None:
        """Set widgets by name."""
        self.on_node(
            node_type, "Object.entries(argument).forEach(([k, v]) => { node.widgets.find((w) => w.name === k).value = v; })", values
        )

    def text(self, node_type: str) -> str:
        """What the read-only text area of a node says."""
        return self.on_node(node_type, "node.widgets.find((w) => w.name === 'wan_sharded_text').element.value")

    def screenshot(self, name: str) -> Path:
        """Save a picture of the page for people to look at, in a folder git ignores."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.page.screenshot(path=path)
        return path

    def close(self) -> None:
        self.page.close()


def imitate_gpus(names: list[str]) -> Callable[[Route], None]:
    """A route handler that edits ``/object_info`` as a server with these GPUs would have written it."""

    def edit(route: Route) -> None:
        response = route.fetch()
        info = response.json()
        for index in range(8):
            options = info["WanShardedLoader"]["input"]["optional"][f"gpu{index}_gb"][1]
            options.pop("hidden", None)
            options["display_name"] = f"GPU {index}"
            if index < len(names):
                options["display_name"] += f" · {names[index]}"
            else:
                options["hidden"] = True
        route.fulfill(response=response, json=info)

    return edit
