"""What ComfyUI serves of this pack's nodes, for everything under tests/nodes."""

from typing import Any

import pytest
from make_locales import served_nodes
from setup_env import comfyui_folder


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What ComfyUI would serve at /object_info, on a machine without GPUs and without models."""
    if not (comfyui_folder() / "main.py").is_file():
        pytest.skip(f"no ComfyUI in {comfyui_folder()}; `make test` puts one there")
    return served_nodes(tmp_path_factory.mktemp("comfyui"))
