"""Downloading a model, against a Hub that runs on this machine, with the real ``huggingface_hub`` in a process of its own."""

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wan_sharded
from hub_server import HubServer
from wan_sharded.engine.checkpoints import hub as hub_module
from wan_sharded.engine.checkpoints.diffusers_folder import open_diffusers_folder
from wan_sharded.engine.checkpoints.hub import is_hub_id
from wan_sharded.engine.errors import CheckpointError

MODEL = "someone/Wan2.2-Tiny-Diffusers"
# Without the engine's __init__, which imports torch and diffusers.
PREAMBLE = """
import json, sys
from types import ModuleType
for name, folder in (("wan_sharded", ""), ("wan_sharded.engine", "/engine")):
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = [sys.argv[1] + folder]
from wan_sharded.engine.checkpoints.hub import cached_folder, download_model
from wan_sharded.engine.errors import CheckpointError
def tell(**values):
    print("ANSWER", json.dumps(values))
"""


@pytest.fixture
def hub(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[HubServer]:
    """Serves a copy of the tiny checkpoint, with files in it that nobody needs."""
    folder = tmp_path / "served"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "README.md").write_text("# not needed")
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"never fetched" * 1000)
    server = HubServer()
    server.models[MODEL] = folder
    yield server
    server.close()


@pytest.fixture
def python(hub: HubServer, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run code in a new process whose Hub is ours; what it ``tell``s."""

    def run(code: str, **environment: str) -> dict[str, Any]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()}
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf home"), "HF_HUB_ETAG_TIMEOUT": "2", **environment}
        result = subprocess.run(
            [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), wan_sharded.__path__[0]],
            env={**kept, **settings},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        answers = [line.removeprefix("ANSWER ") for line in result.stdout.splitlines() if line.startswith("ANSWER ")]
        assert result.returncode == 0 and answers, result.stdout + result.stderr
        return json.loads(answers[-1])

    return run


DOWNLOAD = f"""
seen = []
try:
    tell(folder=str(download_model({MODEL!r}, lambda done, total: seen.append((done, total)))), seen=seen)
except CheckpointError as error:
    tell(error=str(error))
"""


def wanted_bytes(hub: HubServer) -> int:
    folder = hub.models[MODEL]
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.parent != folder and file.suffix != ".bin")


def test_download(hub: HubServer, python: Callable[..., dict[str, Any]]) -> None:
    answer = python(DOWNLOAD)
    folder = open_diffusers_folder(Path(answer["folder"]))
    assert folder.boundary_ratio == 0.9
    for part in ("transformer", "transformer_2", "vae", "text_encoder"):
        for file in (hub.models[MODEL] / part).glob("*.safetensors"):
            assert (Path(answer["folder"]) / part / file.name).read_bytes() == file.read_bytes()
    assert not hub.asked("README") and not hub.asked(".bin")
    done, totals = zip(*answer["seen"], strict=True)
    assert set(totals) == {wanted_bytes(hub)}
    assert list(done) == sorted(done) and done[-1] == totals[-1]
    assert len(set(done)) >= len(hub.asked("GET /someone/")) - 1


def test_progress_within_a_file(hub: HubServer, python: Callable[..., dict[str, Any]]) -> None:
    """Without a terminal, as ComfyUI's desktop application runs, the Hub's progress bars do not count."""
    big = hub.models[MODEL] / "transformer" / "diffusion_pytorch_model.safetensors"
    big.write_bytes(b"\0" * 45_000_000)
    within = {done for done, total in python(DOWNLOAD)["seen"] if 5_000_000 < done < 45_000_000}
    assert len(within) >= 3


def test_the_second_time_asks_no_network(hub: HubServer, python: Callable[..., dict[str, Any]]) -> None:
    first = python(DOWNLOAD)
    asked = len(hub.requests)
    again = python(DOWNLOAD)
    assert again == {"folder": first["folder"], "seen": []}
    assert python(DOWNLOAD, HF_HUB_OFFLINE="1")["folder"] == first["folder"]
    assert len(hub.requests) == asked


def test_cancel_and_go_on(hub: HubServer, python: Callable[..., dict[str, Any]]) -> None:
    """What has arrived is not fetched again, and nothing takes a stopped download for a whole one."""
    answer = python(
        f"""
        class Stop(BaseException):
            pass
        def stop(done, total):
            if done > total / 2:
                raise Stop
        try:
            download_model({MODEL!r}, stop)
        except Stop:
            tell(stopped=True, cached=cached_folder({MODEL!r}) is not None)
        """
    )
    assert answer == {"stopped": True, "cached": False}
    before = hub.sent_bytes
    assert 0 < before
    seen = python(DOWNLOAD)["seen"]
    assert seen[0][0] > 0, "what was there already counts as done"
    assert hub.sent_bytes - before < wanted_bytes(hub)


def test_a_download_that_another_program_left_unfinished(hub: HubServer, python: Callable[..., dict[str, Any]]) -> None:
    """diffusers and `hf download` fetch the index and the configurations first."""
    python(
        f"""
        from huggingface_hub import hf_hub_download
        for name in ("model_index.json", *(part + "/config.json" for part in ("transformer", "transformer_2", "vae", "text_encoder"))):
            hf_hub_download({MODEL!r}, name)
        hf_hub_download({MODEL!r}, "tokenizer/tokenizer_config.json")
        tell(done=True)
        """
    )
    assert open_diffusers_folder(Path(python(DOWNLOAD)["folder"])).experts


def test_a_new_version_is_not_mixed_with_the_old(hub: HubServer, python: Callable[..., dict[str, Any]]) -> None:
    old = python(DOWNLOAD)["folder"]
    (hub.models[MODEL] / "scheduler" / "scheduler_config.json").write_text("{}")
    assert python(DOWNLOAD)["folder"] == old, "what is whole is used as it is"


@pytest.mark.parametrize(("status", "code"), [(403, "GatedRepo"), (401, "GatedRepo")])
def test_gated(hub: HubServer, python: Callable[..., dict[str, Any]], status: int, code: str) -> None:
    hub.refuse[MODEL] = (status, code)
    error = python(DOWNLOAD)["error"]
    assert f"accept its terms at https://huggingface.co/{MODEL}" in error and "hf auth login" in error


def test_unknown(python: Callable[..., dict[str, Any]]) -> None:
    error = python(DOWNLOAD.replace(MODEL, "someone/misspelt"))["error"]
    assert "There is no model 'someone/misspelt' on the Hugging Face Hub" in error and "Check the name" in error


def test_no_diffusers_model(hub: HubServer, python: Callable[..., dict[str, Any]]) -> None:
    (hub.models[MODEL] / "model_index.json").unlink()
    error = python(DOWNLOAD)["error"]
    assert "model_index.json is missing" in error and "Choose a ...-Diffusers model" in error


def test_offline(hub: HubServer, python: Callable[..., dict[str, Any]]) -> None:
    error = python(DOWNLOAD, HF_HUB_OFFLINE="1")["error"]
    assert MODEL in error and "unset HF_HUB_OFFLINE" in error and "models/diffusers" in error
    assert not hub.requests


def test_nobody_answers(python: Callable[..., dict[str, Any]]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        error = python(DOWNLOAD, HF_ENDPOINT=f"http://127.0.0.1:{closed.getsockname()[1]}")["error"]
    assert "the Hugging Face Hub can't be reached. Connect to the internet" in error


def test_the_server_is_ill(hub: HubServer, python: Callable[..., dict[str, Any]]) -> None:
    hub.refuse_all = (418, "Teapot")
    error = python(DOWNLOAD)["error"]
    assert "418" in error and "Try again later" in error


def test_the_caches_drive_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda self: False)
        with pytest.raises(CheckpointError, match="no such drive.*HF_HOME"):
            hub_module._check_space(MODEL, 1)


def test_too_little_disk_space(hub: HubServer, python: Callable[..., dict[str, Any]]) -> None:
    hub.claimed_bytes["transformer/diffusion_pytorch_model.safetensors"] = 10**18
    error = python(DOWNLOAD)["error"]
    assert "more on disk" in error and "hf home" in error and "HF_HOME" in error
    assert not hub.asked("/resolve/"), "nothing was fetched"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a folder that cannot be written")
def test_a_cache_that_cannot_be_written(python: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    error = python(DOWNLOAD, HF_HOME=str(locked))["error"]
    assert "could not be saved in the Hub cache" in error and "check the permissions" in error


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("Wan-AI/Wan2.2-I2V-A14B-Diffusers", True),
        ("a/b", True),
        ("/models/wan", False),
        ("./models/wan", False),
        ("../wan", False),
        ("~/wan", False),
        ("models/wan/tiny", False),
        ("wan", False),
        ("C:\\models\\wan", False),
        ("C:/models", False),
        ("a/", False),
        ("", False),
    ],
)
def test_hub_ids_and_paths(name: str, is_id: bool) -> None:
    assert is_hub_id(name) == is_id
