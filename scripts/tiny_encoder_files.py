"""Write a UMT5 text encoder and a Wan VAE as the single files that ComfyUI users have, from models of scripts/tiny_checkpoint.py.

    python scripts/tiny_encoder_files.py FOLDER [--form fp16|bf16|fp32|fp8|fp8_scaled_old|fp8_scaled_new]

The files have the names and the inside of umt5_xxl_fp8_e4m3fn_scaled.safetensors and wan_2.1_vae.safetensors. Used by the tests.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from tiny_checkpoint import make_text_encoder, make_tokenizer, make_vae
from transformers import UMT5EncoderModel

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
PLAIN = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp8": FP8}
FORMS = (*PLAIN, "fp8_scaled_old", "fp8_scaled_new")
# Of a residual block, of the middle, and of the rest of the VAE: diffusers' names and Wan's own.
_RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6", "conv_shortcut": "shortcut"}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_ENDS = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}


def write_umt5_file(path: str | Path, encoder: UMT5EncoderModel, spiece_bytes: bytes | None, form: str) -> None:
    """Write an encoder as ComfyUI's single file.

    Args:
        path: Of the file.
        encoder: Its weights are rounded as ``form`` wants.
        spiece_bytes: The SentencePiece model to put inside; ``None`` leaves it out.
        form: One of ``FORMS``. "fp8" is everything rounded, norms too. The scaled ones have the blocks' matrices in fp8 with a scale each,
            and the rest in fp16: "fp8_scaled_old" with ``scaled_fp8`` and ``scale_weight``, "fp8_scaled_new" with ``comfy_quant`` and
            ``weight_scale``.
    """
    weights = {name: tensor.float() for name, tensor in encoder.state_dict().items() if name != "encoder.embed_tokens.weight"}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        module = name.removesuffix(".weight")
        if form in PLAIN:
            tensors[name] = tensor.to(PLAIN[form])
        elif tensor.ndim == 2 and not module.endswith(("shared", "relative_attention_bias")):
            scale = tensor.abs().max() / FP8_MAX
            tensors[name] = (tensor / scale).to(FP8)
            tensors[f"{module}.scale_weight" if form == "fp8_scaled_old" else f"{module}.weight_scale"] = scale
            if form == "fp8_scaled_new":
                tensors[f"{module}.comfy_quant"] = _as_tensor(json.dumps({"format": "float8_e4m3fn"}).encode())
        else:
            tensors[name] = tensor.half()
    if form == "fp8_scaled_old":
        tensors["scaled_fp8"] = torch.zeros(0, dtype=FP8)
    if spiece_bytes is not None:
        tensors["spiece_model"] = _as_tensor(spiece_bytes)
    save_file(tensors, path)


def write_vae_file(path: str | Path, vae: AutoencoderKLWan, dtype: torch.dtype = torch.float32) -> None:
    """Write a VAE with Wan's own names; it must have two residual blocks per level, as the published one has."""
    save_file({original_vae_name(name): tensor.to(dtype).contiguous() for name, tensor in vae.state_dict().items()}, path)


def original_vae_name(name: str) -> str:
    """Wan's own name of a parameter of diffusers' ``AutoencoderKLWan``: what ``convert_wan_vae_to_diffusers`` does, backwards."""
    top, _, rest = name.partition(".")
    if top in ("quant_conv", "post_quant_conv"):
        return f"{'conv1' if top == 'quant_conv' else 'conv2'}.{rest}"
    kind, _, inside = rest.partition(".")
    if kind in _ENDS:
        return f"{top}.{_ENDS[kind]}.{inside}"
    if kind == "mid_block":
        part = ".".join(inside.split(".")[:2])
        return f"{top}.middle.{_MIDDLE[part]}.{_residual(inside.removeprefix(f'{part}.'))}"
    if kind == "down_blocks":
        number, _, inside = inside.partition(".")
        return f"{top}.downsamples.{number}.{_residual(inside)}"
    block, which, number, inside = inside.split(".", 3)
    # Three residual blocks and what enlarges the picture.
    return f"{top}.upsamples.{4 * int(block) + (3 if which == 'upsamplers' else int(number))}.{_residual(inside)}"


def _residual(inside: str) -> str:
    head, _, rest = inside.partition(".")
    return f"{_RESIDUAL.get(head, head)}.{rest}"


def _as_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--form", choices=FORMS, default="fp8_scaled_old")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(arguments.seed)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        spiece = Path(scratch, "spiece.model")
        encoder = make_text_encoder(len(make_tokenizer(spiece)), generator)
        write_umt5_file(arguments.folder / f"umt5_tiny_{arguments.form}.safetensors", encoder, spiece.read_bytes(), arguments.form)
    write_vae_file(arguments.folder / "wan_2.1_vae_tiny.safetensors", make_vae(generator, num_res_blocks=2))


if __name__ == "__main__":
    main()
