"""ComfyUI's web frontends: the one that came with ComfyUI, called "bundled", and a newer one."""

import subprocess
import sys
from pathlib import Path

from setup_env import WORK

BUNDLED = "bundled"
# The newest this pack was looked at in; the oldest supported one comes with ComfyUI 0.3.75.
NEW_FRONTEND = "1.58.1"


def fetch_frontend(version: str = NEW_FRONTEND) -> Path | None:
    """The folder for ComfyUI's ``--front-end-root`` with this frontend, downloaded once; None where that fails."""
    folder = WORK / f"frontend-{version}"
    static = folder / "comfyui_frontend_package" / "static"
    if not static.is_dir():
        # Not into the environment: ComfyUI would serve it as its own.
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            folder,
            f"comfyui-frontend-package=={version}",
        ]
        subprocess.run(command, capture_output=True, check=False)
    return static if static.is_dir() else None
