"""Reads by the C library's threads: the library is played where it has to fail or to wait.

What they have in common with Python's threads is in test_reading_ahead.py, what a real GPU gets in tests/gpu/test_single_files.py.
"""

import dataclasses
import errno
import gc
import io
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from played_library import PlayedCalls, Wanted, all_buffers_are_back
from played_streams import PlayedCopies, PlayedStream
from read_files import PIECE
from wan_sharded.engine.errors import CheckpointError
from wan_sharded.engine.weights import library_reads
from wan_sharded.engine.weights.errands import Errand, Errands
from wan_sharded.engine.weights.library_calls import asynchronous_reads
from wan_sharded.engine.weights.library_reads import Buffers, LibraryReads

pytestmark = [pytest.mark.usefixtures("small_pieces"), pytest.mark.timeout(60)]
needs_library = pytest.mark.skipif(asynchronous_reads() is None, reason="no C library that reads in threads of its own")


class Locked(Errands):
    """Nobody takes, adds or looks without the lock: a thread asks while another one answers."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("add", "take", "leave_out", "leave_out_stopped", "_urgent", "_others"):
            assert self.lock.locked(), name
        return super().__getattribute__(name)


@needs_library
def test_each_look_at_what_waits_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_reads, "DriverCopies", PlayedCopies)
    monkeypatch.setattr(library_reads, "Errands", Locked)
    reads, one = LibraryReads(Buffers()), Wanted(tmp_path / "a", 60)
    reads.prepare()
    one.begin(reads)
    assert one.arrived()
    stopped = Wanted(tmp_path / "b", 60)
    stopped.begin(reads)
    stopped.reading.stop()
    reads.close()


@needs_library
def test_nothing_is_left_when_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread, no open file; each file was opened once in each lane."""
    monkeypatch.setattr(library_reads, "DriverCopies", PlayedCopies)
    reads, opened, real = LibraryReads(Buffers()), [], Path.open

    def watched(path: Path, *arguments: Any, **options: Any) -> Any:
        file = real(path, *arguments, **options)
        opened.extend([file] if isinstance(file, io.FileIO) else [])
        return file

    monkeypatch.setattr(Path, "open", watched)
    for _ in range(3):
        one = Wanted(tmp_path / "a", 60)
        one.begin(reads)
        assert one.arrived()
    assert 1 <= len(opened) <= library_reads.THREADS and not any(file.closed for file in opened)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("wan-sharded-reader")]
    reads.close()
    assert all(file.closed for file in opened)
    assert threads and not any(thread.is_alive() for thread in threads)


def test_as_many_at_once_as_it_may(reads: LibraryReads, calls: PlayedCalls, tmp_path: Path) -> None:
    """Nobody has two to read while another one has none, and all that is begun is sent when it is there."""
    one = Wanted(tmp_path / "a", 12)
    one.begin(reads)
    most = library_reads.DEPTH * library_reads.THREADS
    calls.asked_for(most)
    lanes = [[buffer.control_address for buffer in lane.reading] for lane in reads._lanes]
    assert [len(lane) for lane in lanes] == [library_reads.DEPTH] * library_reads.THREADS
    assert sorted(calls.asked.index(lane[0]) for lane in lanes) == list(range(library_reads.THREADS))
    for _ in range(12):
        calls.asked_for(1)
        calls.end()
    assert one.arrived() and all_buffers_are_back(reads)


def test_what_comes_while_it_waits_is_begun_soon(reads: LibraryReads, calls: PlayedCalls, tmp_path: Path) -> None:
    """A disk may take long for what is being read."""
    slow, other = Wanted(tmp_path / "slow", 1), Wanted(tmp_path / "other", 1)
    slow.begin(reads)
    calls.asked_for(1)
    other.begin(reads)
    calls.asked_for(2)
    assert None not in calls.waits
    calls.end()
    calls.end()
    assert slow.arrived() and other.arrived()


