"""The API client that comes with the examples, and the README's words on it, against a running server."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import av
import pytest
from comfy_server import TINY_MODEL, ComfyServer

ROOT = Path(__file__).resolve().parents[2]
API = ROOT / "example_workflows" / "api"
SMALL = {"width": 64, "height": 48, "length": 5, "steps": 3}


def run_client(server: ComfyServer, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    small = [f"--set=Wan I2V Sampler.{name}={value}" for name, value in SMALL.items()]
    command = [sys.executable, str(API / "run_workflow.py"), *arguments, "--server", server.url, *small]
    command.append(f"--set=Wan Sharded Loader.model={TINY_MODEL}")
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def readme_arguments() -> list[str]:
    """Of the command in the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^python example_workflows/api/run_workflow\.py ((?:.*\\\n)*.*)", readme, re.MULTILINE)
    return shlex.split(command.replace("\\\n", ""))


def test_the_readmes_command(comfy_server: ComfyServer, tmp_path: Path) -> None:
    (tmp_path / "boat.jpg").write_bytes((ROOT / "example_workflows" / "input" / "wan_sharded_example.jpg").read_bytes())
    arguments = [str(ROOT / word) if word.endswith(".json") else word for word in readme_arguments()]
    result = run_client(comfy_server, tmp_path, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"Step 3 of 3 \(low noise expert\), [\d.]+ s a step", result.stdout)
    (video,) = tmp_path.glob("*.mp4")
    assert result.stdout.endswith(f"written: {video.name}\n")
    with av.open(str(video)) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (64, 48)
        prompt = json.loads(container.metadata["prompt"])
    assert prompt["3"]["inputs"]["positive"] == "The boat drifts slowly across the lake."
    assert prompt["3"]["inputs"]["seed"] == 42
    assert prompt["2"]["inputs"]["image"].startswith("boat")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--set=Wan Sharded Loader.model=nobody's", "nobody's"),
        ("--set=Sampler.seed=1", "0 nodes are called 'Sampler' and have an input 'seed'"),
        ("--set=Wan I2V Sampler.steps=0", "refuses the workflow"),
    ],
)
def test_what_is_wrong_is_said(comfy_server: ComfyServer, tmp_path: Path, argument: str, said: str) -> None:
    command = [sys.executable, str(API / "run_workflow.py"), str(API / "wan_i2v.json"), "--server", comfy_server.url, argument]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and said in result.stderr
