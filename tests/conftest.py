"""What all tests share: the pack under the name ``wan_sharded``, and tiny real checkpoints.

ComfyUI imports the pack under a mangled path name and pip users as ``wan_sharded``; the tests do as the latter, whatever the clone's
folder is called. ``scripts/`` is on the path too (see pyproject.toml), so ``from comfy_server import ComfyServer`` works.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".work"

# Nothing in the tests may ask the Hub; must be set before huggingface_hub is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if "wan_sharded" not in sys.modules:
    pack = ModuleType("wan_sharded")
    pack.__path__ = [str(ROOT)]
    sys.modules["wan_sharded"] = pack


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    """``make_tiny_checkpoint`` without its folder: ``make_checkpoint(num_blocks=3, sharded=True)`` gives a path.

    Checkpoints are kept between runs, so treat them as read-only (copy one to damage it).
    """

    def make(**options: object) -> Path:
        import diffusers
        import tiny_checkpoint
        import torch

        source = Path(tiny_checkpoint.__file__).read_bytes()
        key = hashlib.sha256(
            repr((source, sorted(options.items(), key=str), torch.__version__, diffusers.__version__)).encode()
        ).hexdigest()[:16]
        folder = WORK / "test-checkpoints" / key
        if not folder.is_dir():
            unfinished = folder.with_name(f"{key}.{os.getpid()}")
            tiny_checkpoint.make_tiny_checkpoint(unfinished, **options)  # type: ignore[arg-type]
            try:
                unfinished.rename(folder)
            except OSError:  # another test process was faster
                shutil.rmtree(unfinished)
        return folder

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
