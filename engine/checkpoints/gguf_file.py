"""Read and check a GGUF file's header before anything trusts it: names, types, shapes, offsets. Reads the header, never the tensors.

The header is read here and not by the ``gguf`` package, which believes every count and length that a file claims. The package knows the
types, and is what widens them later.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError, UnsupportedError
from .stored import GGUF_PREFIX, StoredTensor

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Far above what any model has; what is beyond is damage or an attack.
MAX_TENSORS = MAX_FIELDS = 65_536
MAX_NAME_BYTES = 1024
MAX_TEXTS = 1_000_000
MAX_ALIGNMENT = 2**20
_MAX_DIMS = 8
# ComfyUI-GGUF keeps the shape of what it had to reshape here, in torch's order.
_SHAPE_FIELD = "comfy.gguf.orig_shape."
_PLAIN = ("F32", "F16", "BF16")
_UINT32, _INT32, _TEXT, _ARRAY = 4, 5, 8, 9
# Of the values of a field, by their type: unsigned and signed bytes, shorts, ints, float, bool, then the long ones.
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, _UINT32: 4, _INT32: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class _Damaged(Exception):
    """What is wrong, to be read behind the file's name."""


def read_gguf_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a GGUF file, by name, after checking that the file is whole. Shapes are in torch's order, [out, in].

    Raises:
        CheckpointError: missing, unreadable, no GGUF file of a known version, truncated, or with a header that can't be true.
        UnsupportedError: the ``gguf`` package is not installed.
    """
    types = _types()
    try:
        stat = path.stat()
        with path.open("rb") as file:
            return _Header(path, file, stat.st_size, stat.st_mtime_ns, types).tensors()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check the file and its permissions.") from error
    except _Damaged as error:
        raise CheckpointError(f"{path.name} is no whole GGUF file: {error}. Download it again.") from error


def check_widenable(name: str, tensors: Mapping[str, StoredTensor]) -> None:
    """Check that every tensor has a type that can be computed with.

    Raises:
        CheckpointError: one has not, with its name and type.
    """
    known = widenable_types()
    for key, stored in tensors.items():
        gguf_type = stored.gguf_type
        if gguf_type is not None and gguf_type not in known:
            raise CheckpointError(
                f"{name}: {key} is of the GGUF type {gguf_type}, which can't be widened here. Choose another version of the model, such as "
                f"Q4_K_M, Q5_K_M, Q6_K or Q8_0 (can be widened: {', '.join(sorted(known))})."
            )


@cache
def widenable_types() -> frozenset[str]:
    """The quantized GGUF types that the installed diffusers widens."""
    _types()
    from diffusers.quantizers.gguf import utils

    functions: Any = utils.dequantize_functions
    return frozenset(kind.name for kind in functions) - frozenset(_PLAIN)


@dataclass(frozen=True)
class _Type:
    """``block_elements`` values take ``block_bytes``."""

    name: str
    block_elements: int
    block_bytes: int


@cache
def _types() -> dict[int, _Type]:
    """GGUF's tensor types, by their number in files."""
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedError("GGUF files need the package gguf. Install it with `pip install gguf` and restart.") from error
    return {int(kind): _Type(kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


@dataclass(frozen=True)
class _Entry:
    """A tensor as the header describes it; ``begin`` counts from where the data begins."""

    key: str
    shape: tuple[int, ...]
    kind: _Type
    begin: int
    size_bytes: int


class _Header:
    """Reads one header from the front; nothing is read or allocated that the file is too short for."""

    def __init__(self, path: Path, file: BinaryIO, size: int, modified_ns: int, types: Mapping[int, _Type]):
        self._path, self._file, self._size, self._modified_ns, self._types = path, file, size, modified_ns, types
        self._texts_left = MAX_TEXTS
        self._alignment = 32
        self._shapes: dict[str, tuple[int, ...]] = {}

    def tensors(self) -> dict[str, StoredTensor]:
        if self._take(len(MAGIC)) != MAGIC:
            raise _Damaged("it does not begin with GGUF")
        version = self._number("<I")
        if version not in _VERSIONS:
            big_endian = ", or is big-endian" if version & 0xFFFF == 0 else ""
            raise _Damaged(f"it is of version {version}{big_endian}; versions 2 and 3 can be read")
        tensor_count, field_count = self._number("<Q"), self._number("<Q")
        if tensor_count > MAX_TENSORS or field_count > MAX_FIELDS:
            raise _Damaged(f"it claims {tensor_count} tensors and {field_count} fields")
        for _ in range(field_count):
            self._field()
        entries = [self._entry() for _ in range(tensor_count)]
        data_begin = -(-self._file.tell() // self._alignment) * self._alignment
        self._check_places(entries, data_begin)
        return {entry.key: self._stored(entry, data_begin) for entry in entries}

    # ---- values

    def _take(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise _Damaged("it ends within its header")
        taken = self._file.read(count)
        if len(taken) != count:
            raise _Damaged("it became shorter while it was read")
        return taken

    def _skip(self, count: int) -> None:
        if count > self._size - self._file.tell():
            raise _Damaged("it ends within its header")
        self._file.seek(count, 1)

    def _number(self, form: str) -> int:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _name(self) -> str:
        length = self._number("<Q")
        if length > MAX_NAME_BYTES:
            raise _Damaged(f"a name in it is {length} bytes long")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Damaged("a name in it is no text") from error

    # ---- fields, of which only two matter here

    def _field(self) -> None:
        key, kind = self._name(), self._number("<I")
        if key == "general.alignment":
            if kind != _UINT32:
                raise _Damaged("its general.alignment is no number")
            self._alignment = self._number("<I")
            if not 0 < self._alignment <= MAX_ALIGNMENT or self._alignment & (self._alignment - 1):
                raise _Damaged(f"its general.alignment is {self._alignment}")
        elif kind == _ARRAY:
            self._array(key)
        else:
            self._skip_values(kind, 1)

    def _array(self, key: str) -> None:
        kind, count = self._number("<I"), self._number("<Q")
        if key.startswith(_SHAPE_FIELD):
            if kind != _INT32 or count > _MAX_DIMS:
                raise _Damaged(f"{key} is no shape")
            self._shapes[key.removeprefix(_SHAPE_FIELD)] = tuple(self._number("<i") for _ in range(count))
        else:
            self._skip_values(kind, count)

    def _skip_values(self, kind: int, count: int) -> None:
        if kind != _TEXT:
            if kind not in _VALUE_BYTES:
                raise _Damaged(f"a field in it has the unknown type {kind}")
            self._skip(count * _VALUE_BYTES[kind])
            return
        self._texts_left -= count
        if self._texts_left < 0:
            raise _Damaged(f"it claims more than {MAX_TEXTS} texts")
        for _ in range(count):
            self._skip(self._number("<Q"))

    # ---- tensors

    def _entry(self) -> _Entry:
        key, dims_count = self._name(), self._number("<I")
        if dims_count > _MAX_DIMS:
            raise _Damaged(f"{key} has {dims_count} dimensions")
        shape = tuple(reversed([self._number("<Q") for _ in range(dims_count)]))
        number, begin = self._number("<I"), self._number("<Q")
        kind = self._types.get(number)
        if kind is None:
            raise _Damaged(f"{key} has the type {number}, which the installed gguf package does not know (`pip install -U gguf` may help)")
        elements = math.prod(shape)
        kept = self._shapes.get(key)
        if kept is not None:
            if math.prod(kept) != elements or min(kept, default=0) < 0:
                raise _Damaged(f"the shape of {key} is both {list(shape)} and {list(kept)}")
            shape = kept
        if elements % kind.block_elements or (shape and shape[-1] % kind.block_elements):
            raise _Damaged(f"the rows of {key}, of shape {list(shape)}, do not fill blocks of {kind.name}")
        return _Entry(key, shape, kind, begin, elements // kind.block_elements * kind.block_bytes)

    def _check_places(self, entries: list[_Entry], data_begin: int) -> None:
        """No two tensors may share bytes or a name, and all must lie inside the file."""
        if len({entry.key for entry in entries}) != len(entries):
            raise _Damaged("it holds two tensors of one name")
        free = 0
        for entry in sorted(entries, key=lambda entry: (entry.begin, entry.size_bytes)):
            if entry.begin < free:
                raise _Damaged(f"{entry.key} shares bytes with another tensor")
            free = entry.begin + entry.size_bytes
        if data_begin + free > self._size:
            raise _Damaged(f"its tensors end at byte {data_begin + free}, the file at {self._size}")

    def _stored(self, entry: _Entry, data_begin: int) -> StoredTensor:
        dtype = entry.kind.name if entry.kind.name in _PLAIN else f"{GGUF_PREFIX}{entry.kind.name}"
        return StoredTensor(
            self._path, entry.key, dtype, entry.shape, data_begin + entry.begin, entry.size_bytes, modified_ns=self._modified_ns
        )
