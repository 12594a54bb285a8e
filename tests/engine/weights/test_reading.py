"""Tensors as their files have them, in every way there is to read them; and files that are not there any more, in the middle of it.

What goes through page-locked buffers to a real GPU is in tests/gpu/test_single_files.py.
"""

import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from imagined_gpus import ImaginedGpus
from wan_sharded.engine.checkpoints.stored import StoredTensor
from wan_sharded.engine.errors import CheckpointError, UnsupportedError
from wan_sharded.engine.weights import reading
from wan_sharded.engine.weights.reading import TensorReader, raw_shape

CPU, LAZY = torch.device("cpu"), torch.device("lazy:0")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
PIECE = 1000


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few kilobytes are as many pieces as gigabytes are."""
    monkeypatch.setattr(reading, "PIECE_BYTES", PIECE)


@pytest.fixture
def reader() -> Iterator[TensorReader]:
    reader = TensorReader()
    yield reader
    reader.close()


def any_bytes(count: int, seed: int = 0) -> torch.Tensor:
    """None of them ends in an exponent of ones: equal bits are equal numbers then."""
    return torch.randint(0, 0x38, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def stored_in(path: Path, content: torch.Tensor, dtype: str = "U8", shape: tuple[int, ...] | None = None, offset: int = 0) -> StoredTensor:
    """A file with a tensor of these bytes at an offset, and something behind it."""
    path.write_bytes(b"\xff" * offset + content.numpy().tobytes() + b"\xff" * 5)
    return StoredTensor(path, "some.weight", dtype, (content.numel(),) if shape is None else shape, offset, content.numel())


def read_all(reader: TensorReader, stored: StoredTensor) -> list[torch.Tensor]:
    """In every way, to the CPU and to an imagined GPU."""
    into = torch.full((stored.size_bytes + 2,), 0xAA, dtype=torch.uint8)
    reader.read_into([(stored, into[1:-1])])
    assert into[0] == into[-1] == 0xAA, "nobody else's bytes"
    mapped = reader.mapped(stored)
    into = into[1:-1].clone().view(mapped.dtype).view(mapped.shape) if mapped.numel() else torch.empty_like(mapped)
    with ImaginedGpus():
        there = torch.empty(raw_shape(stored), dtype=mapped.dtype, device=LAZY)
        reader.read_into([(stored, there.reshape(-1).view(torch.uint8))])
        return [mapped, into, there.cpu()]


@pytest.mark.parametrize("shape", [(5, 7), (3,), (), (2, 1, 3, 1, 2), (50, 33)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_file_has(reader: TensorReader, tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    """Also where its numbers lie at no multiple of their size, as in safetensors files with a header of odd length."""
    content = any_bytes(torch.Size(shape).numel() * DTYPES[dtype].itemsize)
    expected = content.view(DTYPES[dtype]).view(shape)
    for offset in (0, 8, 3, 4097):
        for got in read_all(reader, stored_in(tmp_path / f"{offset}.safetensors", content, dtype, shape, offset)):
            assert got.dtype == expected.dtype and got.shape == shape
            assert torch.equal(got.float(), expected.float()), offset


def test_gguf_gives_rows_of_bytes(reader: TensorReader, tmp_path: Path) -> None:
    content = any_bytes(6 * 2 * 34)
    stored = stored_in(tmp_path / "a.gguf", content, "GGUF:Q8_0", (6, 64), 32)
    for got in read_all(reader, stored):
        assert got.dtype == torch.uint8 and torch.equal(got, content.view(6, 68))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)], ids=str)
def test_nothing_is_read_of_nothing(reader: TensorReader, tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Not even the file."""
    stored = StoredTensor(tmp_path / "gone.safetensors", "scaled_fp8", "F8_E4M3", shape, 10**9, 0)
    for got in read_all(reader, stored):
        assert got.shape == shape and got.dtype == torch.float8_e4m3fn


