"""What all tests share: the pack under the name ``wan_sharded``, and tiny real checkpoints.

ComfyUI imports the pack under a mangled path name and pip users as ``wan_sharded``; the tests do as the latter, whatever the clone's
folder is called. ``scripts/`` is on the path too (see pyproject.toml), so ``from comfy_server import ComfyServer`` works.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".work"

# Nothing in the tests may ask the Hub; must be set before huggingface_hub is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Several test processes and their servers, each with threads for all cores that wait for each other by spinning, take seconds for what
# one takes milliseconds for; tiny models have no use for many cores either. Must be set before torch is imported; servers inherit it.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
os.environ.setdefault("OMP_NUM_THREADS", str(min(8, max(1, (os.cpu_count() or 1) // max(1, workers)))))

if "wan_sharded" not in sys.modules:
    pack = ModuleType("wan_sharded")
    pack.__path__ = [str(ROOT)]
    sys.modules["wan_sharded"] = pack


@pytest.fixture(autouse=True)
def _gpu_for_itself(request: pytest.FixtureRequest) -> Iterator[None]:
    """With several test processes (pytest-xdist), one at a time has the GPUs and their memory."""
    needs_gpu = request.node.get_closest_marker("gpu") is not None or request.path.parent.name == "gpu"
    if not workers or not needs_gpu or not torch_has_gpu():
        yield
        return
    WORK.mkdir(exist_ok=True)
    with FileLock(WORK / "gpu.lock"):
        yield


@cache
def torch_has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _kept(scripts: tuple[str, ...], key: object, write: Callable[[Path], object]) -> Path:
    """A folder of checkpoints that ``write`` makes, unless an earlier run of the same scripts and libraries made it."""
    import diffusers
    import torch

    sources = [(ROOT / "scripts" / f"{name}.py").read_bytes() for name in scripts]
    digest = hashlib.sha256(repr((sources, key, torch.__version__, diffusers.__version__)).encode()).hexdigest()[:16]
    folder = WORK / "test-checkpoints" / digest
    if not folder.is_dir():
        unfinished = folder.with_name(f"{digest}.{os.getpid()}")
        write(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:  # another test process was faster
            shutil.rmtree(unfinished)
    return folder


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    """``make_tiny_checkpoint`` without its folder: ``make_checkpoint(num_blocks=3, sharded=True)`` gives a path.

    Checkpoints are kept between runs, so treat them as read-only (copy one to damage it).
    """

    def make(**options: object) -> Path:
        import tiny_checkpoint

        return _kept(
            ("tiny_checkpoint",),
            sorted(options.items(), key=str),
            lambda folder: tiny_checkpoint.make_tiny_checkpoint(folder, **options),  # type: ignore[arg-type]
        )

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """A float32 checkpoint folder in diffusers format: two experts of 5 blocks and 3 heads. Read-only."""
    return make_checkpoint()


@pytest.fixture(scope="session")
def tiny_checkpoint_bf16(make_checkpoint: Callable[..., Path]) -> Path:
    """The same weights, experts and text encoder rounded to bfloat16. Read-only."""
    import torch

    return make_checkpoint(dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def tiny_single_files() -> Path:
    """A folder with both experts in every form of single file, named by ``tiny_single_files.file_names``, and with ``diffusers``, the
    model they are of: 3 blocks, 2 heads of 128. Read-only.
    """
    import tiny_single_files

    return _kept(("tiny_checkpoint", "tiny_single_files"), "single files", tiny_single_files.make_tiny_single_files)
