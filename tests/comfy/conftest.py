"""A real ComfyUI server with this pack in it, for everything under tests/comfy.

The ComfyUI is the one `make test` unpacks; ``COMFYUI_PATH`` names another, ``COMFYUI_VERSION`` another of those setup_env.py knows.
"""

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from comfy_server import ComfyServer, prepare_base
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
    comfy_browser = pytest.importorskip("comfy_browser", reason="playwright is not installed")

    @cache
    def server(frontend: str) -> ComfyServer:
        if frontend == "bundled":
            return comfy_server
        root = comfy_browser.fetch_frontend(frontend)
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
