"""What is still on its way while whoever asked goes on: it arrives whole or not at all, in memory that is still there, and nobody waits for ever.

By way of buffers as to a GPU too, with a stream that copies late; to a real GPU in tests/gpu/test_single_files.py.
"""

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from played_streams import PlayedCopies, PlayedEvent, PlayedStream
from read_files import PIECE, Watch, beside_each_other, parts_of_one_file
from wan_sharded.engine.errors import CheckpointError
from wan_sharded.engine.weights import library_reads, reading
from wan_sharded.engine.weights.library_calls import asynchronous_reads
from wan_sharded.engine.weights.reading import TensorReader

pytestmark = pytest.mark.usefixtures("small_pieces")
CPU = torch.device("cpu")


class Gate:
    """Holds up the reading of what lies from a place in the file on."""

    def __init__(self, watch: Watch, closed_from: int = 0):
        self.closed_from = closed_from
        self.read: list[int] = []
        self._changed = threading.Condition()
        watch(self._before)

    def _before(self, offset: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: offset < self.closed_from, timeout=30)
            self.read.append(offset)
            self._changed.notify_all()

    def open_until(self, offset: int) -> None:
        with self._changed:
            self.closed_from = offset
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.read) >= count, timeout=30)


def test_begun_and_waited_for_later(reader: TensorReader, tmp_path: Path, before_reading: Watch) -> None:
    stored, targets, content = parts_of_one_file(tmp_path / "a", 3)
    gate = Gate(before_reading)
    begun = [reader.begin([pair]) for pair in zip(stored, targets, strict=True)]
    assert not any(target.any() for target in targets)
    gate.open_until(4 * PIECE)
    begun[0].wait()
    assert torch.equal(targets[0], content[: 4 * PIECE]) and not targets[2].any()
    gate.open_until(12 * PIECE)
    reader.finish()
    assert torch.equal(torch.cat(targets), content[: 12 * PIECE])
    for one in begun:
        one.wait()


