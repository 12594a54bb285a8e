"""Reads by the C library's threads, and copies that CUDA's driver is asked for: the libraries are played where they have to fail or to wait.

What they have in common with Python's threads is in test_reading_ahead.py, what a real GPU gets in tests/gpu/test_single_files.py.
"""

import ctypes
import errno
import io
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from played_streams import PlayedCopies, PlayedStream
from read_files import PIECE, parts_of_one_file
from wan_sharded.engine.errors import CheckpointError
from wan_sharded.engine.weights import library_calls, library_reads
from wan_sharded.engine.weights.driver_copies import DriverCopies
from wan_sharded.engine.weights.errands import Errand, Reading
from wan_sharded.engine.weights.library_calls import Control, asynchronous_reads
from wan_sharded.engine.weights.library_reads import LibraryReads
from wan_sharded.engine.weights.pieces import Piece

pytestmark = [pytest.mark.usefixtures("small_pieces"), pytest.mark.timeout(60)]
needs_library = pytest.mark.skipif(asynchronous_reads() is None, reason="no C library that reads in threads of its own")


class PlayedCalls:
    """In the place of the C library: reads when it is told to.

    Attributes:
        asked: addresses of control blocks whose reads have not ended.
        waits: how long it was waited each time, in seconds; None where there was no limit.
        refuses: no thread can be had.
    """

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.waits: list[float | None] = []
        self.refuses = False
        self._changed = threading.Condition()

    def read(self, address: int) -> int:
        if self.refuses:
            return -1
        with self._changed:
            Control.from_address(address).error = errno.EINPROGRESS
            self.asked.append(address)
            self._changed.notify_all()
        return 0

    def wait(self, addresses: Any, count: int, limit: Any) -> int:
        seconds = None if limit is None else limit._obj.nanoseconds / 1e9
        with self._changed:
            self.waits.append(seconds)
            self._changed.wait(seconds or 0.05)
        return 0

    def asked_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.asked) >= count, timeout=20)

    def end(self, *, code: int = 0, bytes_missing: int = 0) -> None:
        """The read that was asked for first."""
        with self._changed:
            control = Control.from_address(self.asked.pop(0))
            wanted = control.size_bytes - bytes_missing
            content = os.pread(control.file, wanted, control.offset)
            ctypes.memmove(control.memory, content, len(content))
            control.result, control.error = (-1 if code else len(content)), code
            self._changed.notify_all()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> PlayedCalls:
    played = PlayedCalls()
    monkeypatch.setattr(library_reads, "asynchronous_reads", lambda: played)
    return played


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[LibraryReads]:
    monkeypatch.setattr(library_reads, "DriverCopies", PlayedCopies)
    monkeypatch.setattr(library_reads, "THREADS", 2)
    if "calls" in request.fixturenames:
        request.getfixturevalue("calls")
    made = LibraryReads()
    yield made
    made.close()


