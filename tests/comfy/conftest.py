"""A real ComfyUI server with this pack in it, for everything under tests/comfy.

The ComfyUI is the one `make test` unpacks; ``COMFYUI_PATH`` names another, ``COMFYUI_VERSION`` another of those setup_env.py knows.
"""

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from comfy_looks import GPUS, LOOKS, Look
from comfy_server import ComfyServer, prepare_base
from frontends import BUNDLED, fetch_frontend
from setup_env import comfyui_folder


@pytest.fixture(scope="session")
def start_comfy_server(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[Callable[..., ComfyServer]]:
    """Start a server of your own: ``start_comfy_server(extra_arguments=["--cache-lru", "10"])``. Stopped when the tests are over."""
    if not (comfyui_folder() / "main.py").is_file():
        pytest.skip(f"no ComfyUI in {comfyui_folder()}; `make test` puts one there")
    servers: list[ComfyServer] = []

    def start(**options: object) -> ComfyServer:
        base = prepare_base(tmp_path_factory.mktemp("comfyui"), tiny_checkpoint)
        shutil.copy(Path(__file__).parents[1] / "support" / "tiny_core_clip.py", base / "custom_nodes")
        server = ComfyServer(base, **options)  # type: ignore[arg-type]
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def comfy_server(start_comfy_server: Callable[..., ComfyServer]) -> ComfyServer:
    """The server most tests share. It has the pack, ``models/diffusers/wan-tiny`` and the example pictures; see comfy_server.py."""
    return start_comfy_server()


@pytest.fixture(scope="session")
def server_with(comfy_server: ComfyServer, start_comfy_server: Callable[..., ComfyServer]) -> Callable[[str], ComfyServer]:
    """A server that shows a frontend, by its version or "bundled"; one per frontend."""

    @cache
    def server(frontend: str) -> ComfyServer:
        if frontend == BUNDLED:
            return comfy_server
        root = fetch_frontend(frontend)
        if root is None:
            pytest.skip(f"frontend {frontend} could not be downloaded")
        return start_comfy_server(extra_arguments=["--front-end-root", str(root)])

    return server


@pytest.fixture(scope="module")  # Playwright takes one at a time
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    comfy_browser = pytest.importorskip("comfy_browser", reason="playwright is not installed")
    try:
        with comfy_browser.open_browser() as opened:
            yield opened
    except comfy_browser.BrowserMissing as error:
        pytest.skip(str(error))


@pytest.fixture(params=LOOKS, ids=str)
def look(request: pytest.FixtureRequest) -> Look:
    """Each frontend, with the classic canvas and with Nodes 2.0."""
    return request.param


@pytest.fixture
def open_page(look: Look, browser: Any, server_with: Callable[[str], ComfyServer]) -> Iterator[Callable[..., Any]]:
    """``open_page(gpus=2)``: a new tab, the way this look shows it, of a server that seems to have so many GPUs.

    Further names are settings of the frontend. No tab may have had an error in this pack's scripts.
    """
    from comfy_browser import ComfyPage

    pages: list[ComfyPage] = []

    def open_one(gpus: int | None = None, **settings: Any) -> ComfyPage:
        names = None if gpus is None else GPUS[gpus]
        page = ComfyPage(browser, server_with(look.frontend).url, nodes_2=look.nodes_2, gpu_names=names, settings=settings)
        pages.append(page)
        return page

    yield open_one
    errors = [error for page in pages for error in page.errors]
    for page in pages:
        page.close()
    assert [error for error in errors if "wan_sharded" in error] == []


@pytest.fixture(scope="module")
def kept_page(browser: Any, server_with: Callable[[str], ComfyServer]) -> Iterator[Callable[[Look], Any]]:
    """A tab for each look that stays open for all of a module's tests, of a server that seems to have one GPU; same promise."""
    from comfy_browser import ComfyPage

    pages: dict[Look, ComfyPage] = {}

    def page_of(look: Look) -> ComfyPage:
        if look not in pages:
            pages[look] = ComfyPage(browser, server_with(look.frontend).url, nodes_2=look.nodes_2, gpu_names=GPUS[1])
            pages[look].open()
        return pages[look]

    yield page_of
    errors = [error for page in pages.values() for error in page.errors]
    for page in pages.values():
        page.close()
    assert [error for error in errors if "wan_sharded" in error] == []
