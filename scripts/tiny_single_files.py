"""Write tiny, random Wan 2.2 experts as single files, in every form that people have, with the names that real files have inside.

    python scripts/tiny_single_files.py FOLDER [FORM ...]

FOLDER also gets ``diffusers``, the model whose experts they are. Heads are 128 wide, as Wan's always are, so that the configuration can be
told from the weights; everything else is small. Used by the ``tiny_single_files`` fixture of the tests.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from tiny_checkpoint import make_tiny_checkpoint

HEAD_DIM = 128
FORMS = (
    "original_fp32",
    "original_fp16",
    "original_bf16",
    "diffusers_bf16",
    "prefixed_bf16",
    "fp8",
    "fp8_e5m2",
    "fp8_scaled_old",
    "fp8_scaled_new",
    "fp8_scaled_metadata",
    "int8_scaled",
    "gguf_bf16",
    "gguf_q8_0",
    "gguf_q4_0",
    "gguf_q4_k",
)
EXPERTS = {"transformer": "high", "transformer_2": "low"}

# Diffusers' names and Wan's own.
ORIGINAL = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".o.",
    ".norm2.": ".norm3.",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    ".scale_shift_table": ".modulation",
}
# Where in a block of these formats its float16 scale lies, where that of the minimum, and how much larger the latter is on average: they
# can't be made by the gguf package.
K_QUANTS = {
    "Q2_K": (80, 82, 1.5),
    "Q3_K": (108, None, 0.0),
    "Q4_K": (0, 2, 7.5),
    "Q5_K": (0, 2, 15.5),
    "Q6_K": (208, None, 0.0),
    "IQ4_NL": (0, None, 0.0),
    "IQ4_XS": (0, None, 0.0),
}


def original_name(name: str) -> str:
    """Wan's own name of a parameter, from diffusers'."""
    if name == "scale_shift_table":
        return "head.modulation"
    for ours, wan in ORIGINAL.items():
        name = name.replace(ours, wan)
    return name


def file_names(form: str) -> dict[str, str]:
    """Expert -> what its file in this form is called, like the real ones: "transformer" is the high noise expert."""
    if form.startswith("gguf_"):
        kind = form.removeprefix("gguf_").upper()
        return {part: f"Wan2.2-I2V-A14B-{level.capitalize()}Noise-{kind}.gguf" for part, level in EXPERTS.items()}
    return {part: f"wan2.2_i2v_{level}_noise_14B_{form}.safetensors" for part, level in EXPERTS.items()}


def write_expert_file(path: Path, expert: WanTransformer3DModel, form: str) -> None:
    """Write one expert in one of ``FORMS``, or "gguf_" and any type that is widened, as "gguf_iq4_nl"."""
    weights = {name: tensor.float() for name, tensor in expert.state_dict().items()}
    if form.startswith("gguf_"):
        _write_gguf(path, {original_name(name): tensor for name, tensor in weights.items()}, form.removeprefix("gguf_").upper())
        return
    metadata = {"format": "pt"}
    if form.startswith(("original_", "diffusers_", "prefixed_")):
        naming, _, precision = form.partition("_")
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        prefix = "model.diffusion_model." if naming == "prefixed" else ""
        name_of = str if naming == "diffusers" else original_name
        tensors = {prefix + name_of(name): tensor.to(dtype) for name, tensor in weights.items()}
    else:
        tensors = _quantized({original_name(name): tensor for name, tensor in weights.items()}, form, metadata)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def _is_matrix(tensor: torch.Tensor) -> bool:
    """Whether it is a Linear's weight; all of them are, but for the embedding of patches."""
    return tensor.ndim == 2


