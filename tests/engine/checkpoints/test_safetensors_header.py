"""Headers of files that are whole, and of files that are not: every kind of damage gets the pack's own error, before any tensor is read."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from wan_sharded.engine.checkpoints.safetensors_header import MAX_HEADER_BYTES, read_header, read_header_and_metadata
from wan_sharded.engine.errors import CheckpointError


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def tensor(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "transformer").mkdir()
    return tmp_path / "transformer" / "weights.safetensors"


def test_a_real_file(file: Path) -> None:
    tensors = {
        "a.weight": torch.zeros(3, 4),
        "b": torch.zeros(5, dtype=torch.bfloat16),
        "c": torch.zeros(2, 2, dtype=torch.float8_e4m3fn),
        "scalar": torch.tensor(1.0, dtype=torch.float16),
        "empty": torch.zeros(0, 7),
        "steps": torch.zeros(2, dtype=torch.int64),
    }
    save_file(tensors, file, metadata={"format": "pt"})
    entries, metadata = read_header_and_metadata(file)
    assert {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == {
        "a.weight": ("F32", (3, 4)),
        "b": ("BF16", (5,)),
        "c": ("F8_E4M3", (2, 2)),
        "scalar": ("F16", ()),
        "empty": ("F32", (0, 7)),
        "steps": ("I64", (2,)),
    }
    assert metadata == {"format": "pt"}
    assert all(entry.file == file and entry.key == name for name, entry in entries.items())


def test_where_the_bytes_are(file: Path) -> None:
    save_file({"first": torch.arange(5, dtype=torch.int32), "second": torch.arange(7, dtype=torch.float16)}, file)
    raw = file.read_bytes()
    for name, dtype in (("first", torch.int32), ("second", torch.float16)):
        entry = read_header(file)[name]
        values = torch.frombuffer(bytearray(raw[entry.offset : entry.offset + entry.size_bytes]), dtype=dtype)
        assert values.tolist() == list(range(entry.elements))


def test_four_bit_elements_share_bytes(file: Path) -> None:
    write(file, {"a": tensor(0, 3, (5,), "F4")}, b"\0" * 3)
    entry = read_header(file)["a"]
    assert (entry.dtype, entry.shape, entry.size_bytes) == ("F4", (5,), 3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"PK\x03\x04" + b"\0" * 40, "a pickled file"),
        (b"\x80\x02}q\x00." + b"\0" * 40, "a pickled file"),
        (b"GGUF" + b"\x03\0\0\0" * 5, "a GGUF file"),
    ],
)
def test_what_else_is_saved_under_such_names(file: Path, content: bytes, words: str) -> None:
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"no complete safetensors file \(\d+ bytes; it is .*{words}"):
        read_header(file)


BROKEN = {
    "zero bytes": lambda file: file.write_bytes(b""),
    "three bytes": lambda file: file.write_bytes(b"abc"),
    "a length and nothing else": lambda file: file.write_bytes(struct.pack("<Q", 100)),
    "an absurd length": lambda file: write(file, {}, length=2**63),
    "a length beyond the format's limit": lambda file: write(file, {}, length=MAX_HEADER_BYTES + 1),
    "a length beyond the file": lambda file: write(file, {"a": tensor()}, length=10**6),
    "a header of no bytes": lambda file: write(file, b""),
    "an error page instead of a file": lambda file: file.write_bytes(b"<html><body>Not found, sorry about that</body></html>"),
    "no JSON": lambda file: write(file, b"{'a': 1}"),
    "no text": lambda file: write(file, b"\xff\xfe\x00\x01"),
    "a list": lambda file: write(file, [1, 2]),
    "a number": lambda file: write(file, b"17"),
    "brackets without end": lambda file: write(file, b"[" * 200_000),
    "a tensor that is a number": lambda file: write(file, {"a": 5}),
    "a tensor that is null": lambda file: write(file, {"a": None}),
    "no dtype": lambda file: write(file, {"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "no shape": lambda file: write(file, {"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8),
    "no offsets": lambda file: write(file, {"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
    "one offset": lambda file: write(file, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, b"\0" * 8),
    "offsets that are words": lambda file: write(file, {"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}}, b"\0" * 8),
    "offsets that are null": lambda file: write(
        file, {"a": tensor(), "b": {"dtype": "F32", "shape": [2], "data_offsets": None}}, b"\0" * 8
    ),
    "a dtype that is a list": lambda file: write(file, {"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "an unknown dtype": lambda file: write(file, {"a": tensor(dtype="F33")}, b"\0" * 8),
    "a negative size": lambda file: write(file, {"a": tensor(shape=(-2,))}, b"\0" * 8),
    "two negative sizes": lambda file: write(file, {"a": tensor(0, 8, (-2, -1))}, b"\0" * 8),
    "a fractional size": lambda file: write(file, {"a": tensor(shape=(2.0,))}, b"\0" * 8),
    "a shape that is a word": lambda file: write(file, {"a": tensor(shape="2")}, b"\0" * 8),
    "an enormous shape": lambda file: write(file, {"a": tensor(shape=(2**40, 2**40))}, b"\0" * 8),
    "overlapping tensors": lambda file: write(file, {"a": tensor(0, 8), "b": tensor(4, 12)}, b"\0" * 12),
    "a hole between tensors": lambda file: write(file, {"a": tensor(0, 8), "b": tensor(12, 20)}, b"\0" * 20),
    "the same bytes twice": lambda file: write(file, {"a": tensor(0, 8), "b": tensor(0, 8)}, b"\0" * 8),
    "data that begins late": lambda file: write(file, {"a": tensor(8, 16)}, b"\0" * 16),
    "offsets the wrong way round": lambda file: write(file, {"a": tensor(8, 0)}, b"\0" * 8),
    "too few bytes for the shape": lambda file: write(file, {"a": tensor(0, 4)}, b"\0" * 4),
    "truncated data": lambda file: write(file, {"a": tensor(0, 8)}, b"\0" * 7),
    "something after the data": lambda file: write(file, {"a": tensor(0, 8)}, b"\0" * 9),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_damage_is_named(file: Path, damage: str) -> None:
    BROKEN[damage](file)
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    message = str(caught.value)
    # Every component's file has the same name, so the folder belongs to it.
    assert "transformer/weights.safetensors" in message
    assert "ownload" in message, "and the remedy"


def test_truncation_says_how_much_is_there(file: Path) -> None:
    write(file, {"a": tensor(0, 8)}, b"\0" * 5)
    with pytest.raises(CheckpointError, match="its tensors take 8 bytes, the file holds 5"):
        read_header(file)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_header(tmp_path / "transformer" / "weights.safetensors")


def test_a_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


def test_random_damage(file: Path) -> None:
    """Whatever happens to the bytes: a description, or our error."""
    save_file({"a.weight": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}, file, metadata={"format": "pt"})
    whole = file.read_bytes()
    dice = random.Random(0)
    refused = 0
    for _ in range(1500):
        damaged = bytearray(whole)
        for _ in range(dice.choice([1, 1, 1, 2, 8])):
            damaged[dice.randrange(len(damaged) - 58)] = dice.choice([*b'0123456789{}[]",:-eE.nulltruefalse', 0, 255, dice.randrange(256)])
        file.write_bytes(damaged)
        try:
            read_header(file)
        except CheckpointError:
            refused += 1
    assert refused > 1000


def test_names_that_can_be_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "a\0b.safetensors")


def test_half_a_character_in_a_name(file: Path) -> None:
    """It could not be written into a message."""
    with pytest.raises(CheckpointError, match="has a damaged safetensors header"):
        read_header(write(file, b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)))
