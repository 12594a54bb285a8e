"""Read and check a safetensors file's header before anything trusts it. Reads a few kilobytes, never the tensors."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

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
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length_field = file.read(8)
            header_length = struct.unpack("<Q", length_field)[0] if len(length_field) == 8 else 0
            if not 2 <= header_length <= min(MAX_HEADER_BYTES, max(size - 8, 0)):
                raise CheckpointError(f"{path.name} is no complete safetensors file ({size} bytes). Download it again.")
            raw = file.read(header_length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check the file and its permissions.") from error
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {name: _entry(value) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path.name} has a damaged safetensors header. Download it again.") from error
    _check_offsets(path, {name: header[name] for name in entries}, size - 8 - header_length)
    return entries


def _entry(value: dict) -> TensorEntry:
    shape = tuple(value["shape"])
    if any(not isinstance(n, int) or n < 0 for n in shape):
        raise ValueError("shape")
    return TensorEntry(str(value["dtype"]), shape)


def _check_offsets(path: Path, header: dict, data_bytes: int) -> None:
    expected_begin = 0
    for name, value in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = value["data_offsets"]
        count = 1
        for n in value["shape"]:
            count *= n
        bits = ELEMENT_BITS.get(value["dtype"])
        if bits is None:
            raise CheckpointError(f"{path.name}: tensor {name} has the unknown dtype {value['dtype']}. Download the file again.")
        if begin != expected_begin or end - begin != (count * bits + 7) // 8:
            raise CheckpointError(f"{path.name}: tensor {name} has offsets that don't match its shape. Download the file again.")
        expected_begin = end
    if expected_begin != data_bytes:
        raise CheckpointError(
            f"{path.name} is truncated or padded: its tensors take {expected_begin} bytes, the file holds {data_bytes}. Download it again."
        )
