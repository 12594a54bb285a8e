"""A Wan 2.2 I2V A14B checkpoint of the real shape with random weights, in diffusers format. 70 GB; made once per machine.

    python benchmarks/real_shape.py FOLDER

Weights are drawn on a GPU where there is one. The tokenizer is the tiny checkpoint's: only its ids matter here.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

TRANSFORMER = {"in_channels": 36, "out_channels": 16, "text_dim": 4096, "num_layers": 40}
UMT5 = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new",
}  # fmt: skip
SHARD_BYTES = 5 * 1000**3


def make_real_shape_checkpoint(folder: Path, *, dtype: torch.dtype = torch.bfloat16, num_layers: int = 40) -> Path:
    """Write the checkpoint unless it is there; returns its folder.

    Args:
        folder: where; 57 GB for both experts in bf16 at 40 layers, 11 GB for the text encoder, 0.5 GB for the VAE.
        dtype: of the experts.
        num_layers: fewer make a smaller model of the same width, for trying a script out.
    """
    if (folder / "model_index.json").is_file():
        return folder
    from tiny_checkpoint import make_tiny_checkpoint

    make_tiny_checkpoint(folder)
    index = (folder / "model_index.json").read_text()
    (folder / "model_index.json").unlink()  # written last: it says that the rest is whole
    config = {**TRANSFORMER, "num_layers": num_layers}
    with init_empty_weights():
        transformer = WanTransformer3DModel(**config)
        vae = AutoencoderKLWan()
        encoder = UMT5EncoderModel(UMT5Config(**UMT5))
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(_write, transformer, folder / "transformer", dtype, 1, pool),
            pool.submit(_write, transformer, folder / "transformer_2", dtype, 2, pool),
            pool.submit(_write, vae, folder / "vae", torch.float32, 3, pool),
            pool.submit(_write, encoder, folder / "text_encoder", torch.bfloat16, 4, pool),
        ]
        for job in jobs:
            job.result()
    (folder / "model_index.json").write_text(index)
    return folder


def _write(model: torch.nn.Module, folder: Path, dtype: torch.dtype, seed: int, pool: ThreadPoolExecutor) -> None:
    for old in folder.iterdir():
        old.unlink()
    model.save_config(folder) if hasattr(model, "save_config") else model.config.save_pretrained(folder)
    stem = "diffusion_pytorch_model" if hasattr(model, "save_config") else "model"
    device = f"cuda:{seed % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    weight_map, shard, size, number = {}, {}, 0, 1
    names = [(name, p.shape) for name, p in model.named_parameters()]  # tied names appear once
    for i, (name, shape) in enumerate(names):
        tensor = _draw(name, shape, generator, device, dtype)
        shard[name] = tensor.cpu()
        size += tensor.nbytes
        weight_map[name] = f"{stem}-{number:05}.safetensors"
        if size > SHARD_BYTES or i == len(names) - 1:
            save_file(shard, folder / weight_map[name], metadata={"format": "pt"})
            shard, size, number = {}, 0, number + 1
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _draw(name: str, shape: torch.Size, generator: torch.Generator, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Values that keep signals of ordinary size: matrices by their fan-in, norms near one, biases small."""
    values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    if "norm" in name or name.endswith("gamma"):
        values = 1 + 0.1 * values
    elif len(shape) > 1:
        values = values / max(1, shape[1:].numel()) ** 0.5
    else:
        values = 0.02 * values
    return values.to(dtype)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-layers", type=int, default=40)
    arguments = parser.parse_args()
    print(make_real_shape_checkpoint(arguments.folder, num_layers=arguments.num_layers))
