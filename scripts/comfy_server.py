"""Run a real ComfyUI with this pack in it, in a folder of its own. Both the demo and tests/comfy use it.

    with ComfyServer(base_dir) as server:      # models/, input/, output/, custom_nodes/ live in base_dir
        entry = server.run(prompt)             # everything of comfy_client.ComfyClient

The ComfyUI is the one scripts/setup_env.py unpacked, or the one ``COMFYUI_PATH`` names.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from comfy_client import ComfyClient
from setup_env import ROOT, comfyui_folder

PACK_NAME = "ComfyUI-Wan-Sharded"
TINY_MODEL = "wan-tiny"
NOT_PART_OF_THE_PACK = (".git", ".venv", ".work", ".cache", "__pycache__", ".pytest_cache", ".ruff_cache", "build", "*.egg-info")


class ServerError(Exception):
    """The server did not start or died; the message holds the end of its log."""


def free_port() -> int:
    """A TCP port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def link_pack(custom_nodes: Path, name: str = PACK_NAME, pack: Path = ROOT) -> Path:
    """Make this clone appear in a custom_nodes folder: by a link, or by a copy where links are not allowed (Windows)."""
    target = custom_nodes / name
    custom_nodes.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    try:
        target.symlink_to(pack, target_is_directory=True)
    except OSError:
        shutil.copytree(pack, target, ignore=shutil.ignore_patterns(*NOT_PART_OF_THE_PACK))
    return target


def prepare_base(base_dir: Path, checkpoint: Path) -> Path:
    """Lay out a ComfyUI base directory: the pack, the checkpoint as ``models/diffusers/wan-tiny``, the example pictures in ``input``."""
    link_pack(base_dir / "custom_nodes")
    shutil.copytree(ROOT / "example_workflows" / "input", base_dir / "input", dirs_exist_ok=True)
    model = base_dir / "models" / "diffusers" / TINY_MODEL
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(checkpoint, model)
    return base_dir


class ComfyServer(ComfyClient):
    """A ComfyUI process on a free port of this machine, and its client.

    Args:
        base_dir: Holds everything the server reads and writes; made if missing.
        comfyui: The ComfyUI folder.
        extra_arguments: For ``main.py``, e.g. ``["--cache-lru", "10"]``.
        environment: Added to this process's own.
        cpu: Start with ``--cpu``.
    """

    def __init__(
        self,
        base_dir: Path,
        *,
        comfyui: Path | None = None,
        extra_arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        cpu: bool = True,
        start_timeout_s: float = 180,
    ):
        self.port = free_port()
        super().__init__(f"http://127.0.0.1:{self.port}")
        self.base_dir = base_dir.resolve()
        self.comfyui = comfyui or comfyui_folder()
        self.log_path = self.base_dir / "server.log"
        self.start_timeout_s = start_timeout_s
        self._arguments = ["--cpu"] * cpu + list(extra_arguments)
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def process_id(self) -> int:
        """Of the running server."""
        if self._process is None:
            raise ServerError("ComfyUI was not started.")
        return self._process.pid

    @property
    def input_dir(self) -> Path:
        return self.base_dir / "input"

    @property
    def output_dir(self) -> Path:
        return self.base_dir / "output"

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            ServerError: it ended, or did not answer in time.
        """
        for name in ("custom_nodes", "input", "output", "temp", "user", "models"):
            (self.base_dir / name).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(self.comfyui / "main.py"), "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--disable-auto-launch", "--base-directory", str(self.base_dir)]
        command += ["--database-url", f"sqlite:///{self.base_dir / 'user' / 'comfyui.db'}", *self._arguments]
        # The Hub id among the loader's choices must never start a download here.
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1", **self._environment}
        self._log = self.log_path.open("wb")
        self._process = subprocess.Popen(command, cwd=self.comfyui, env=environment, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        while time.monotonic() < deadline:
            if not self.is_alive():
                raise ServerError(f"ComfyUI ended while starting. The end of {self.log_path}:\n{self.log_tail()}")
            try:
                self.request("/system_stats", timeout_s=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {self.start_timeout_s} s. The end of {self.log_path}:\n{self.log_tail()}")

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End the process; safe to call twice."""
        if self._process and self.is_alive():
            self._process.terminate()
            try:
                self._process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._log:
            self._log.close()

    def log(self) -> str:
        """Everything the server printed so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def history(self, prompt_id: str):
        if not self.is_alive():
            raise ServerError(f"ComfyUI died. The end of {self.log_path}:\n{self.log_tail()}")
        return super().history(prompt_id)

    def outputs(self, entry: dict) -> list[Path]:
        """The files a history entry says were written to the output folder."""
        files = [item for output in entry["outputs"].values() for items in output.values() if isinstance(items, list) for item in items]
        return [
            self.output_dir / item["subfolder"] / item["filename"]
            for item in files
            if isinstance(item, dict) and item.get("type") == "output"
        ]

    def __enter__(self) -> "ComfyServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