def test_little_of_what_was_begun_before_is_still_on_its_way(
    reader: TensorReader, tmp_path: Path, before_reading: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an expert's blocks would all be begun at once, and the progress told would be of what has not come."""
    monkeypatch.setattr(reading, "AHEAD_BYTES", 9 * PIECE)
    stored, targets, content = parts_of_one_file(tmp_path / "a", 4)
    gate = Gate(before_reading)
    for pair in list(zip(stored, targets, strict=True))[:2]:
        reader.begin([pair])
    threading.Timer(0.2, gate.open_until, [4 * PIECE]).start()
    reader.begin([(stored[2], targets[2])])
    assert torch.equal(targets[0], content[: 4 * PIECE]) and not targets[1].any()
    threading.Timer(0.2, gate.open_until, [8 * PIECE]).start()
    reader.begin([(stored[3], targets[3])])
    assert torch.equal(targets[1], content[4 * PIECE : 8 * PIECE]) and not targets[2].any()
    gate.open_until(99 * PIECE)
    reader.finish()
    assert torch.equal(torch.cat(targets), content[: 16 * PIECE])


def test_what_is_urgent_is_read_first(reader: TensorReader, tmp_path: Path, before_reading: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "THREADS", 1)
    stored, targets, content = parts_of_one_file(tmp_path / "a", 2)
    order: list[int] = []
    held = threading.Event()

    def before(offset: int) -> None:
        order.append(offset // PIECE)
        assert held.wait(timeout=30)

    before_reading(before)
    reader.begin([(stored[0], targets[0])])
    while not order:
        time.sleep(0.001)
    soon = reader.begin([(stored[1], targets[1])], urgent=True)
    held.set()
    soon.wait()
    assert order[:5] == [0, 4, 5, 6, 7], "all but what had begun"
    reader.finish()
    assert order[5:] == [1, 2, 3] and torch.equal(torch.cat(targets), content[: 8 * PIECE])


def test_what_is_let_go_is_not_written_to(reader: TensorReader, tmp_path: Path, before_reading: Watch) -> None:
    """What a thread is at is waited for, the rest is left out; and the reader goes on working."""
    stored, targets, content = parts_of_one_file(tmp_path / "a", 2)
    gate = Gate(before_reading, closed_from=PIECE)
    for pair in zip(stored, targets, strict=True):
        reader.begin([pair])
    gate.wait_for(1)
    threading.Timer(0.2, gate.open_until, [99 * PIECE]).start()
    reader.stop()
    assert len(gate.read) <= 1 + reading.THREADS
    for target in targets:
        target.fill_(0xAA)
    time.sleep(0.05)
    assert all(bool((target == 0xAA).all()) for target in targets)
    reader.read_into(list(zip(stored, targets, strict=True)))
    assert torch.equal(torch.cat(targets), content[: 8 * PIECE])


@pytest.mark.parametrize("met", ["when waited for", "at the end", "with the next", "after the next"])
def test_an_error_is_met_later(
    reader: TensorReader, tmp_path: Path, before_reading: Watch, monkeypatch: pytest.MonkeyPatch, met: str
) -> None:
    monkeypatch.setattr(reading, "AHEAD_BYTES", PIECE)
    stored, targets, content = parts_of_one_file(tmp_path / "a", 2)

    def unlucky(offset: int) -> None:
        if offset == 2 * PIECE:
            raise OSError("bad luck")

    before_reading(unlucky)
    begun = reader.begin([(stored[0], targets[0])])
    if met == "after the next":  # which begins when nothing of this one is on its way any more
        while begun._left:
            time.sleep(0.001)
        monkeypatch.setattr(reading, "AHEAD_BYTES", 100 * PIECE)
        reader.begin([(stored[1], targets[1])])
    meet = {
        "when waited for": begun.wait,
        "at the end": reader.finish,
        "with the next": lambda: reader.begin([(stored[1], targets[1])]),
        "after the next": reader.finish,
    }
    with pytest.raises(CheckpointError, match=r"a could not be read \(bad luck\)"):
        meet[met]()
    reader.stop()
    before_reading(lambda offset: None)
    reader.read_into(list(zip(stored, targets, strict=True)))
    assert torch.equal(torch.cat(targets), content[: 8 * PIECE])


def test_a_file_is_opened_once_by_each_thread(reader: TensorReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And closed at the end, so that it can be replaced on Windows."""
    stored, targets, content = parts_of_one_file(tmp_path / "a", 3)
    opened: list[Any] = []
    real = Path.open

    def watched(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(real(path, *arguments, **options))
        return opened[-1]

    monkeypatch.setattr(Path, "open", watched)
    for pair in zip(stored, targets, strict=True):
        reader.read_into([pair])
    assert 1 <= len(opened) <= reading.THREADS and not any(file.closed for file in opened)
    reader.close()
    assert all(file.closed for file in opened)
    assert torch.equal(torch.cat(targets), content[: 12 * PIECE])


# ---- by way of buffers, as to a GPU


@pytest.fixture(params=["threads", "library"])
def stream(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PlayedStream:
    """What is wanted on the CPU goes through buffers and this stream."""
    played, by_library = PlayedStream(), request.param == "library"
    if by_library and asynchronous_reads() is None:
        pytest.skip("the C library reads only in Python's threads here")

    def foreach_copy(targets: list[torch.Tensor], sources: list[torch.Tensor], *, non_blocking: bool) -> None:
        if played.fails:
            raise RuntimeError("the GPU fell off the bus")
        played.queued.append((targets, sources))

    monkeypatch.setattr(reading, "CPU", torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: played)
    monkeypatch.setattr(torch.cuda, "Event", PlayedEvent)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch, "_foreach_copy_", foreach_copy)
    monkeypatch.setattr(library_reads, "available", lambda: by_library)
    monkeypatch.setattr(library_reads, "DriverCopies", PlayedCopies)
    return played


@pytest.mark.timeout(120)
def test_buffers_are_used_again_only_when_they_are_copied(reader: TensorReader, tmp_path: Path, stream: PlayedStream) -> None:
    """Many more pieces than buffers, of all sizes, begun one behind the other."""
    stored = beside_each_other(tmp_path / "a", [7, 30 * PIECE, 1, 1, PIECE + 3, 999, 40 * PIECE, 2] * 3, 5)
    content = torch.frombuffer(bytearray(stored[0].file.read_bytes()), dtype=torch.uint8)
    for _ in range(5):
        targets = [torch.zeros(one.size_bytes, dtype=torch.uint8) for one in stored]
        wanted = list(zip(stored, targets, strict=True))
        for begin in range(0, len(wanted), 4):
            reader.begin(wanted[begin : begin + 3])
            reader.begin(wanted[begin + 3 : begin + 4], urgent=True).wait()
        reader.finish()
        stream.synchronize()
        for one, target in wanted:
            assert torch.equal(target, content[one.offset : one.offset + one.size_bytes])
        reader.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith(("wan-sharded-reader", "wan-sharded-sender"))]


@pytest.mark.timeout(120)
def test_a_failed_copy_is_told_and_loses_no_buffer(reader: TensorReader, tmp_path: Path, stream: PlayedStream) -> None:
    stored, targets, content = parts_of_one_file(tmp_path / "a", 20)
    for _ in range(3):
        stream.fails = True
        with pytest.raises(RuntimeError, match="fell off the bus"):
            reader.read_into(list(zip(stored, targets, strict=True)))
        stream.fails = False
        reader.read_into(list(zip(stored, targets, strict=True)))
        stream.synchronize()
        assert torch.equal(torch.cat(targets), content[: 80 * PIECE])
        for target in targets:
            target.zero_()


@pytest.mark.timeout(120)
def test_a_failed_read_loses_no_buffer(reader: TensorReader, tmp_path: Path, stream: PlayedStream) -> None:
    stored, targets, content = parts_of_one_file(tmp_path / "a", 2)
    whole = stored[0].file.read_bytes()
    os.truncate(stored[0].file, PIECE // 2)
    for _ in range(reading.BUFFERS + library_reads.THREADS * 3 + 1):
        with pytest.raises(CheckpointError, match=r"a could not be read \(it has become shorter\)"):
            reader.read_into(list(zip(stored, targets, strict=True)))
    stored[0].file.write_bytes(whole)
    reader.read_into(list(zip(stored, targets, strict=True)))
    stream.synchronize()
    assert torch.equal(torch.cat(targets), content[: 8 * PIECE])


@pytest.mark.timeout(120)
def test_when_python_ends_nothing_waits_for_ever(
    reader: TensorReader, tmp_path: Path, stream: PlayedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Executors take nothing on then, but finish what they have."""
    stored, targets, content = parts_of_one_file(tmp_path / "a", 20)
    submit = ThreadPoolExecutor.submit

    def refused(pool: ThreadPoolExecutor, function: Any, *arguments: Any) -> Any:
        if getattr(function, "__name__", "") == "_send":
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        return submit(pool, function, *arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refused)
    reader.read_into(list(zip(stored, targets, strict=True)))
    stream.synchronize()
    assert torch.equal(torch.cat(targets), content[: 80 * PIECE])


def test_an_error_keeps_no_memory(reader: TensorReader, tmp_path: Path, before_reading: Watch) -> None:
    """What was to be filled is gone when it is let go, without waiting for Python to find cycles: another try may need that room."""
    stored, _, _ = parts_of_one_file(tmp_path / "a", 1)
    memory = np.zeros(stored[0].size_bytes, dtype=np.uint8)
    alive = weakref.ref(memory)
    targets = [torch.from_numpy(memory)]
    del memory

    def unlucky(offset: int) -> None:
        raise OSError("bad luck")

    before_reading(unlucky)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(CheckpointError) as caught:
            reader.read_into([(stored[0], targets[0])])
        reader.close()
        del caught
        assert alive() is not None
        targets.clear()
        assert alive() is None
    finally:
        gc.enable()


@contextmanager
def no_thread(refused: Callable[[threading.Thread], bool]) -> Iterator[None]:
    """Inside, the system has none for those that this is true of."""
    start = threading.Thread.start

    def started(thread: threading.Thread) -> None:
        if refused(thread):
            raise RuntimeError("can't start new thread")
        start(thread)

    with mock.patch.object(threading.Thread, "start", started):
        yield


@pytest.mark.timeout(60)
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("which", ["wan-sharded-reader", "wan-sharded-sender"])
@pytest.mark.parametrize("threads", [1, reading.THREADS])
def test_where_no_thread_can_be_had_it_says_so(
    reader: TensorReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, which: str, closed: bool
) -> None:
    monkeypatch.setattr(reading, "THREADS", threads)
    stored, targets, content = parts_of_one_file(tmp_path / "a", 1)
    with no_thread(lambda thread: thread.name.startswith(which)), pytest.raises(RuntimeError, match="can't start new thread"):
        reader.read_into([(stored[0], targets[0])])
    if closed:
        reader.close()
    reader.read_into([(stored[0], targets[0])])
    assert torch.equal(targets[0], content[: 4 * PIECE])


@pytest.mark.timeout(60)
def test_where_no_second_thread_can_be_had_it_says_so(
    reader: TensorReader, tmp_path: Path, before_reading: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first thread has meanwhile read what the second was wanted for."""
    monkeypatch.setattr(reading, "THREADS", 2)
    stored, targets, content = parts_of_one_file(tmp_path / "a", 1)
    wanted, started = threading.Event(), []
    before_reading(lambda offset: wanted.wait(30) and None)

    def second(thread: threading.Thread) -> bool:
        started.extend([thread] if thread.name.startswith("wan-sharded-reader") else [])
        if len(started) < 2:
            return False
        wanted.set()
        while reader._thread_reads is not None and reader._thread_reads._errands:
            time.sleep(0.001)
        return True

    with no_thread(second), pytest.raises(RuntimeError, match="can't start new thread"):
        reader.read_into([(stored[0], targets[0])])
    reader.read_into([(stored[0], targets[0])])
    assert torch.equal(targets[0], content[: 4 * PIECE])


def test_systems_without_reading_at_a_place(reader: TensorReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no ``preadv``."""
    monkeypatch.delattr(os, "preadv", raising=False)
    stored, targets, content = parts_of_one_file(tmp_path / "a", 3)
    reader.read_into(list(zip(stored, targets, strict=True)))
    assert torch.equal(torch.cat(targets), content[: 12 * PIECE])
