"""The README's words on two public clients of ComfyUI's API, run as they stand there against a running server."""

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import av
import pytest
from comfy_server import TINY_MODEL, ComfyServer
from setup_env import ROOT, WORK

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = Path("example_workflows") / "api" / "wan_i2v.json"
BINARIES = "Scripts" if os.name == "nt" else "bin"


@pytest.fixture(scope="module")
def clients() -> Path:
    """The folder of programs of an environment with both clients, in the versions that the README names; made once."""
    wanted = [f"{name}=={version}" for name, version in re.findall(r"pypi\.org/project/([\w-]+)/\) ([\d.]+\d)", README)]
    assert len(wanted) == 2
    folder = WORK / f"clients-{'-'.join(wanted)}"
    if not (folder / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [folder / BINARIES / "python", "-m", "pip", "install", "--quiet", *wanted]
        if subprocess.run(install, capture_output=True, check=False).returncode:
            pytest.skip(f"{' and '.join(wanted)} could not be downloaded")
        (folder / "ready").touch()
    return folder / BINARIES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the example where the README has it, made small, and a photo of somebody's own."""
    prompt = json.loads((ROOT / EXAMPLE).read_text(encoding="utf-8"))
    prompt["1"]["inputs"]["model"] = TINY_MODEL
    prompt["3"]["inputs"] |= {"width": 64, "height": 48, "length": 5, "steps": 3}
    (tmp_path / EXAMPLE).parent.mkdir(parents=True)
    (tmp_path / EXAMPLE).write_text(json.dumps(prompt), encoding="utf-8")
    (tmp_path / "boat.jpg").write_bytes((ROOT / "example_workflows" / "input" / "wan_sharded_example.jpg").read_bytes())
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    """What it printed; its settings and records stay in the folder."""
    home = {name: str(folder) for name in ("HOME", "USERPROFILE", "APPDATA", "LOCALAPPDATA", "XDG_CONFIG_HOME")}
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **home}, stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8", timeout=180
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_comfy_cli(clients: Path, folder: Path, comfy_server: ComfyServer) -> None:
    (line,) = re.findall(r"^ *(comfy .* run .*)$", README, re.MULTILINE)
    port = comfy_server.url.rsplit(":", 1)[1].strip("/")
    program, *arguments = shlex.split(line.replace("8188", port))
    printed = "".join(run([str(clients / program), *arguments], folder).split())
    names = set(re.findall(r"filename=([\w.]+\.mp4)", printed))
    assert len(names) == 1, printed
    video = comfy_server.base_dir / "output" / "video" / names.pop()
    assert sides_of(video) == (64, 48)


def test_comfy_api_simplified(clients: Path, folder: Path, comfy_server: ComfyServer) -> None:
    (code,) = [block for block in re.findall(r"```py\n(.*?)```", README, re.DOTALL) if "comfy_api_simplified" in block]
    (folder / "client.py").write_text(textwrap.dedent(code).replace("http://127.0.0.1:8188", comfy_server.url.strip("/")), encoding="utf-8")
    run([str(clients / "python"), "client.py"], folder)
    (video,) = folder.glob("*.mp4")
    assert sides_of(video) == (64, 48)
    with av.open(str(video)) as container:
        prompt = json.loads(container.metadata["prompt"])
    assert prompt["3"]["inputs"]["positive"] == "The boat drifts slowly across the lake."
    assert "boat" in prompt["2"]["inputs"]["image"]


def sides_of(video: Path) -> tuple[int, int]:
    with av.open(str(video)) as container:
        return container.streams.video[0].width, container.streams.video[0].height