def test_where_there_is_no_room_it_waits_without_a_limit(reads: LibraryReads, calls: PlayedCalls, tmp_path: Path) -> None:
    one = Wanted(tmp_path / "a", 12)
    one.begin(reads)
    calls.asked_for(library_reads.DEPTH * library_reads.THREADS)
    while not calls.waits:
        time.sleep(0.001)
    assert set(calls.waits) == {None}
    for _ in range(12):
        calls.asked_for(1)
        calls.end()
    assert one.arrived()


def test_what_is_urgent_comes_first(reads: LibraryReads, calls: PlayedCalls, tmp_path: Path) -> None:
    usual, soon = Wanted(tmp_path / "usual", 8), Wanted(tmp_path / "soon", 2)
    usual.begin(reads)
    begun = library_reads.DEPTH * library_reads.THREADS
    calls.asked_for(begun)
    soon.begin(reads, urgent=True)
    for _ in range(begun + 2):
        calls.asked_for(1)
        calls.end()
    assert soon.reading.ended() and not usual.reading.is_over
    for _ in range(8 - begun):
        calls.asked_for(1)
        calls.end()
    assert soon.arrived() and usual.arrived()


@pytest.mark.parametrize("missing", [1, PIECE // 2, PIECE])
def test_what_a_read_left_out_is_read_after_it(reads: LibraryReads, calls: PlayedCalls, tmp_path: Path, missing: int) -> None:
    one = Wanted(tmp_path / "a", 3)
    one.begin(reads)
    for _ in range(3):
        calls.asked_for(1)
        calls.end(bytes_missing=missing)
    assert one.arrived() and all_buffers_are_back(reads)


def test_where_the_library_has_no_thread_it_reads_itself(reads: LibraryReads, calls: PlayedCalls, tmp_path: Path) -> None:
    calls.refuses = True
    one = Wanted(tmp_path / "a", 9)
    one.begin(reads)
    assert one.arrived() and all_buffers_are_back(reads)


def test_an_error_names_the_file(reads: LibraryReads, calls: PlayedCalls, tmp_path: Path) -> None:
    one = Wanted(tmp_path / "broken.safetensors", 2)
    one.begin(reads)
    calls.asked_for(2)
    calls.end(code=errno.EIO)
    calls.end()
    with pytest.raises(CheckpointError, match=r"broken\.safetensors could not be read \(.*Input/output error\)"):
        one.reading.wait()
    assert all_buffers_are_back(reads)


@needs_library
def test_another_file_under_the_name_is_not_read(reads: LibraryReads, tmp_path: Path) -> None:
    one = Wanted(tmp_path / "a.safetensors", 2, modified_ns=12345)
    one.begin(reads)
    with pytest.raises(CheckpointError, match=r"a\.safetensors was changed after it was chosen"):
        one.reading.wait()
    assert all_buffers_are_back(reads) and not any(lane._files for lane in reads._lanes)


def test_what_is_let_go_is_left_out(reads: LibraryReads, calls: PlayedCalls, tmp_path: Path) -> None:
    """What is being read is waited for."""
    one = Wanted(tmp_path / "a", 8)
    one.begin(reads)
    begun = library_reads.DEPTH * library_reads.THREADS
    calls.asked_for(begun)
    stopping = threading.Thread(target=one.reading.stop)
    stopping.start()
    while not one.reading.stopped:
        time.sleep(0.001)
    for _ in range(begun):
        assert stopping.is_alive()
        calls.end()
    stopping.join(timeout=20)
    assert not stopping.is_alive() and one.reading.incomplete and not calls.asked
    assert all_buffers_are_back(reads)


def test_memory_that_cannot_be_had_is_told(
    reads: LibraryReads, calls: PlayedCalls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(size_bytes: int) -> torch.Tensor:
        raise MemoryError(f"no {size_bytes} bytes")

    one = Wanted(tmp_path / "a", 30)  # more than there are buffers
    with monkeypatch.context() as patch:
        patch.setattr(library_reads, "host_buffer", refused)
        one.begin(reads)
        with pytest.raises(MemoryError, match=f"no {library_reads.THREADS * PIECE} bytes"):
            one.reading.wait()
    again = Wanted(tmp_path / "a", 3)
    calls.refuses = True
    again.begin(reads)
    assert again.arrived()


@needs_library
def test_buffers_are_made_together_for_no_more_than_waits(reads: LibraryReads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def watched(size_bytes: int) -> torch.Tensor:
        made.append(size_bytes // PIECE)
        return torch.empty(size_bytes, dtype=torch.uint8)

    monkeypatch.setattr(library_reads, "host_buffer", watched)
    few, many = Wanted(tmp_path / "a", 1), Wanted(tmp_path / "b", 60)
    few.begin(reads)
    assert few.arrived() and made == [1]
    with monkeypatch.context() as patch:
        patch.setattr(PlayedCopies, "are_over", lambda copies, copied: False)  # so that all buffers there may be are needed
        many.begin(reads)
        most, end = (library_reads.DEPTH + library_reads.SENT) * library_reads.THREADS, time.monotonic() + 20
        while sum(len(filled) for sent in list(reads._sent.values()) for filled, _ in list(sent)) < most and time.monotonic() < end:
            time.sleep(0.001)
    assert many.arrived() and all_buffers_are_back(reads)
    assert made == [1, 2, 2, 1] and most == 6


@needs_library
def test_when_python_ends_it_says_so(reads: LibraryReads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for what will not be read."""

    def refused(pool: ThreadPoolExecutor, function: Any, *arguments: Any) -> Any:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    one = Wanted(tmp_path / "a", 3)
    with monkeypatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "submit", refused)
        with pytest.raises(RuntimeError, match="interpreter shutdown"):
            one.begin(reads)
    assert one.reading.is_over and one.reading.incomplete
    again = Wanted(tmp_path / "a", 3)
    again.begin(reads)
    assert again.arrived()


class OneAfterAnother(PlayedCopies):
    """Fails as told, after some copies are under way.

    Attributes:
        fails: how often yet.
        most: of its copies were waited for at a time.
    """

    fails, under_way, most = 0, 0, 0

    def queue(self, stream: PlayedStream, filled: list[Any]) -> Any:
        copied = super().queue(stream, filled)
        if OneAfterAnother.fails:
            OneAfterAnother.fails -= 1
            raise RuntimeError("the GPU fell off the bus")
        OneAfterAnother.under_way += 1
        OneAfterAnother.most = max(OneAfterAnother.most, OneAfterAnother.under_way)
        return copied

    def give_back(self, copied: Any) -> None:
        OneAfterAnother.under_way -= 1


@pytest.fixture
def one_after_another(reads: LibraryReads) -> None:
    OneAfterAnother.fails = OneAfterAnother.under_way = OneAfterAnother.most = 0
    reads._copies = OneAfterAnother(None)  # type: ignore[assignment]


@needs_library
@pytest.mark.usefixtures("one_after_another")
def test_all_is_taken_back(reads: LibraryReads, tmp_path: Path) -> None:
    """Soon, and in the end."""
    buffers = (library_reads.DEPTH + library_reads.SENT) * library_reads.THREADS
    for _ in range(5):
        one = Wanted(tmp_path / "a", 100)
        one.begin(reads)
        assert one.arrived() and all_buffers_are_back(reads)
    assert OneAfterAnother.under_way == 0 and 1 <= OneAfterAnother.most <= buffers


@needs_library
@pytest.mark.usefixtures("one_after_another")
def test_copies_that_may_be_under_way_are_waited_for(reads: LibraryReads, tmp_path: Path) -> None:
    """Before their buffers are filled again. And nothing that was to be filled is kept, whether Python has looked for cycles or not."""
    one = Wanted(tmp_path / "a", 9)
    OneAfterAnother.fails = 100
    waited: list[bool] = []
    real = one.stream.synchronize
    one.stream.synchronize = lambda synchronize=real: (waited.append(True), synchronize())  # type: ignore[method-assign]
    gc.collect()
    gc.disable()
    try:
        one.begin(reads)
        with pytest.raises(RuntimeError, match="fell off the bus") as caught:
            one.reading.wait()
        del caught
        one.reading.stop()
        assert waited and all_buffers_are_back(reads)
        memory = weakref.ref(one.memory)
        one.stream.queued.clear()
        one.stream.all_queued.clear()
        assert memory() is not None
        del one, real
        assert memory() is None
    finally:
        gc.enable()
    OneAfterAnother.fails = 0
    again = Wanted(tmp_path / "a", 9)
    again.begin(reads)
    assert again.arrived()


@needs_library
def test_a_file_that_took_its_place_is_read(reads: LibraryReads, tmp_path: Path) -> None:
    """By another reader of the same path, with another time of change."""
    for value in (1, 2):
        one = Wanted(tmp_path / "a", 4)
        new = tmp_path / "new"
        new.write_bytes(bytes([value]) * 4 * PIECE)
        os.utime(new, ns=(0, 10**18 + value))
        new.replace(tmp_path / "a")
        again = Wanted.__new__(Wanted)
        again.__dict__.update(one.__dict__)
        again.content = torch.full((4 * PIECE,), value, dtype=torch.uint8)
        again.errands = [Errand(dataclasses.replace(e.piece, modified_ns=10**18 + value), e.reading, e.stream) for e in one.errands]
        again.begin(reads)
        assert again.arrived()


@needs_library
def test_a_file_that_is_gone_is_named(reads: LibraryReads, tmp_path: Path) -> None:
    one = Wanted(tmp_path / "gone.safetensors", 2)
    one.path.unlink()
    one.begin(reads)
    with pytest.raises(CheckpointError, match=r"gone\.safetensors could not be read"):
        one.reading.wait()
    assert all_buffers_are_back(reads)


def test_the_library_is_done_with_control_blocks_when_it_is_closed(
    calls: PlayedCalls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_reads, "DriverCopies", PlayedCopies)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    calls.refuses = True
    buffers = Buffers()
    reads, one = LibraryReads(buffers), Wanted(tmp_path / "a", 5)
    one.begin(reads)
    assert one.arrived() and not calls.asked_how
    reads.close()
    assert calls.asked_how and sorted(calls.asked_how) == sorted(buffer.control_address for buffer in buffers)


def test_what_cannot_be_begun_is_free_for_others(
    reads: LibraryReads, calls: PlayedCalls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(address: int) -> int:
        raise MemoryError("no room for it")

    one, again = Wanted(tmp_path / "a", 5), Wanted(tmp_path / "b", 5)
    with monkeypatch.context() as patch:
        patch.setattr(calls, "read", refused)
        one.begin(reads)
        with pytest.raises(MemoryError, match="no room for it"):
            one.reading.wait()
        assert all_buffers_are_back(reads) and not any(lane.reading for lane in reads._lanes)
    calls.refuses = True
    again.begin(reads)
    assert again.arrived()


@needs_library
def test_memory_that_is_not_locked_is_said_to_be_so(reads: LibraryReads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    queue = PlayedCopies.queue
    monkeypatch.setattr(
        PlayedCopies,
        "queue",
        lambda copies, stream, filled: (found.extend(one.is_locked for one in filled), queue(copies, stream, filled))[1],
    )
    for locked in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor, locked=locked: locked)
        fresh = LibraryReads(Buffers())
        one = Wanted(tmp_path / "a", 4)
        one.begin(fresh)
        assert one.arrived() and set(found) == {locked}
        found.clear()
        fresh.close()


@needs_library
@pytest.mark.parametrize("where", ["_take_back", "_begin_reads", "_end_reads"])
def test_whatever_goes_wrong_nobody_waits_for_ever(
    reads: LibraryReads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def broken(*arguments: Any) -> Any:
        raise ZeroDivisionError("nobody thought of it")

    one = Wanted(tmp_path / "a", 20)
    with monkeypatch.context() as patch:
        patch.setattr(reads, where, broken)
        one.begin(reads)
        with pytest.raises(ZeroDivisionError, match="nobody thought of it"):
            one.reading.wait()
        assert one.reading.is_over or one.reading.ended() is False
    again = Wanted(tmp_path / "a", 20)
    again.begin(reads)
    assert again.arrived()
