"""Memory that is kept for the next part, up to a limit, and then given back; page-locked behind what is read, or made ahead. The driver is
played.
"""

import gc
import threading
import time
import weakref

import pytest
import torch
from played_driver import PlayedDriver
from wan_sharded.engine import host_memory
from wan_sharded.engine.host_memory import SMALL_BYTES, PageLocking, host_buffer
from wan_sharded.engine.host_pool import HostPool

KIB = 1024


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> PlayedDriver:
    return PlayedDriver.installed(monkeypatch, 3 * SMALL_BYTES)


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


# ---- locked later


def test_what_is_to_be_locked_later_is_when_it_is_filled(driver: PlayedDriver) -> None:
    pool, read = HostPool(), threading.Event()
    buffer = pool.take(KIB, locked=False)
    assert driver.asked == 0
    pool.lock_behind(buffer, read.wait)
    assert pool.unfilled_bytes == KIB and driver.asked == 0
    read.set()
    pool.finish()
    assert pool.unfilled_bytes == 0 and list(driver.registered) == [buffer.data_ptr()]
    del buffer
    gc.collect()
    assert driver.registered == {}, "the driver knows it no longer than it is there"


def test_what_was_not_filled_is_not_locked_and_goes(driver: PlayedDriver) -> None:
    pool = HostPool()
    buffer = pool.take(KIB, locked=False)
    memory = weakref.ref(buffer)
    pool.lock_behind(buffer, lambda: False)
    del buffer
    pool.finish()
    gc.collect()
    assert driver.asked == 0 and pool.unfilled_bytes == 0 and memory() is None


def test_a_buffer_is_locked_once_however_often_it_is_used(driver: PlayedDriver) -> None:
    """The driver refuses what it has locked already, and nothing would be locked after that."""
    pool = HostPool()
    for locked in (False, False, True):
        buffer = pool.take(2 * SMALL_BYTES, locked=locked)
        pool.lock_behind(buffer, lambda: True)
        pool.finish()
        pool.give(buffer)
    assert driver.asked == 1 and pool.unused_bytes == 2 * SMALL_BYTES
    fresh = pool.take(KIB)
    pool.lock_behind(fresh, lambda: True)
    pool.finish()
    assert driver.asked == 2, "it was locked as it was made"


def test_what_can_not_be_locked_later_is_said_and_asked_for_once(driver: PlayedDriver) -> None:
    pool = HostPool()
    buffers = [pool.take(SMALL_BYTES + KIB, locked=False) for _ in range(4)]
    for buffer in buffers:
        pool.lock_behind(buffer, lambda: True)
    pool.finish()
    assert driver.asked == 3 and len(driver.registered) == 2 and pool.unlocked_bytes == 2 * (SMALL_BYTES + KIB)


def test_nothing_is_locked_later_either_where_the_user_wants_none(driver: PlayedDriver) -> None:
    host_memory.PAGE_LOCKING.allowed = False
    pool = HostPool()
    pool.lock_behind(pool.take(KIB, locked=False), lambda: True)
    pool.finish()
    assert driver.asked == 0 and pool.unlocked_bytes == 0


def test_what_came_back_before_it_was_locked_is_when_it_must_be(driver: PlayedDriver) -> None:
    """What was to be read into it failed, say."""
    pool = HostPool()
    for pinned, locked in ((False, False), (True, True), (True, False)):
        buffer = pool.take(KIB, locked=locked)
        assert buffer.is_pinned() == pinned
        pool.give(buffer)
    assert driver.asked == 1
    driver.most_bytes = 0
    pool.give(pool.take(2 * KIB, locked=False))
    pool.take(2 * KIB)
    assert driver.asked == 2 and pool.unlocked_bytes == 2 * KIB


def test_what_came_back_while_it_is_locked_is_waited_for(driver: PlayedDriver) -> None:
    pool, begun = HostPool(), threading.Event()
    driver.when_asked = lambda pointer, size: begun.set() or time.sleep(0.1)
    buffer = pool.take(KIB, locked=False)
    pool.lock_behind(buffer, lambda: True)
    assert begun.wait(timeout=30)
    pool.give(buffer)
    assert pool.take(KIB) is buffer and buffer.is_pinned()


def test_what_was_made_ahead_is_taken_whoever_takes_it(driver: PlayedDriver) -> None:
    pool = HostPool()
    pool.prepare(KIB)
    pool.take(2 * KIB)
    ahead = pool._ahead
    assert pool.take(KIB, locked=False) is ahead[1].result()  # type: ignore[index]


def test_clearing_waits_for_what_is_being_read(driver: PlayedDriver) -> None:
    """And gives everything back if that is interrupted."""
    pool, read = HostPool(), threading.Event()
    pool.give(pool.take(2 * KIB))
    pool.lock_behind(pool.take(KIB, locked=False), lambda: read.wait(0.1))
    pool.clear()
    assert pool.unfilled_bytes == pool.unused_bytes == 0

    def interrupted() -> None:
        raise KeyboardInterrupt

    pool.give(pool.take(2 * KIB))
    pool.finish = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        pool.clear()
    assert pool.unused_bytes == 0


