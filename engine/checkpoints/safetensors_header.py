"""Read and check a safetensors file's header before anything trusts it. Reads a few kilobytes, never the tensors."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

# The format's own limit; a longer header is damage or an attack.
MAX_HEADER_BYTES = 100_000_000

ELEMENT_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header describes it: the format's dtype name and the shape."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, by name, after checking that the file is whole.

    Raises:
        CheckpointError: missing, unreadable, no safetensors file, truncated, or with offsets that don't add up.
    """
    name = f"{path.parent.name}/{path.name}"  # the components' files all have the same name
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length_field = file.read(8)
            header_length = struct.unpack("<Q", length_field)[0] if len(length_field) == 8 else 0
            if not 2 <= header_length <= min(MAX_HEADER_BYTES, max(size - 8, 0)):
                raise CheckpointError(f"{name} is no complete safetensors file ({size} bytes). Download it again.")
            raw = file.read(header_length)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. Check the file and its permissions, or download it again."
        ) from error
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {tensor: _entry(value) for tensor, value in header.items()}
        offsets = {tensor: _offsets(value) for tensor, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{name} has a damaged safetensors header. Download it again.") from error
    _check_offsets(name, entries, offsets, size - 8 - header_length)
    return entries


def _entry(value: dict[str, Any]) -> TensorEntry:
    shape, dtype = value["shape"], value["dtype"]
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape) or not isinstance(dtype, str):
        raise ValueError("shape or dtype")
    return TensorEntry(dtype, tuple(shape))


def _offsets(value: dict[str, Any]) -> tuple[int, int]:
    begin, end = value["data_offsets"]
    if type(begin) is not int or type(end) is not int:
        raise ValueError("data_offsets")
    return begin, end


def _check_offsets(name: str, entries: dict[str, TensorEntry], offsets: dict[str, tuple[int, int]], data_bytes: int) -> None:
    """The tensors must lie one behind another and fill the file: that rules out overlaps, holes and a missing end."""
    expected_begin = 0
    for tensor, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        entry = entries[tensor]
        bits = ELEMENT_BITS.get(entry.dtype)
        if bits is None:
            raise CheckpointError(f"{name}: tensor {tensor} has the unknown dtype {entry.dtype}. Download the file again.")
        if begin != expected_begin or end - begin != (math.prod(entry.shape) * bits + 7) // 8:
            raise CheckpointError(f"{name}: tensor {tensor} has offsets that don't match its shape. Download the file again.")
        expected_begin = end
    if expected_begin != data_bytes:
        raise CheckpointError(
            f"{name} is truncated or padded: its tensors take {expected_begin} bytes, the file holds {data_bytes}. Download it again."
        )
