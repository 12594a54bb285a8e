"""How copies between devices are cut: every byte once, in few pieces of about the same size."""

import pytest
import torch
from wan_sharded.engine.parallel.links import CHUNK_BYTES, CHUNKS_OF_A_COPY, LARGEST_CHUNK_BYTES, DirectLink, _chunks

MIB = 1024**2


@pytest.mark.parametrize("size", [0, 1, 3, CHUNK_BYTES, CHUNK_BYTES + 1, 34 * MIB, 193 * MIB, 700 * MIB, 5000 * MIB + 7])
def test_chunks(size: int) -> None:
    chunks = _chunks(torch.empty(size, dtype=torch.uint8, device="meta"))
    sizes = [chunk.numel() for chunk in chunks]
    assert sum(sizes) == size and max(sizes) <= LARGEST_CHUNK_BYTES
    assert len(sizes) <= max(CHUNKS_OF_A_COPY, -(-size // LARGEST_CHUNK_BYTES))
    if size <= CHUNKS_OF_A_COPY * CHUNK_BYTES:
        assert max(sizes) <= CHUNK_BYTES
    assert max(sizes) - min(sizes) < len(sizes), "of about the same size"


def test_chunks_of_other_types_and_shapes_are_their_bytes() -> None:
    tensor = torch.randn(3, 5, 7, dtype=torch.float64)
    assert b"".join(bytes(chunk.numpy()) for chunk in _chunks(tensor)) == tensor.numpy().tobytes()


def test_a_copy_on_the_host() -> None:
    source, target = torch.randn(4, 5), torch.zeros(4, 5)
    assert DirectLink(torch.device("cpu"), torch.device("cpu")).copy(target, source, ()) is None
    assert torch.equal(target, source)