def _quantized(weights: dict[str, torch.Tensor], form: str, metadata: dict[str, str]) -> dict[str, torch.Tensor]:
    """fp8 and int8, as ComfyUI has written and writes them."""
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, dict[str, str]] = {}
    for name, tensor in weights.items():
        module = name.removesuffix(".weight")
        if not _is_matrix(tensor):
            tensors[name] = tensor.to(torch.float16)
        elif form in ("fp8", "fp8_e5m2"):
            tensors[name] = tensor.to(torch.float8_e4m3fn if form == "fp8" else torch.float8_e5m2)
        elif form == "int8_scaled":
            scale = tensor.abs().amax(dim=1, keepdim=True) / 127
            tensors[name] = (tensor / scale).round().to(torch.int8)
            tensors[f"{module}.weight_scale"] = scale
            tensors[f"{module}.comfy_quant"] = _mark({"format": "int8_tensorwise"})
        else:
            scale = tensor.abs().max() / 448
            tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
            if form == "fp8_scaled_old":
                tensors[f"{module}.scale_weight"] = scale
                tensors[f"{module}.scale_input"] = torch.ones(())
                continue
            tensors[f"{module}.weight_scale"] = scale
            if form == "fp8_scaled_new":
                tensors[f"{module}.input_scale"] = torch.ones(())
                tensors[f"{module}.comfy_quant"] = _mark({"format": "float8_e4m3fn"})
            elif form == "fp8_scaled_metadata":
                layers[module] = {"format": "float8_e4m3fn"}
            else:
                raise ValueError(f"{form} is none of {', '.join(FORMS)}")
    if form == "fp8_scaled_old":
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    if layers:
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    return tensors


def _mark(described: dict[str, str]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)


def _write_gguf(path: Path, weights: dict[str, torch.Tensor], kind: str) -> None:
    """As ComfyUI-GGUF's tools do: the blocks' matrices in ``kind``, the other ones in float16, everything else in float32."""
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    generator = numpy.random.default_rng(0)
    for name, tensor in weights.items():
        values = tensor.numpy()
        if not _is_matrix(tensor):
            if kind.endswith("_K") and name.endswith("modulation"):
                values = values[0]  # llama.cpp, which makes the K quants, drops what is 1 in front
            writer.add_tensor(name, values)
        elif not name.startswith("blocks."):
            writer.add_tensor(name, values.astype(numpy.float16))
        else:
            # Real files mix types, too.
            mixed = "Q6_K" if kind == "Q4_K" and name.endswith((".v.weight", "ffn.2.weight")) else kind
            which = gguf.GGMLQuantizationType[mixed]
            data = _k_quantized(values, which, generator) if mixed in K_QUANTS else gguf.quants.quantize(values, which)
            writer.add_tensor(name, data, raw_dtype=which)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _k_quantized(values: numpy.ndarray, kind: Any, generator: numpy.random.Generator) -> numpy.ndarray:
    """Valid blocks for a matrix of this shape, uint8 [out, bytes of a row]: random, but of the size weights have."""
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, blocks = values.shape[0], values.shape[1] // block_elements
    data = generator.integers(0, 256, (rows, blocks, block_bytes), dtype=numpy.uint8)
    scale_at, minimum_at, ratio = K_QUANTS[kind.name]

    def with_scale(scale: float) -> numpy.ndarray:
        for at, value in ((scale_at, scale), (minimum_at, scale * ratio)):
            if at is not None:
                data[:, :, at : at + 2] = numpy.frombuffer(numpy.float16(value).tobytes(), numpy.uint8)
        return data.reshape(rows, -1)

    deviation = gguf.quants.dequantize(with_scale(1.0), kind).std()
    return with_scale(1 / (math.sqrt(values.shape[1]) * deviation))


def make_tiny_single_files(folder: str | Path, forms: tuple[str, ...] = FORMS, *, seed: int = 0) -> Path:
    """Write both experts in each form, and ``diffusers`` with the model they are of; returns the folder."""
    folder = Path(folder)
    model = make_tiny_checkpoint(folder / "diffusers", seed=seed, num_blocks=3, num_heads=2, head_dim=HEAD_DIM)
    for part in EXPERTS:
        expert = WanTransformer3DModel.from_pretrained(model / part)
        for form in forms:
            write_expert_file(folder / file_names(form)[part], expert, form)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("forms", nargs="*", metavar="FORM", help=f"some of {', '.join(FORMS)}; all by default")
    arguments = parser.parse_args()
    folder = make_tiny_single_files(arguments.folder, tuple(arguments.forms) or FORMS)
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