def test_what_waits_to_be_locked_needs_no_thread(driver: PlayedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    pool = HostPool()
    monkeypatch.setattr(threading.Thread, "start", refused)
    buffers = [pool.take(KIB, locked=False) for _ in range(2)]
    for buffer in buffers:
        pool.lock_behind(buffer, lambda: True)
    assert driver.asked == 0
    pool.finish()
    assert driver.asked == 2 and pool.unfilled_bytes == 0


def test_an_error_of_the_other_thread_does_no_harm(driver: PlayedDriver, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> bool:
        raise MemoryError("none left")

    pool = HostPool()
    buffer, later = pool.take(3 * KIB, locked=False), pool.take(KIB, locked=False)
    memory = weakref.ref(buffer)
    pool.lock_behind(buffer, fails)
    pool.lock_behind(later, lambda: True)
    del buffer
    pool.finish()
    assert pool.unfilled_bytes == 0 and later.is_pinned() and pool.unlocked_bytes == 3 * KIB
    assert "could not be page-locked" in caplog.text and "none left" in caplog.text
    caplog.clear()
    assert memory() is None


def test_an_interrupted_wait_leaves_none_waiting(driver: PlayedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no threads, whoever waits does it."""

    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    def interrupted() -> bool:
        raise KeyboardInterrupt

    pool = HostPool()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        pool.lock_behind(pool.take(KIB, locked=False), interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.finish()
    assert pool.unfilled_bytes == 0
    later = pool.take(KIB, locked=False)
    pool.lock_behind(later, lambda: True)
    pool.finish()
    assert later.is_pinned()


# ---- made ahead


@pytest.fixture
def makers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that made buffers."""
    found: list[str] = []

    def watched(size: int) -> torch.Tensor:
        found.append(threading.current_thread().name)
        return host_buffer(size)

    monkeypatch.setattr(host_memory, "host_buffer", watched)
    return found


def answering(monkeypatch: pytest.MonkeyPatch, answers: list[torch.Tensor | BaseException]) -> None:
    """Each time that memory is made, the next of these: a buffer, or what is raised."""

    def buffer(size: int) -> torch.Tensor:
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(host_memory, "host_buffer", buffer)


def test_what_was_prepared_is_made_behind_the_next_one(makers: list[str]) -> None:
    """By another thread, while this one uses what it took; once, however often it is asked for."""
    here, pool = threading.current_thread().name, HostPool()
    pool.prepare(KIB)
    pool.prepare(KIB)
    first = pool.take(KIB)
    assert pool._ahead is not None and makers[0] == here
    second = pool.take(KIB)
    assert first.numel() == second.numel() == KIB and first.data_ptr() != second.data_ptr()
    assert makers == [here, "wan-sharded-memory"]
    assert pool.take(KIB).numel() == KIB and makers == [here, "wan-sharded-memory", here]


def test_what_waits_unused_is_not_made_again(makers: list[str]) -> None:
    pool = HostPool()
    buffers = [pool.take(KIB) for _ in range(2)]
    for buffer in buffers:
        pool.give(buffer)
    makers.clear()
    pool.prepare(KIB)
    assert pool.take(KIB) is buffers[0] and pool.take(KIB) is buffers[1]
    assert makers == []


def test_prepared_in_vain() -> None:
    """Another size is wanted, or nothing: its memory is the system's again."""
    pool = HostPool()
    for no_use in (lambda: pool.take(2 * KIB), pool.clear, pool.forget_prepared):
        pool.prepare(KIB)
        pool.take(3 * KIB)
        memory = weakref.ref(pool._ahead[1].result())  # type: ignore[index]
        no_use()
        gc.collect()
        assert memory() is None
    pool.prepare(KIB)
    pool.forget_prepared()
    pool.take(KIB)
    assert pool._ahead is None


def test_no_memory_for_what_was_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes it hears of it, if there still is none."""
    answers = [host_buffer(1), MemoryError("none ahead"), host_buffer(KIB), host_buffer(1), MemoryError("none ahead"), MemoryError("none")]
    answering(monkeypatch, answers)
    pool = HostPool()
    pool.prepare(KIB)
    assert pool.take(1).numel() == 1 and pool.take(KIB).numel() == KIB
    pool.prepare(KIB)
    assert pool.take(1).numel() == 1
    with pytest.raises(MemoryError, match="^none$"):
        pool.take(KIB)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("the driver's"), KeyboardInterrupt()], ids=lambda error: type(error).__name__
)
def test_whatever_goes_wrong_in_the_other_thread_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    answers = [host_buffer(1), error, host_buffer(KIB)]
    answering(monkeypatch, answers)
    pool = HostPool()
    pool.prepare(KIB)
    pool.take(1)
    assert pool.prepared_bytes == 0
    assert pool.take(KIB).numel() == KIB


def test_a_system_without_threads(monkeypatch: pytest.MonkeyPatch, makers: list[str]) -> None:
    """It is made when it is needed, then."""

    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    pool = HostPool()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        pool.prepare(KIB)
        assert pool.take(KIB).numel() == KIB
        pool.forget_prepared()
    assert pool.prepared_bytes == 0 and pool.take(KIB).numel() == KIB
    assert makers == [threading.current_thread().name] * 2


def test_one_at_a_time(makers: list[str]) -> None:
    """What is under way is not begun again where something else served in between; and it counts as held."""
    pool = HostPool()
    waiting = pool.take(2 * KIB)
    pool.prepare(KIB)
    pool.take(3 * KIB)
    ahead = pool._ahead
    assert pool.prepared_bytes == KIB
    pool.give(waiting)
    pool.prepare(KIB)
    assert pool.take(2 * KIB) is waiting and pool._ahead is ahead
    assert pool.take(KIB) is ahead[1].result() and pool.prepared_bytes == 0  # type: ignore[index]


def test_what_was_made_ahead_counts_as_not_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(PageLocking, "may_lock", lambda self, size: False)
    pool = HostPool()
    pool.prepare(KIB)
    pool.take(1)
    pool.take(KIB)
    assert pool.unlocked_bytes == KIB + 1
