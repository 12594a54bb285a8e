"""Measures the constants of engine/planning/footprint.py on one GPU: what a block and the VAE take besides weights.

python benchmarks/footprint.py
"""

import sys
from pathlib import Path
from types import ModuleType

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

ROOT = Path(__file__).resolve().parent.parent
pack = ModuleType("wan_sharded")
pack.__path__ = [str(ROOT)]
sys.modules["wan_sharded"] = pack

from wan_sharded.engine.planning import footprint  # noqa: E402
from wan_sharded.engine.planning.footprint import VideoShape  # noqa: E402
from wan_sharded.engine.transformer.lean_block import use_lean_blocks  # noqa: E402
from wan_sharded.engine.weights.precision import quantizable_weights, quantized_weight  # noqa: E402

GIB = 1024**3
SHAPES = (VideoShape(832, 480, 81), VideoShape(1280, 720, 81), VideoShape(832, 480, 33))
DEVICE = "cuda:0"


def peak_over(action) -> int:
    """Bytes an action takes at most over what is allocated before it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        action()
    return torch.cuda.max_memory_allocated() - before


def transformer_line(model, shape: VideoShape, word: str) -> str:
    latents = torch.randn(1, 36, shape.latent_frames, shape.height // 8, shape.width // 8, device=DEVICE, dtype=torch.bfloat16)
    text = torch.randn(1, 512, 4096, device=DEVICE, dtype=torch.bfloat16)
    step = torch.tensor([500], device=DEVICE)
    peak = peak_over(lambda: model(hidden_states=latents, timestep=step, encoder_hidden_states=text, return_dict=False))
    planned = footprint.transformer_activation_bytes(shape, 5120, 2, fragmentation=1.0)
    return f"{shape} {word}: {peak / GIB:.2f} GiB, {peak / (shape.tokens * 5120 * 2):.2f} tensors; lean blocks planned {planned / GIB:.2f}"


def vae_lines(vae, shape: VideoShape, word: str, tiled: bool):
    video = torch.rand(1, 3, shape.num_frames, shape.height, shape.width, dtype=vae.dtype)
    latents = torch.randn(1, 16, shape.latent_frames, shape.height // 8, shape.width // 8, dtype=vae.dtype)
    vae.enable_tiling() if tiled else vae.disable_tiling()
    element = vae.dtype.itemsize
    actions = {
        False: lambda: vae.encode(video.to(DEVICE)).latent_dist.mode(),
        True: lambda: vae.decode(latents.to(DEVICE), return_dict=False),
    }
    weights = sum(p.nbytes for p in vae.parameters())
    for decode, action in actions.items():
        peak = peak_over(action) + weights
        planned = footprint.vae_bytes(shape, decode=decode, element_bytes=element, tiled=tiled)
        yield f"{shape} VAE {'decode' if decode else 'encode'} {word}{' tiled' if tiled else ''}: {peak / GIB:.2f} GiB, planned {planned / GIB:.2f}"


def main() -> None:
    model = WanTransformer3DModel(in_channels=36, out_channels=16, text_dim=4096, num_layers=2).to(DEVICE, torch.bfloat16).eval()
    for word in ("bf16, diffusers' blocks", "bf16, lean blocks"):
        for shape in SHAPES:
            print(transformer_line(model, shape, word), flush=True)
        use_lean_blocks(model)
    matrices = quantizable_weights(model)
    for storage in (torch.int8, torch.float8_e4m3fn):
        quantized = WanTransformer3DModel(in_channels=36, out_channels=16, text_dim=4096, num_layers=2).to(DEVICE, torch.bfloat16).eval()
        use_lean_blocks(quantized)
        for name in matrices:
            layer = quantized.get_submodule(name.removesuffix(".weight"))
            layer.weight = torch.nn.Parameter(quantized_weight(layer.weight.data, storage), requires_grad=False)
        print(transformer_line(quantized, SHAPES[0], str(storage)), flush=True)
        del quantized
    del model
    for dtype in (torch.float32, torch.bfloat16):
        vae = AutoencoderKLWan().to(DEVICE, dtype).eval()
        for shape in SHAPES[:2]:
            for tiled in (False, True):
                for line in vae_lines(vae, shape, str(dtype), tiled):
                    print(line, flush=True)


if __name__ == "__main__":
    main()
