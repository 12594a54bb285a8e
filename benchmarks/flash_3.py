"""FlashAttention 3 for what is compared: under the names by which diffusers finds it, and left out for this pack where it is to do without."""

import atexit
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

# diffusers knows FlashAttention 3's own build only; its forward half on the package index has the same functions under another name.
OWN, FORWARD_HALF = "flash_attn_interface", "fa3_fwd_interface"
DIFFUSERS_BACKEND = "_flash_3"


def offer_to_diffusers() -> None:
    """Before diffusers is imported: let it find FlashAttention 3's forward half where only that is installed."""
    if importlib.util.find_spec(OWN) is not None or importlib.util.find_spec(FORWARD_HALF) is None:
        return
    folder = Path(tempfile.mkdtemp(prefix="flash_3_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / f"{OWN}.py").write_text(
        f"import {FORWARD_HALF}\nfrom {FORWARD_HALF} import flash_attn_func, flash_attn_varlen_func\n", encoding="utf-8"
    )
    (folder / "flash_attn_3").mkdir()
    (folder / "flash_attn_3" / "__init__.py").touch()
    described = folder / "flash_attn_3-3.0.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: flash_attn_3\nVersion: 3.0.0\n", encoding="utf-8")
    sys.path.insert(0, str(folder))


def flash_3_here() -> bool:
    """Whether this pack would compute a 14B model's attention by it on the first GPU."""
    from wan_sharded.engine.transformer.self_attention import self_attention
    from wan_sharded.engine.transformer.wan_block import attend

    return self_attention(torch.device("cuda", 0), torch.bfloat16, 128) is not attend


@contextmanager
def attention_by(*, torch_alone: bool) -> Iterator[None]:
    """Inside, this pack computes attention as where FlashAttention 3 is not installed, or as it would anyway."""
    from wan_sharded.engine.transformer import self_attention as module

    with patch.object(module, "_choices", {}), patch.object(module, "MODULES", () if torch_alone else module.MODULES):
        yield
