"""System memory that is kept for the next part, up to a limit, and then given back. Page-locking needs a GPU and is not tested here."""

import weakref

import pytest
import torch
from wan_sharded.engine.weights.host_memory import HostPool, host_buffer

KIB = 1024


@pytest.mark.parametrize("size", [0, 1, 1000, 3 * KIB + 5])
def test_a_buffer_is_as_large_as_asked_to_the_byte(size: int) -> None:
    buffer = host_buffer(size)
    assert buffer.shape == (size,) and buffer.dtype == torch.uint8 and buffer.device == torch.device("cpu")
    assert buffer.fill_(7).sum() == 7 * size
    assert buffer.untyped_storage().nbytes() <= max(1, size)


def test_what_came_back_is_used_again() -> None:
    pool = HostPool()
    first, second = pool.take(KIB), pool.take(KIB)
    assert first.data_ptr() != second.data_ptr(), "never the same to two"
    pool.give(first)
    assert pool.unused_bytes == KIB
    assert pool.take(KIB) is first
    assert pool.unused_bytes == 0
    assert pool.take(KIB) is not first


def test_only_the_same_size_is_used_again() -> None:
    """Blocks of a model are of one size; a larger buffer would hold memory that nothing needs."""
    pool = HostPool()
    buffers = {size: pool.take(size) for size in (KIB, 2 * KIB, 3 * KIB)}
    for buffer in buffers.values():
        pool.give(buffer)
    assert pool.take(2 * KIB) is buffers[2 * KIB]
    assert pool.take(KIB + 1).numel() == KIB + 1
    assert pool.unused_bytes == 4 * KIB


def test_no_more_is_kept_than_the_limit() -> None:
    pool = HostPool(keep_bytes=5 * KIB)
    buffers = [pool.take(2 * KIB) for _ in range(4)]
    memories = [weakref.ref(buffer) for buffer in buffers]
    while buffers:
        pool.give(buffers.pop())
    assert pool.unused_bytes == 4 * KIB
    assert sum(memory() is not None for memory in memories) == 2, "the others are the system's again"
    pool.give(host_buffer(KIB))
    assert pool.unused_bytes == 5 * KIB, "up to the limit"
    pool.give(host_buffer(1))
    assert pool.unused_bytes == 5 * KIB


def test_a_pool_that_keeps_nothing() -> None:
    pool = HostPool(keep_bytes=0)
    pool.give(pool.take(KIB))
    assert pool.unused_bytes == 0


def test_clearing_gives_everything_back() -> None:
    pool = HostPool()
    buffer = pool.take(KIB)
    memory = weakref.ref(buffer)
    pool.give(buffer)
    del buffer
    assert memory() is not None
    pool.clear()
    assert pool.unused_bytes == 0 and memory() is None
    assert pool.take(KIB).numel() == KIB