def test_unknown_dtypes_are_refused(reader: TensorReader, tmp_path: Path) -> None:
    stored = stored_in(tmp_path / "a.safetensors", any_bytes(8), "I64", (1,))
    with pytest.raises(UnsupportedError, match="some.weight of a.safetensors is stored as I64"):
        reader.mapped(stored)


def test_writing_does_not_change_the_file(reader: TensorReader, tmp_path: Path) -> None:
    stored = stored_in(tmp_path / "a.safetensors", any_bytes(64))
    before = stored.file.read_bytes()
    target = torch.empty(64, dtype=torch.uint8)
    reader.read_into([(stored, target)])
    target.zero_()
    assert stored.file.read_bytes() == before and torch.equal(reader.mapped(stored), any_bytes(64))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs files with holes")
def test_a_file_larger_than_memory_is_mapped(reader: TensorReader, tmp_path: Path) -> None:
    """Pages that could be written to would count as memory: Linux refuses more of them than there is, Windows promises it for each map."""
    path = tmp_path / "large.safetensors"
    size = 2 * (psutil.virtual_memory().total + psutil.swap_memory().total)
    try:
        with path.open("wb") as file:
            file.truncate(size)
            file.seek(size - 16)
            file.write(bytes(range(16)))
    except OSError:
        pytest.skip("files can't be that large here")
    stored = StoredTensor(path, "last.weight", "U8", (16,), size - 16, 16)
    assert reader.mapped(stored).tolist() == list(range(16))


# ---- in pieces


@pytest.mark.parametrize("size", [PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 13 * PIECE + 7])
def test_more_than_a_piece(reader: TensorReader, tmp_path: Path, size: int) -> None:
    for offset in (0, 17):
        content = any_bytes(size)
        for got in read_all(reader, stored_in(tmp_path / "a", content, offset=offset)):
            assert torch.equal(got, content)


def test_many_tensors_at_once(reader: TensorReader, tmp_path: Path) -> None:
    """To the host and to imagined GPUs, of several files, large ones among small and empty ones."""
    sizes = [7, 3 * PIECE + 1, 0, PIECE, 1, 12 * PIECE, 999] * 3
    wanted = [stored_in(tmp_path / f"{i}", any_bytes(size, i), offset=i) for i, size in enumerate(sizes)]
    with ImaginedGpus():
        targets = [torch.empty(size, dtype=torch.uint8, device=LAZY if i % 2 else CPU) for i, size in enumerate(sizes)]
        reader.read_into(list(zip(wanted, targets, strict=True)))
        for i, (size, target) in enumerate(zip(sizes, targets, strict=True)):
            assert torch.equal(target.cpu(), any_bytes(size, i)), i
    reader.read_into([])


def beside_each_other(path: Path, sizes: list[int], gap: int) -> list[StoredTensor]:
    """Tensors of one file, one behind the other with as much between them."""
    offsets = [sum(sizes[:number]) + gap * number for number in range(len(sizes))]
    path.write_bytes(any_bytes(offsets[-1] + sizes[-1] + 3, 5).numpy().tobytes())
    return [
        StoredTensor(path, f"{number}", "U8", (size,), offset, size)
        for number, (offset, size) in enumerate(zip(offsets, sizes, strict=True))
    ]


@pytest.mark.parametrize(("gap", "pieces"), [(0, 10), (7, 10), (300, 14)])
def test_small_tensors_that_lie_near_each_other_are_one_piece(
    reader: TensorReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gap: int, pieces: int
) -> None:
    """A block has thirty of them beside its ten large ones. Wanted in any order; what lies between is nobody's."""
    monkeypatch.setattr(reading, "GAP_BYTES", 100)
    sizes = [40, 1, 3 * PIECE + 11, 5, 1000, 8, 8, 8, 2 * PIECE, 30]
    stored = beside_each_other(tmp_path / "a", sizes, gap)
    found: list[reading._Piece] = []
    read_parts = reading._read_parts
    monkeypatch.setattr(reading, "_read_parts", lambda file, piece: (found.append(piece), read_parts(file, piece))[1])
    whole = torch.frombuffer(bytearray(stored[0].file.read_bytes()), dtype=torch.uint8)
    wanted = [(one, torch.zeros(one.size_bytes, dtype=torch.uint8)) for one in stored]
    random.Random(gap).shuffle(wanted)
    reader.read_into(wanted)
    for one, target in wanted:
        assert torch.equal(target, whole[one.offset : one.offset + one.size_bytes])
    assert len(found) == pieces and all(piece.size_bytes <= PIECE for piece in found)
    # By way of a buffer, as to a GPU.
    for piece in found:
        buffer = torch.zeros(piece.size_bytes, dtype=torch.uint8)
        with piece.path.open("rb", buffering=0) as file:
            reading._read_at(file, buffer.numpy().data, piece.offset)
        for place, target in piece.targets:
            assert torch.equal(buffer[place : place + target.numel()], target)


