"""ComfyUI's own Wan text encoder at the size of the tiny files, also as a node, for servers of the tests.

Core's Load CLIP has one size built in, that of the published UMT5-XXL. All else here is core's code.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.sd
import comfy.text_encoders.wan
import comfy.utils
import folder_paths
from comfy.text_encoders.sd3_clip import t5_xxl_detect

SMALL = {"d_model": 32, "num_layers": 2, "d_ff": 64, "d_kv": 8, "num_heads": 4}


def cores_clip(file: Path, **options: Any) -> Any:
    """What core's Load CLIP makes of a file, less its look at the number of blocks and the width."""
    tensors = comfy.utils.load_torch_file(str(file))
    target = SimpleNamespace(params={}, tokenizer=comfy.text_encoders.wan.WanT5Tokenizer)
    target.clip = comfy.text_encoders.wan.te(**t5_xxl_detect(tensors))  # codespell:ignore te
    sizes = {**SMALL, "vocab_size": tensors["shared.weight"].shape[0]}
    clip = comfy.sd.CLIP(
        target, tokenizer_data={"spiece_model": tensors["spiece_model"]}, model_options={"umt5xxl_model_config": sizes, **options}
    )
    missing, _ = clip.load_sd(tensors)
    assert [key for key in missing if "scale" not in key] == []
    return clip


class TinyCoreClip:
    """Takes what Load CLIP takes."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"clip_name": (folder_paths.get_filename_list("text_encoders"),), "type": (["wan"],), "device": (["default"],)}}

    def load(self, clip_name: str, type: str, device: str) -> tuple[Any]:
        return (cores_clip(Path(folder_paths.get_full_path_or_raise("text_encoders", clip_name))),)


NODE_CLASS_MAPPINGS = {"TinyCoreClip": TinyCoreClip}
