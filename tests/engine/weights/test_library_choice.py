"""Who reads for whom, and whether the libraries for reading by the C library's threads are there: only where they do what they should."""

import ctypes
import dataclasses
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from played_streams import PlayedCopies, PlayedStream
from read_files import PIECE, parts_of_one_file
from wan_sharded.engine.weights import library_calls, library_reads
from wan_sharded.engine.weights.errands import Errand
from wan_sharded.engine.weights.library_calls import Control, asynchronous_reads
from wan_sharded.engine.weights.library_reads import LibraryReads
from wan_sharded.engine.weights.reading import TensorReader
from wan_sharded.engine.weights.thread_reads import ThreadReads

pytestmark = [pytest.mark.usefixtures("small_pieces"), pytest.mark.timeout(60)]
needs_library = pytest.mark.skipif(asynchronous_reads() is None, reason="no C library that reads in threads of its own")


# ---- which way the reader takes


@needs_library
@pytest.mark.parametrize("by_library", [True, False])
def test_who_reads_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_library: bool) -> None:
    """For the CPU, threads of Python's; for GPUs, the library where there is one. Each in pieces of its own size, and neither is left out."""
    monkeypatch.setattr(library_reads, "available", lambda: by_library)
    monkeypatch.setattr(library_reads, "DriverCopies", PlayedCopies)
    monkeypatch.setattr(library_reads, "PIECE_BYTES", PIECE // 2)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "a stream")
    begun: dict[str, list[Errand]] = {}
    for kind in (LibraryReads, ThreadReads):

        def begin(reads: Any, wanted: list[Errand], *, urgent: bool) -> None:
            begun[type(reads).__name__] = [*begun.get(type(reads).__name__, []), *wanted]
            for errand in wanted:
                errand.reading.done()

        monkeypatch.setattr(kind, "begin", begin)
    stored, targets, _ = parts_of_one_file(tmp_path / "a", 2)

    class OnGpu:
        """As a tensor there would be."""

        device = torch.device("cuda", 0)

        def split(self, sizes: list[int]) -> list["OnGpu"]:
            return [OnGpu() for _ in sizes]

        def numel(self) -> int:
            return PIECE // 2

    there: Any = OnGpu()
    reader = TensorReader()
    reader.read_into([(stored[0], targets[0]), (stored[1], there)])
    to_gpu = [errand for errands in begun.values() for errand in errands if errand.stream is not None]
    in_place = [errand for errands in begun.values() for errand in errands if errand.stream is None]
    assert len(in_place) == 4 and len(to_gpu) == (8 if by_library else 4)
    assert {one.piece.device for one in to_gpu} == {OnGpu.device}
    assert {name: len(errands) for name, errands in begun.items()} == (
        {"ThreadReads": 4, "LibraryReads": 8} if by_library else {"ThreadReads": 8}
    )
    # One piece for the CPU beside one for a GPU: neither is read at once instead of both.
    begun.clear()
    small = dataclasses.replace(stored[0], shape=(PIECE // 2,), size_bytes=PIECE // 2)
    reader.read_into([(small, targets[0][: PIECE // 2]), (small, there)])
    assert sum(map(len, begun.values())) == 2
    reader.close()


@needs_library
@pytest.mark.parametrize("refused", [LibraryReads, ThreadReads])
def test_where_one_way_refuses_nobody_waits_for_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: type) -> None:
    monkeypatch.setattr(library_reads, "available", lambda: True)
    monkeypatch.setattr(library_reads, "DriverCopies", PlayedCopies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: PlayedStream())

    def begin(reads: Any, wanted: list[Errand], *, urgent: bool) -> None:
        for errand in wanted:
            errand.reading.done(left_out=True)
        raise RuntimeError("can't start new thread")

    def taken(reads: Any, wanted: list[Errand], *, urgent: bool) -> None:
        for errand in wanted:
            errand.reading.done()

    monkeypatch.setattr(LibraryReads, "begin", taken)
    monkeypatch.setattr(ThreadReads, "begin", taken)
    monkeypatch.setattr(refused, "begin", begin)
    stored, targets, _ = parts_of_one_file(tmp_path / "a", 1)
    there: Any = type(
        "OnGpu", (), {"device": torch.device("cuda", 0), "split": lambda self, sizes: [self] * len(sizes), "numel": lambda self: PIECE}
    )()
    reader = TensorReader()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        reader.read_into([(stored[0], targets[0]), (stored[0], there)])
    reader.close()


def test_each_gpu_has_its_own_stream_and_all_bytes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what goes to the CPU alone does not ask for the library, which would make a thread."""
    asked: list[bool] = []
    monkeypatch.setattr(library_reads, "available", lambda: (asked.append(True), False)[1])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    begun: list[Errand] = []
    monkeypatch.setattr(ThreadReads, "begin", lambda reads, wanted, *, urgent: begun.extend(wanted))
    stored, targets, _ = parts_of_one_file(tmp_path / "a", 4)

    class OnGpu:
        """As a tensor there would be."""

        def __init__(self, index: int) -> None:
            self.device = torch.device("cuda", index)

        def numel(self) -> int:
            return 4 * PIECE

    reader = TensorReader()
    readings = [reader.begin(list(zip(stored, targets, strict=True)))]
    assert not asked and {errand.stream for errand in begun} == {None}
    there: list[Any] = [OnGpu(1), OnGpu(0), OnGpu(1)]
    readings.append(reader.begin([(stored[0], targets[0]), *zip(stored[1:], there, strict=True)]))
    assert asked
    assert [reading.unfinished_bytes for reading in readings] == [16 * PIECE, 16 * PIECE]
    streams = {(errand.piece.targets[0][1].memory, errand.stream) for errand in begun if errand.stream is not None}
    assert streams == {(one, f"of {one.device}") for one in there}
    for errand in begun:
        errand.reading.done()
    assert [reading.unfinished_bytes for reading in readings] == [0, 0]
    reader.close()


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


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("gpu", [True, False])
def test_both_are_needed(monkeypatch: pytest.MonkeyPatch, library: bool, gpu: bool) -> None:
    monkeypatch.setattr(library_reads, "asynchronous_reads", lambda: object() if library else None)
    monkeypatch.setattr(library_reads, "cuda_driver", lambda: object() if gpu else None)
    assert library_reads.available() == (library and gpu)


@pytest.mark.parametrize("what", ["all is there", "no library", "a call is missing", "another make of GPU"])
def test_the_driver_of_cuda(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    calls = ("cuMemcpyHtoDAsync_v2", "cuEventRecord", "cuEventQuery", "cuCtxSetCurrent", "cuCtxGetCurrent", "cuGetErrorString")

    def library(name: str) -> Any:
        if what == "no library":
            raise OSError(name)
        missing = 1 if what == "a call is missing" else 0
        return type("Library", (), {call: type("Call", (), {})() for call in calls[missing:]})()

    monkeypatch.setattr(ctypes, "PyDLL", library)
    monkeypatch.setattr(torch.version, "cuda", None if what == "another make of GPU" else "13.0")
    library_calls.cuda_driver.cache_clear()
    try:
        found = library_calls.cuda_driver()
        assert (found is not None) == (what == "all is there")
        if found is not None:
            pointer = ctypes.c_void_p
            assert found.cuMemcpyHtoDAsync_v2.argtypes == [pointer, pointer, ctypes.c_size_t, pointer]
            assert found.cuEventQuery.argtypes == [pointer] and found.cuEventRecord.argtypes == [pointer, pointer]
    finally:
        library_calls.cuda_driver.cache_clear()


@needs_library
def test_others_go_on_while_it_waits() -> None:
    """Python's lock is kept only where there is nothing to wait for."""
    calls = asynchronous_reads()
    assert calls is not None
    assert isinstance(calls.wait, ctypes.CDLL(None)._FuncPtr.__mro__[1]) and not calls.wait._flags_ & 4  # FUNCFLAG_PYTHONAPI
    assert calls.read._flags_ & 4 and calls.read.argtypes == [ctypes.c_void_p]
