"""The nodes' texts and help pages in the languages the pack has, as ComfyUI serves them and as its page shows them."""

from collections.abc import Callable
from typing import Any

import pytest
from comfy_server import PACK_NAME, ComfyServer
from frontends import NEW_FRONTEND, fetch_frontend
from make_locales import read_locale

NODES = ("WanShardedLoader", "WanShardedLora", "WanShardedI2VSampler", "WanShardedVideoExport")
GPU = "RTX 5060 Ti 16 GB"


def read_page(server: ComfyServer, path: str) -> str:
    page = server.request(path)
    return page.decode("utf-8") if isinstance(page, bytes) else page


@pytest.mark.parametrize("language", ["en", "zh"])
def test_translations_are_served(comfy_server: ComfyServer, language: str) -> None:
    served = comfy_server.request("/i18n")[language]["nodeDefs"]
    assert {node_id: served[node_id] for node_id in NODES} == read_locale(language)


@pytest.mark.parametrize("node_id", NODES)
def test_help_pages_are_where_the_page_looks(comfy_server: ComfyServer, node_id: str) -> None:
    """The page asks for the language's own file first, and where there is none for the one without a language."""
    docs = f"/extensions/{PACK_NAME}/docs"
    for path, language in ((f"{docs}/{node_id}/zh.md", "zh"), (f"{docs}/{node_id}.md", "en")):
        assert read_page(comfy_server, path).startswith(f"# {read_locale(language)[node_id]['display_name']}\n")


@pytest.mark.browser
@pytest.mark.slow
def test_a_chinese_page_shows_them(start_comfy_server: Callable[..., ComfyServer]) -> None:
    """Titles, labels and outputs are Chinese; a GPU's slider still has the card's name; a saved file is what it always was.

    In a new frontend only: 1.32, the one of ComfyUI 0.3.75, loads its own Chinese over that of the packs.
    """
    comfy_browser = pytest.importorskip("comfy_browser", reason="playwright is not installed")
    root = fetch_frontend()
    if root is None:
        pytest.skip(f"frontend {NEW_FRONTEND} could not be downloaded")
    # A server of its own: ComfyUI keeps the language for all that follows.
    server = start_comfy_server(extra_arguments=["--front-end-root", str(root)])
    try:
        with comfy_browser.open_browser() as browser:
            for nodes_2 in (False, True):
                page = comfy_browser.ComfyPage(browser, server.url, nodes_2=nodes_2, gpu_names=[GPU], settings={"Comfy.Locale": "zh"})
                page.open_template("wan_i2v")
                page.screenshot(f"chinese-{'nodes2' if nodes_2 else 'classic'}")
                check_chinese(page)
                page.close()
    except comfy_browser.BrowserMissing as error:
        pytest.skip(str(error))


def check_chinese(page: Any) -> None:
    chinese, workflow = read_locale("zh"), page.save()[0]
    nodes = [node for node in workflow["nodes"] if node["type"] in NODES]
    assert len(nodes) >= 3
    for node in nodes:
        kind, texts = node["type"], chinese[node["type"]]
        assert page.page.evaluate("(type) => LiteGraph.registered_node_types[type].title", kind) == texts["display_name"]
        labels = page.on_node(kind, "node.widgets.filter((w) => !w.hidden).map((w) => [w.name, w.label])")
        shown = {name: label for name, label in labels if name in texts["inputs"]}
        assert shown == {name: f"GPU 0 · {GPU}" if name == "gpu0_gb" else texts["inputs"][name]["name"] for name in shown}
        sockets = page.on_node(kind, "node.outputs.map((output) => output.localized_name)")
        assert sockets == [output["name"] for output in texts["outputs"].values()]
        # Files name inputs and outputs, and one that is made here must open anywhere.
        assert {slot["name"] for slot in node["inputs"]} <= texts["inputs"].keys()
