"""What real Wan files have inside, as facts, and files with such headers and no values.

Names, shapes and counts are those of the published files. Everything takes smaller sizes, too.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

from wan_sharded.engine.checkpoints.stored import StoredTensor

BITS = {"F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "F4": 4}
Described = dict[str, tuple[str, tuple[int, ...]]]
SMALL = {"blocks": 2, "width": 128, "ffn": 256, "text": 32}


def i2v_expert(
    dtype: str = "BF16", *, blocks: int = 40, width: int = 5120, ffn: int = 13824, text: int = 4096, channels: int = 36, out: int = 16
) -> Described:
    """The 1,095 tensors of a Wan 2.2 I2V A14B expert in Wan's own names; T2V differs in its ``channels``, TI2V 5B in ``out`` as well."""
    shapes: dict[str, tuple[int, ...]] = {"patch_embedding.weight": (width, channels, 1, 2, 2), "patch_embedding.bias": (width,)}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    linear("text_embedding.0", width, text)
    linear("text_embedding.2", width, width)
    linear("time_embedding.0", width, 256)
    linear("time_embedding.2", width, width)
    linear("time_projection.1", 6 * width, width)
    for block in range(blocks):
        name = f"blocks.{block}"
        for attention in ("self_attn", "cross_attn"):
            for letter in "qkvo":
                linear(f"{name}.{attention}.{letter}", width, width)
            shapes[f"{name}.{attention}.norm_q.weight"] = shapes[f"{name}.{attention}.norm_k.weight"] = (width,)
        shapes[f"{name}.norm3.weight"] = shapes[f"{name}.norm3.bias"] = (width,)
        linear(f"{name}.ffn.0", ffn, width)
        linear(f"{name}.ffn.2", width, ffn)
        shapes[f"{name}.modulation"] = (1, 6, width)
    linear("head.head", 4 * out, width)
    shapes["head.modulation"] = (1, 2, width)
    return {name: (dtype, shape) for name, shape in shapes.items()}


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the official fp8 files have it as fp8: the matrices of the blocks."""
    return name.startswith("blocks.") and len(shape) == 2


def fp8_scaled(*, suffix: str = "scale_weight", weight: str = "F8_E4M3", scale_shape: tuple[int, ...] = (), **sizes: int) -> Described:
    """The same, its blocks' matrices in fp8 with a scale each."""
    described: Described = {}
    for name, (_, shape) in i2v_expert(**sizes).items():
        described[name] = (weight if is_quantized(name, shape) else "F16", shape)
        if is_quantized(name, shape):
            described[f"{name.removesuffix('weight')}{suffix}"] = ("F32", scale_shape)
    return described


def i2v_21(**sizes: int) -> Described:
    """Wan 2.1 I2V: an expert, and what looks at the picture through CLIP."""
    described = i2v_expert(**sizes)
    width = described["patch_embedding.bias"][1][0]
    described["img_emb.proj.0.weight"] = ("BF16", (1280,))
    described["img_emb.proj.1.weight"] = ("BF16", (1280, 1280))
    described["img_emb.proj.3.weight"] = ("BF16", (width, 1280))
    described["img_emb.proj.4.weight"] = ("BF16", (width,))
    for block in range(sizes["blocks"]):
        described[f"blocks.{block}.cross_attn.k_img.weight"] = ("BF16", (width, width))
        described[f"blocks.{block}.cross_attn.v_img.weight"] = ("BF16", (width, width))
        described[f"blocks.{block}.cross_attn.norm_k_img.weight"] = ("BF16", (width,))
    return described


def as_stored(described: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, StoredTensor]:
    """As a header reader describes them, without any file."""
    return {name: StoredTensor(Path("nowhere"), name, dtype, shape, 0, 0) for name, (dtype, shape) in described.items()}


def write_safetensors(
    path: Path,
    described: Mapping[str, tuple[str, tuple[int, ...]]],
    *,
    metadata: Mapping[str, str] | None = None,
    values: Mapping[str, bytes] | None = None,
) -> Path:
    """A whole safetensors file with these tensors. They are zero, and take no room on most disks, but for some ``values``."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    places: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in described.items():
        places[name] = end
        end += (math.prod(shape) * BITS[dtype] + 7) // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [places[name], end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
        for name, value in (values or {}).items():
            file.seek(8 + len(raw) + places[name])
            file.write(value)
    return path