class Wanted:
    """A file in pieces, and where they go.

    Attributes:
        stream: in which they are sent.
    """

    def __init__(self, path: Path, count: int, stream: Any = None, modified_ns: int = 0):
        _, _, self.content = parts_of_one_file(path, -(-count // 4))
        self.content = self.content[: count * PIECE]
        self.path, self.stream, self.reading = path, stream or PlayedStream(), Reading()
        self.target = torch.zeros(count * PIECE, dtype=torch.uint8)
        parts = self.target.split(PIECE)
        self.errands = [
            Errand(Piece(path, modified_ns, number * PIECE, PIECE, ((0, part),)), self.reading, self.stream)
            for number, part in enumerate(parts)
        ]

    def begin(self, reads: LibraryReads, *, urgent: bool = False) -> None:
        self.reading.add(len(self.errands), self.target.numel())
        reads.begin(self.errands, urgent=urgent)

    def arrived(self) -> bool:
        self.reading.wait()
        self.stream.synchronize()
        return torch.equal(self.target, self.content)


def all_buffers_are_back(reads: LibraryReads) -> bool:
    reads._thread.submit(lambda: None).result()  # once it is idle
    while reads._sent:
        reads._take_back()
    made = (library_reads.DEPTH + library_reads.SENT) * library_reads.THREADS - reads._unmade
    return len(reads._free) == len(set(map(id, reads._free))) == made and all(buffer.errand is None for buffer in reads._free)


@needs_library
def test_each_piece_in_its_own_stream(reads: LibraryReads, tmp_path: Path) -> None:
    several = [Wanted(tmp_path / f"{number}", 20) for number in range(3)]
    for one in several:
        one.begin(reads, urgent=one is several[1])
    for one in several:
        one.reading.wait()
        places = sorted(target.data_ptr() - one.target.data_ptr() for targets, _ in one.stream.all_queued for target in targets)
        assert places == [number * PIECE for number in range(20)]
    assert all(one.arrived() for one in several) and all_buffers_are_back(reads)


@needs_library
def test_nothing_is_left_when_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread, no open file; each file was opened once in each lane."""
    monkeypatch.setattr(library_reads, "DriverCopies", PlayedCopies)
    reads, opened, real = LibraryReads(), [], Path.open

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

    one = Wanted(tmp_path / "a", 3)
    with monkeypatch.context() as patch:
        patch.setattr(library_reads, "host_buffer", refused)
        one.begin(reads)
        with pytest.raises(MemoryError, match=f"no {PIECE} bytes"):
            one.reading.wait()
    again = Wanted(tmp_path / "a", 3)
    calls.refuses = True
    again.begin(reads)
    assert again.arrived()


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


# ---- whether the libraries are there


@pytest.fixture
def anew() -> Iterator[Callable[[], Any]]:
    """Looks for the C library's reads again."""
    asynchronous_reads.cache_clear()
    yield asynchronous_reads
    asynchronous_reads.cache_clear()


@pytest.mark.parametrize(("system", "machine"), [("win32", "AMD64"), ("darwin", "x86_64"), ("linux", "aarch64")])
def test_elsewhere_python_reads(anew: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr(library_calls.sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert anew() is None


@needs_library
def test_another_c_library_is_not_asked(anew: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its control blocks may look different."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert anew() is None


@needs_library
@pytest.mark.parametrize("what", ["reads something else", "reads nothing", "refuses"])
def test_a_library_that_does_not_do_what_it_should_is_not_asked(
    anew: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    class Calls:
        def read(self, address: int) -> int:
            control = Control.from_address(address)
            control.error, control.result = 0, 0 if what == "reads nothing" else 100
            return -1 if what == "refuses" else 0

        def wait(self, *arguments: Any) -> int:
            return 0

    monkeypatch.setattr(library_calls, "AsynchronousReads", Calls)
    assert anew() is None


def test_the_control_block_is_as_large_as_the_library_has_it() -> None:
    """By the header of version 2.36 on x86-64."""
    assert ctypes.sizeof(Control) == 168
    places = {name: getattr(Control, name).offset for name, *_ in Control._fields_}
    assert (places["memory"], places["size_bytes"], places["notification"], places["error"], places["result"], places["offset"]) == (
        16, 24, 44, 112, 120, 128,
    )  # fmt: skip


# ---- copies


class PlayedDriver:
    """CUDA's: remembers what it was asked for, and in which context.

    Attributes:
        did: the calls, in their order.
        answers: with an error, if not with 0.
    """

    def __init__(self) -> None:
        self.context = 0
        self.did: list[tuple[Any, ...]] = []
        self.answers: dict[str, int] = {}

    def cuCtxGetCurrent(self, place: Any) -> int:
        place._obj.value = self.context
        return self.answers.get("get", 0)

    def cuCtxSetCurrent(self, context: int) -> int:
        self.context = context
        return self.answers.get("set", 0)

    def cuMemcpyHtoDAsync_v2(self, target: int, source: int, size: int, stream: int) -> int:
        self.did.append(("copy", self.context, target, source, size, stream))
        return self.answers.get("copy", 0)

    def cuEventRecord(self, event: int, stream: int) -> int:
        self.did.append(("record", self.context, event, stream))
        return self.answers.get("record", 0)

    def cuEventQuery(self, event: int) -> int:
        return self.answers.get(f"query {event}", 0)


class Stream:
    cuda_stream = 0  # as the one that everything is queued in at first

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> PlayedDriver:
    """Each GPU's context is a hundred and its number; torch makes it the thread's."""
    played, numbers = PlayedDriver(), iter(range(1, 100))

    class Event:
        def __init__(self) -> None:
            self.cuda_event = next(numbers)

        def record(self, stream: Stream) -> None:
            played.context = 100 + stream.device.index

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        yield
        played.context = 100  # torch goes back to the first GPU

    @contextmanager
    def in_stream(stream: Stream) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "stream", in_stream)
    return played


class Memory:
    """What was read of a piece in two parts."""

    def __init__(self, *, is_locked: bool = True) -> None:
        self.memory = torch.arange(100, dtype=torch.uint8)
        self.address, self.is_locked = self.memory.data_ptr(), is_locked
        self.targets = [torch.zeros(20, dtype=torch.uint8), torch.zeros(7, dtype=torch.uint8)]
        self.piece = Piece(Path("file"), 0, 0, 50, ((0, self.targets[0]), (43, self.targets[1])))


def test_copies_are_queued_in_the_gpus_own_context(driver: PlayedDriver) -> None:
    copies, memories = DriverCopies(driver), [Memory() for _ in range(4)]
    for number, memory in enumerate(memories):
        driver.did.clear()
        stream: Any = Stream(number % 2)
        copied = copies.queue(stream, [memory])
        context = 100 + number % 2
        assert driver.did == [
            ("copy", context, memory.targets[0].data_ptr(), memory.address, 20, 0),
            ("copy", context, memory.targets[1].data_ptr(), memory.address + 43, 7, 0),
            ("record", context, copied.number, 0),
        ]


def test_what_is_waited_for_no_more_is_used_again(driver: PlayedDriver) -> None:
    copies = DriverCopies(driver)
    first, second = (copies.queue(stream, [Memory()]) for stream in (Stream(0), Stream(0)))  # type: ignore[arg-type]
    assert first.number != second.number
    driver.answers[f"query {first.number}"] = 600  # not ready
    assert not copies.have_arrived(first) and copies.have_arrived(second)
    copies.give_back(second)
    other, again = (copies.queue(stream, [Memory()]) for stream in (Stream(1), Stream(0)))  # type: ignore[arg-type]
    assert other.number not in (first.number, second.number) and again is second


@pytest.mark.parametrize("which", ["get", "set", "copy", "record"])
def test_a_refusal_is_told(driver: PlayedDriver, which: str) -> None:
    driver.answers[which] = 700
    stream: Any = Stream(0)
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        DriverCopies(driver).queue(stream, [Memory()])


def test_memory_that_is_not_locked_is_copied_by_torch(driver: PlayedDriver) -> None:
    """Which does not keep others waiting meanwhile."""
    memories = [Memory(), Memory(is_locked=False)]
    stream: Any = Stream(0)
    DriverCopies(driver).queue(stream, memories)
    assert driver.did == []
    for memory in memories:
        assert [target.tolist() for target in memory.targets] == [list(range(20)), list(range(43, 50))]
