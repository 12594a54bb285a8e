"""System memory that GPUs copy from: as large as asked, and what happens where it may not be page-locked.

That a GPU copies from it faster is for tests/gpu; here the driver is played.
"""

import gc
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from played_driver import PlayedDriver
from wan_sharded.engine import host_memory
from wan_sharded.engine.host_memory import SMALL_BYTES, PageLocking, host_buffer
from wan_sharded.engine.host_pool import HostPool

KIB = 1024


@pytest.mark.parametrize("size", [0, 1, 1000, 3 * KIB + 5])
def test_a_buffer_is_as_large_as_asked_to_the_byte(size: int) -> None:
    buffer = host_buffer(size)
    assert buffer.shape == (size,) and buffer.dtype == torch.uint8 and buffer.device == torch.device("cpu")
    assert buffer.fill_(7).sum() == 7 * size
    assert buffer.untyped_storage().nbytes() <= max(1, size)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> PlayedDriver:
    return PlayedDriver.installed(monkeypatch, 3 * SMALL_BYTES)


def test_a_refusal_leaves_nothing_behind_and_is_asked_for_once(driver: PlayedDriver) -> None:
    """What CUDA refused would otherwise be raised by the next kernel, as an out-of-memory of the GPU."""
    large = SMALL_BYTES + KIB
    kept = [host_buffer(large) for _ in range(4)]
    assert driver.asked == 3 and len(driver.registered) == 2 and not driver.stands
    assert all(buffer.fill_(1).sum() == large for buffer in kept), "it is memory all the same"
    assert host_buffer(KIB).shape == (KIB,) and driver.asked == 4, "small ones, which copies go through, are asked for in any case"
    kept.clear()
    gc.collect()
    assert driver.registered == {} and host_memory.PAGE_LOCKING.locked_bytes == 0
    HostPool().clear()  # memory was given back
    again = host_buffer(large)
    assert driver.asked == 5 and list(driver.registered.values()) == [large] and again.numel() == large


def test_nothing_is_locked_where_the_user_wants_none(driver: PlayedDriver) -> None:
    host_memory.PAGE_LOCKING.allowed = False
    pool = HostPool()
    assert pool.take(KIB).shape == (KIB,)
    assert driver.asked == 0 and pool.unlocked_bytes == 0, "and it is no news to them"


def test_windows_is_not_asked_for_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1024**3
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=32 * gib))
    windows, linux = PageLocking(windows=True), PageLocking(windows=False)
    windows.locked_bytes = linux.locked_bytes = 11 * gib
    assert windows.may_lock(gib // 2) and linux.may_lock(gib // 2)
    assert not windows.may_lock(gib) and linux.may_lock(4 * gib), "32 GiB: 12.8, less 1 for copies"
    windows.others_bytes = lambda: 2 * gib
    assert not windows.may_lock(gib // 2) and windows.may_lock(SMALL_BYTES)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="Linux counts a process's pages so")
def test_pages_are_there_when_they_are_locked(driver: PlayedDriver) -> None:
    """The driver would fetch them one by one."""
    there: list[int] = []
    driver.when_asked = lambda pointer, size: there.append(psutil.Process().memory_info().rss)
    before, size = psutil.Process().memory_info().rss, 2 * SMALL_BYTES
    buffer = host_buffer(size)
    assert there[0] - before > 0.9 * size and buffer.numel() == size