def test_what_is_not_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of other files, of another version of the file, for other devices; and those that overlap."""
    monkeypatch.setattr(reading, "PIECE_BYTES", 1000)
    meta, bytes_each = torch.device("meta"), 10

    def wanted(name: str, offset: int, device: torch.device = CPU, modified_ns: int = 0) -> tuple[StoredTensor, torch.Tensor]:
        stored = StoredTensor(tmp_path / name, "t", "U8", (bytes_each,), offset, bytes_each, modified_ns=modified_ns)
        return stored, torch.empty(bytes_each, dtype=torch.uint8, device=device)

    def pieces(*asked: tuple[StoredTensor, torch.Tensor]) -> list[tuple[str, int, int, int, str]]:
        found = list(reading._pieces(asked))
        for piece in found:
            assert {target.device for _, target in piece.targets} == {piece.device}
        return [(piece.path.name, piece.offset, piece.size_bytes, len(piece.targets), piece.device.type) for piece in found]

    assert pieces(wanted("a", 10), wanted("a", 0)) == [("a", 0, 20, 2, "cpu")]
    assert pieces(wanted("a", 0), wanted("b", 10)) == [("a", 0, 10, 1, "cpu"), ("b", 10, 10, 1, "cpu")]
    assert pieces(wanted("a", 0), wanted("a", 10, meta)) == [("a", 0, 10, 1, "cpu"), ("a", 10, 10, 1, "meta")]
    assert pieces(wanted("a", 0, modified_ns=1), wanted("a", 10, modified_ns=2)) == [("a", 0, 10, 1, "cpu"), ("a", 10, 10, 1, "cpu")]
    assert pieces(wanted("a", 0), wanted("a", 5)) == [("a", 0, 10, 1, "cpu"), ("a", 5, 10, 1, "cpu")]
    assert pieces(wanted("a", 0), wanted("a", 0)) == [("a", 0, 10, 1, "cpu")] * 2


def test_there_are_buffers_to_read_into_while_others_are_copied() -> None:
    assert reading.BUFFERS > reading.THREADS


Watch = Callable[[Callable[[int], None]], None]


@pytest.fixture
def before_reading(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Has a function of the place in the file called before each piece is read."""
    read_at = reading._read_at

    def watch(before: Callable[[int], None]) -> None:
        def watched(file: Any, rest: memoryview, offset: int) -> None:
            before(offset)
            read_at(file, rest, offset)

        monkeypatch.setattr(reading, "_read_at", watched)

    return watch


def test_pieces_are_read_by_several_threads(reader: TensorReader, tmp_path: Path, before_reading: Watch) -> None:
    count = min(2, reading.THREADS)
    threads, barrier = set(), threading.Barrier(count)

    def together(offset: int) -> None:
        if threading.get_ident() not in threads and len(threads) < count:
            threads.add(threading.get_ident())
            barrier.wait(timeout=30)

    content = any_bytes(8 * PIECE)
    target = torch.empty(content.numel(), dtype=torch.uint8)
    before_reading(together)
    reader.read_into([(stored_in(tmp_path / "a", content), target)])
    assert len(threads) == count and torch.equal(target, content)


def names_of_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("wan-sharded-reader")]


