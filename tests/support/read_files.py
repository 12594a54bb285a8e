"""Files with tensors of any bytes, for what reads them."""

from collections.abc import Callable
from pathlib import Path

import torch
from wan_sharded.engine.checkpoints.stored import StoredTensor

# What the fixture ``small_pieces`` makes a reader's pieces.
PIECE = 1000
Watch = Callable[[Callable[[int], None]], None]


def any_bytes(count: int, seed: int = 0) -> torch.Tensor:
    """None of them ends in an exponent of ones: equal bits are equal numbers then."""
    return torch.randint(0, 0x38, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def stored_in(path: Path, content: torch.Tensor, dtype: str = "U8", shape: tuple[int, ...] | None = None, offset: int = 0) -> StoredTensor:
    """A file with a tensor of these bytes at an offset, and something behind it."""
    path.write_bytes(b"\xff" * offset + content.numpy().tobytes() + b"\xff" * 5)
    return StoredTensor(path, "some.weight", dtype, (content.numel(),) if shape is None else shape, offset, content.numel())


def beside_each_other(path: Path, sizes: list[int], gap: int) -> list[StoredTensor]:
    """Tensors of one file, one behind the other with as much between them."""
    offsets = [sum(sizes[:number]) + gap * number for number in range(len(sizes))]
    path.write_bytes(any_bytes(offsets[-1] + sizes[-1] + 3, 5).numpy().tobytes())
    return [
        StoredTensor(path, f"{number}", "U8", (size,), offset, size)
        for number, (offset, size) in enumerate(zip(offsets, sizes, strict=True))
    ]


def parts_of_one_file(path: Path, count: int) -> tuple[list[StoredTensor], list[torch.Tensor], torch.Tensor]:
    """Tensors of four pieces each, room for them, and what the file has."""
    size = 4 * PIECE
    stored = beside_each_other(path, [size] * count, 0)
    content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    return stored, [torch.zeros(size, dtype=torch.uint8) for _ in range(count)], content
