"""Read and check a safetensors file's header before anything trusts it. Reads a few kilobytes, never the tensors."""

import json
import math
import struct
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .stored import StoredTensor

# The format allows 100 MB, which takes many seconds and some GB to look at. Real ones have a few hundred kB, or some MB with what their author says.
MAX_HEADER_BYTES = 32_000_000

# What other things that are saved under such a name begin with.
_OTHERS = {
    b"version ": "; it is a Git LFS pointer, not the file it stands for",
    b"<": "; it is a web page",
    b"PK\x03\x04": "; it is a ZIP archive or a pickled file",
    b"\x80\x02": "; it is a pickled file",
    b"GGUF": "; it is a GGUF file",
}
ELEMENT_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip


def read_header(path: Path) -> dict[str, StoredTensor]:
    """As :func:`read_header_and_metadata`, without the metadata."""
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file, by name, after checking that the file is whole, and the texts its author put beside them.

    Raises:
        CheckpointError: missing, unreadable, no safetensors file, truncated, or with offsets that don't add up.
    """
    name = f"{path.parent.name}/{path.name}"  # the components' files all have the same name
    try:
        stat = path.stat()
        size = stat.st_size
        with path.open("rb") as file:
            length_field = file.read(8)
            header_length = struct.unpack("<Q", length_field)[0] if len(length_field) == 8 else 0
            if not 2 <= header_length <= min(MAX_HEADER_BYTES, max(size - 8, 0)):
                what = next((words for begin, words in _OTHERS.items() if length_field.startswith(begin)), "")
                raise CheckpointError(f"{name} is no complete safetensors file ({size} bytes{what}). Download it again.")
            raw = file.read(header_length)
    except (OSError, ValueError) as error:  # the latter of names that can be none
        raise CheckpointError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}. Check the file and its permissions, or download it again."
        ) from error
    data_begin = 8 + header_length
    try:
        header = json.loads(raw)
        texts = header.pop("__metadata__", None) or {}
        metadata = {str(key): value for key, value in texts.items() if isinstance(value, str)}
        entries = {tensor: _entry(path, tensor, value, data_begin, stat.st_mtime_ns) for tensor, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{name} has a damaged safetensors header. Download it again.") from error
    _check_offsets(name, entries, data_begin, size)
    return entries, metadata


def _entry(path: Path, key: str, value: dict[str, Any], data_begin: int, modified_ns: int) -> StoredTensor:
    shape, dtype = value["shape"], value["dtype"]
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape) or not isinstance(dtype, str):
        raise ValueError("shape or dtype")
    key.encode()  # half a character can't be said in a message
    begin, end = value["data_offsets"]
    if type(begin) is not int or type(end) is not int:
        raise ValueError("data_offsets")
    return StoredTensor(path, key, dtype, tuple(shape), data_begin + begin, end - begin, modified_ns=modified_ns)


def _check_offsets(name: str, entries: dict[str, StoredTensor], data_begin: int, size: int) -> None:
    """The tensors must lie one behind another and fill the file: that rules out overlaps, holes and a missing end."""
    expected = data_begin
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.size_bytes)):
        bits = ELEMENT_BITS.get(entry.dtype)
        if bits is None:
            raise CheckpointError(f"{name}: tensor {entry.key} has the unknown dtype {entry.dtype}. Download the file again.")
        if entry.offset != expected or entry.size_bytes != (math.prod(entry.shape) * bits + 7) // 8:
            raise CheckpointError(f"{name}: tensor {entry.key} has offsets that don't match its shape. Download the file again.")
        expected += entry.size_bytes
    if expected != size:
        raise CheckpointError(
            f"{name} is truncated or padded: its tensors take {expected - data_begin} bytes, the file holds {size - data_begin}. Download it again."
        )