def test_threads_are_there_only_while_they_are_used(tmp_path: Path) -> None:
    reader = TensorReader()
    small, large = (stored_in(tmp_path / str(size), any_bytes(size)) for size in (PIECE, 5 * PIECE))
    for _ in range(2):  # closing is no end
        reader.read_into([(small, torch.empty(PIECE, dtype=torch.uint8))])
        assert names_of_threads() == [], "one piece needs none"
        target = torch.zeros(5 * PIECE, dtype=torch.uint8)
        reader.read_into([(large, target)])
        assert torch.equal(target, any_bytes(5 * PIECE)) and 0 < len(names_of_threads()) <= reading.THREADS
        reader.close()
        assert names_of_threads() == []
        reader.close()


# ---- while whoever asked goes on


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


def parts_of_one_file(path: Path, count: int) -> tuple[list[StoredTensor], list[torch.Tensor], torch.Tensor]:
    """Tensors of four pieces each, room for them, and what the file has."""
    size = 4 * PIECE
    stored = beside_each_other(path, [size] * count, 0)
    content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    return stored, [torch.zeros(size, dtype=torch.uint8) for _ in range(count)], content


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
    """Else an expert's blocks would all be begun at once, and a cancel would wait for them."""
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


class PlayedStream:
    """A GPU's stream, in which copies are made when they are waited for."""

    device = CPU

    def __init__(self) -> None:
        self.queued: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        self.fails = False
        self._playing = threading.Lock()

    def synchronize(self) -> None:
        with self._playing:
            while self.queued:
                targets, sources = self.queued.pop(0)
                for target, source in zip(targets, sources, strict=True):
                    target.copy_(source)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> PlayedStream:
    """What is wanted on the CPU goes through buffers and this stream."""
    played = PlayedStream()

    class Event:
        def record(self, stream: PlayedStream) -> None:
            pass

        def synchronize(self) -> None:
            time.sleep(random.random() * 0.002)
            played.synchronize()

    def foreach_copy(targets: list[torch.Tensor], sources: list[torch.Tensor], *, non_blocking: bool) -> None:
        if played.fails:
            raise RuntimeError("the GPU fell off the bus")
        played.queued.append((targets, sources))

    monkeypatch.setattr(reading, "CPU", torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: played)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch, "_foreach_copy_", foreach_copy)
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
def test_when_python_ends_nothing_waits_for_ever(
    reader: TensorReader, tmp_path: Path, stream: PlayedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Executors take nothing on then, but finish what they have."""
    stored, targets, content = parts_of_one_file(tmp_path / "a", 20)
    submit = ThreadPoolExecutor.submit

    def refused(pool: ThreadPoolExecutor, function: Any, *arguments: Any) -> Any:
        if function == reader._send:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        return submit(pool, function, *arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refused)
    reader.read_into(list(zip(stored, targets, strict=True)))
    stream.synchronize()
    assert torch.equal(torch.cat(targets), content[: 80 * PIECE])


def test_an_error_keeps_no_memory(reader: TensorReader, tmp_path: Path, before_reading: Watch) -> None:
    """What was to be filled is gone when it is let go, without waiting for Python to find cycles: another try may need that room."""
    stored, targets, _ = parts_of_one_file(tmp_path / "a", 1)

    def unlucky(offset: int) -> None:
        raise OSError("bad luck")

    before_reading(unlucky)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(CheckpointError) as caught:
            reader.read_into([(stored[0], targets[0])])
        address = targets[0].data_ptr()
        reader.close()
        del caught, stored
        targets.clear()
        live = [found for found in gc.get_objects() if isinstance(found, torch.Tensor) and found.data_ptr() == address]
        assert live == []
    finally:
        gc.enable()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("which", ["wan-sharded-reader", "wan-sharded-sender"])
def test_where_no_thread_can_be_had_it_says_so(
    reader: TensorReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, closed: bool
) -> None:
    stored, targets, content = parts_of_one_file(tmp_path / "a", 1)

    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name.startswith(which):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            reader.read_into([(stored[0], targets[0])])
    if closed:
        reader.close()
    reader.read_into([(stored[0], targets[0])])
    assert torch.equal(targets[0], content[: 4 * PIECE])


def test_systems_without_reading_at_a_place(reader: TensorReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no ``preadv``."""
    monkeypatch.delattr(os, "preadv", raising=False)
    stored, targets, content = parts_of_one_file(tmp_path / "a", 3)
    reader.read_into(list(zip(stored, targets, strict=True)))
    assert torch.equal(torch.cat(targets), content[: 12 * PIECE])


# ---- files that changed since their headers were read


def shorter(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 6)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES = {
    "deleted": Path.unlink,
    "shorter": shorter,
    "empty": lambda path: os.truncate(path, 0),
    "a folder": folder,
    "unreadable": lambda path: path.chmod(0),
}


@pytest.mark.parametrize("size", [PIECE, 8 * PIECE], ids=["one piece", "many"])
@pytest.mark.parametrize("change", CHANGES)
def test_files_that_changed(reader: TensorReader, tmp_path: Path, change: str, size: int) -> None:
    """Each way says which file, also beside others; and the reader goes on working."""
    if change == "unreadable" and (os.name == "nt" or os.geteuid() == 0):
        pytest.skip("whoever runs this may read everything")
    good, bad = (stored_in(tmp_path / name, any_bytes(size, seed)) for seed, name in enumerate(("good.safetensors", "bad.safetensors")))
    CHANGES[change](bad.file)
    target = torch.zeros(size, dtype=torch.uint8)
    with ImaginedGpus():
        there = torch.zeros(size, dtype=torch.uint8, device=LAZY)
        ways = {
            "mapped": lambda: reader.mapped(bad),
            "into memory": lambda: reader.read_into([(bad, target)]),
            "beside another": lambda: reader.read_into([(good, target.clone()), (bad, target), (good, target.clone())]),
            "to a GPU": lambda: reader.read_into([(bad, there)]),
        }
        for way in ways.values():
            with pytest.raises(CheckpointError, match=r"bad\.safetensors could not be read .*Download it again\."):
                way()
    reader.read_into([(good, target)])
    assert torch.equal(target, any_bytes(size, 0))


def test_nothing_is_written_after_the_failure(reader: TensorReader, tmp_path: Path, before_reading: Watch) -> None:
    """The memory may be another tensor's by then. The first piece fails at once; the others are slow, and work."""
    under_way = 0
    lock = threading.Lock()

    def slow(offset: int) -> None:
        nonlocal under_way
        if offset == 0:
            raise OSError("bad luck")
        with lock:
            under_way += 1
        time.sleep(0.05)
        with lock:
            under_way -= 1

    target = torch.zeros(10 * PIECE, dtype=torch.uint8)
    before_reading(slow)
    with pytest.raises(CheckpointError, match=r"slow\.bin could not be read \(bad luck\)"):
        reader.read_into([(stored_in(tmp_path / "slow.bin", any_bytes(10 * PIECE)), target)])
    assert under_way == 0
    target.fill_(0xAA)
    time.sleep(0.15)
    assert bool((target == 0xAA).all())


def test_the_end_goes_missing_while_it_is_read(reader: TensorReader, tmp_path: Path, before_reading: Watch) -> None:
    """As when a download is started over: the first pieces are read, the last ones are not there any more."""
    stored = stored_in(tmp_path / "vanishing.safetensors", any_bytes(20 * PIECE))

    def cut(offset: int) -> None:
        if offset >= 10 * PIECE:
            os.truncate(stored.file, 10 * PIECE)

    target = torch.empty(20 * PIECE, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"vanishing\.safetensors could not be read \(it has become shorter\)"):
        before_reading(cut)
        reader.read_into([(stored, target)])
    before_reading(lambda offset: None)
    stored_in(stored.file, any_bytes(20 * PIECE))
    reader.read_into([(stored, target)])
    assert torch.equal(target, any_bytes(20 * PIECE)), "once it is there again"
