"""Single files of Wan 2.1's video VAE, in Wan's own or in diffusers' names: recognise one, check it, describe it in diffusers' names.

Reads headers only. Qwen-Image's VAE has the same layers and shapes and can't be told from it. Knows no devices; called by the VAE's stage
and by lists of choices.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from ..errors import CheckpointError
from .component_file import check_tensors, read_component_file
from .recognise import NOT_WAN, VAE, recognise
from .stored import StoredTensor

CHOOSE_VAE = "Choose wan_2.1_vae.safetensors as vae."
_DTYPES = ("F32", "F16", "BF16")
_ORIGINAL, _DIFFUSERS = "decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"
# A tensor, how many sizes it has, and whose it is.
_OTHERS = (
    ("decoder.conv_in.weight", 4, "an image VAE, as Stable Diffusion and FLUX have"),
    ("first_stage_model.decoder.conv_in.weight", 4, "a whole checkpoint with an image VAE"),
    ("decoder.conv_in.conv.weight", 5, "the VAE of another video model, such as HunyuanVideo"),
    ("decoder.1.weight", 4, "a small VAE for previews (TAEHV)"),
)


@dataclass(frozen=True)
class WanVaeFile:
    """A checked file of the VAE.

    Attributes:
        path: of the file.
        tensors: diffusers' parameter name -> what is stored.
        config: of the ``AutoencoderKLWan`` that they belong to.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]


def is_vae_file(path: Path) -> bool:
    """Whether a file serves as Wan 2.1's VAE; reads its header only. For lists of choices."""
    try:
        open_wan_vae_file(path)
    except CheckpointError:
        return False
    return True


def open_wan_vae_file(path: Path) -> WanVaeFile:
    """Check a VAE's file and describe it.

    Raises:
        CheckpointError: it is no Wan 2.1 VAE in safetensors format, or damaged.
    """
    stored, _ = read_component_file(path, CHOOSE_VAE)
    kind = recognise(stored)
    original = _ORIGINAL in stored
    if kind != VAE or not (original or _DIFFUSERS in stored):
        raise _refusal(path.name, stored)
    try:
        tensors: dict[str, StoredTensor] = convert_wan_vae_to_diffusers(stored) if original else stored
        config = _config(tensors)
        with init_empty_weights():
            model: Any = AutoencoderKLWan(**config)
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path.name} has not the tensors of Wan 2.1's VAE ({error}). {CHOOSE_VAE}") from error
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    check_tensors(path.name, tensors, expected, _DTYPES)
    return WanVaeFile(path, {name: tensors[name] for name in expected}, config)


def _refusal(name: str, stored: Mapping[str, StoredTensor]) -> CheckpointError:
    kind = recognise(stored)
    what = next((words for key, sizes, words in _OTHERS if key in stored and len(stored[key].shape) == sizes), None)
    if kind == VAE:
        what = "a VAE inside a larger file"
    elif kind != NOT_WAN:
        what = kind.what
    return CheckpointError(
        f"{name} {f'is {what}' if what else 'holds no VAE that is known here'}, not Wan 2.1's VAE in one file. {CHOOSE_VAE}"
    )


def _config(tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """What the shapes say; the rest is the same for every Wan 2.1 VAE."""
    first, last = tensors["encoder.conv_in.weight"].shape, tensors["decoder.conv_out.weight"].shape
    resnets = 0
    while f"decoder.up_blocks.0.resnets.{resnets}.norm1.gamma" in tensors:
        resnets += 1
    return {
        "base_dim": first[0],
        "decoder_base_dim": last[1],
        "z_dim": tensors["post_quant_conv.weight"].shape[0],
        "num_res_blocks": resnets - 1,
        "in_channels": first[1],
        "out_channels": last[0],
    }
