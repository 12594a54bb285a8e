"""The files that describe the pack agree with each other and with the folders."""

import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirement_lines(file: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def test_every_engine_folder_is_packaged() -> None:
    folders = [ROOT / "engine", *(path for path in (ROOT / "engine").rglob("*") if path.is_dir() and any(path.glob("*.py")))]
    names = {"wan_sharded", *(f"wan_sharded.{'.'.join(folder.relative_to(ROOT).parts)}" for folder in folders)}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == names


def test_requirements_are_the_same_twice() -> None:
    assert PROJECT["project"]["dependencies"] == requirement_lines(ROOT / "requirements.txt")


def test_users_keep_their_torch() -> None:
    assert not [
        line for line in requirement_lines(ROOT / "requirements.txt") if line.startswith(("torch=", "torch>", "torchvision", "torchaudio"))
    ]


def test_javascript_is_declared_once() -> None:
    assert "web" not in PROJECT["tool"]["comfy"]
    assert 'WEB_DIRECTORY = "./js"' in (ROOT / "__init__.py").read_text(encoding="utf-8")


def test_engine_imports_without_comfyui() -> None:
    code = (
        "import sys, types; pack = types.ModuleType('wan_sharded'); pack.__path__ = [sys.argv[1]]; sys.modules['wan_sharded'] = pack;"
        "import wan_sharded.engine as engine; [getattr(engine, name) for name in engine.__all__];"
        "sys.exit(any(name.split('.')[0] in ('comfy', 'comfy_api', 'folder_paths') for name in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=ROOT.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
