"""Tensors as their files have them, in every way there is to read them; and files that are not there any more, in the middle of it.

What goes through page-locked buffers to a real GPU is in tests/gpu/test_single_files.py.
"""

import os
import random
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from imagined_gpus import ImaginedGpus
from read_files import PIECE, Watch, any_bytes, beside_each_other, stored_in
from wan_sharded.engine.checkpoints.stored import StoredTensor
from wan_sharded.engine.errors import CheckpointError, UnsupportedError
from wan_sharded.engine.weights import pieces, reading
from wan_sharded.engine.weights.pieces import raw_shape
from wan_sharded.engine.weights.reading import TensorReader

CPU, LAZY = torch.device("cpu"), torch.device("lazy:0")
pytestmark = pytest.mark.usefixtures("small_pieces")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


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


@pytest.mark.parametrize(("gap", "count"), [(0, 7), (7, 7), (300, 14)])
def test_what_lies_near_each_other_is_read_together(
    reader: TensorReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gap: int, count: int
) -> None:
    """A block has thirty small tensors beside its ten large ones. Wanted in any order; what lies between is nobody's."""
    monkeypatch.setattr(pieces, "GAP_BYTES", 100)
    sizes = [40, 1, 3 * PIECE + 11, 5, 1000, 8, 8, 8, 2 * PIECE, 30]
    stored = beside_each_other(tmp_path / "a", sizes, gap)
    found: list[pieces.Piece] = []
    read_parts = pieces.read_parts
    monkeypatch.setattr(pieces, "read_parts", lambda file, piece: (found.append(piece), read_parts(file, piece))[1])
    whole = torch.frombuffer(bytearray(stored[0].file.read_bytes()), dtype=torch.uint8)
    wanted = [(one, torch.zeros(one.size_bytes, dtype=torch.uint8)) for one in stored]
    random.Random(gap).shuffle(wanted)
    reader.read_into(wanted)
    for one, target in wanted:
        assert torch.equal(target, whole[one.offset : one.offset + one.size_bytes])
    assert len(found) == count and all(piece.size_bytes <= PIECE for piece in found)
    if gap < pieces.GAP_BYTES:
        assert all(piece.size_bytes > 0.8 * PIECE for piece in found), "a small rest costs as much as a whole piece"
    # By way of a buffer, as to a GPU.
    for piece in found:
        buffer = torch.zeros(piece.size_bytes, dtype=torch.uint8)
        with piece.path.open("rb", buffering=0) as file:
            pieces.read_at(file, buffer.numpy().data, piece.offset)
        for place, target in piece.targets:
            assert torch.equal(buffer[place : place + target.size_bytes], target.view())


def test_a_stretch_is_some_of_its_memory() -> None:
    memory = torch.arange(20, dtype=torch.uint8)
    whole, some = pieces.Stretch.of(memory), pieces.Stretch(memory, 3, 5)
    assert pieces.Stretch.of(some) is some and whole.view() is memory and some.device == CPU
    assert some.view().tolist() == [3, 4, 5, 6, 7]
    assert some.address == some.view().data_ptr() == whole.address + 3
    some.view().zero_()
    assert memory[2:9].tolist() == [2, 0, 0, 0, 0, 0, 8]


def test_what_is_wanted_may_be_anywhere_in_larger_memory(reader: TensorReader, tmp_path: Path) -> None:
    """As the tensors of a part, several of which share pieces of their file."""
    sizes = [2 * PIECE + 3, 5, 0, PIECE - 1, 700]
    stored = beside_each_other(tmp_path / "a", sizes, 0)
    with ImaginedGpus():
        for device in (CPU, LAZY):
            memory = torch.full((sum(sizes) + 10 * len(sizes),), 7, dtype=torch.uint8, device=device)
            begins = [sum(sizes[:number]) + 10 * number for number in range(len(sizes))]
            wanted = [(one, pieces.Stretch(memory, begin, one.size_bytes)) for one, begin in zip(stored, begins, strict=True)]
            reader.begin(wanted).wait()
            whole, expected = stored[0].file.read_bytes(), torch.full(memory.shape, 7, dtype=torch.uint8)
            for one, begin in zip(stored, begins, strict=True):
                bytes_of = bytearray(whole[one.offset : one.offset + one.size_bytes])
                expected[begin : begin + one.size_bytes] = torch.tensor(bytes_of, dtype=torch.uint8)
            assert torch.equal(memory.cpu(), expected)


def test_what_is_not_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of other files, of another version of the file, for other devices; and those that overlap."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    meta, bytes_each = torch.device("meta"), 10

    def wanted(name: str, offset: int, device: torch.device = CPU, modified_ns: int = 0) -> tuple[StoredTensor, torch.Tensor]:
        stored = StoredTensor(tmp_path / name, "t", "U8", (bytes_each,), offset, bytes_each, modified_ns=modified_ns)
        return stored, torch.empty(bytes_each, dtype=torch.uint8, device=device)

    def cut(*asked: tuple[StoredTensor, torch.Tensor]) -> list[tuple[str, int, int, int, str]]:
        found = list(pieces.pieces_of([(stored, pieces.Stretch.of(memory)) for stored, memory in asked], PIECE))
        for piece in found:
            assert {target.device for _, target in piece.targets} == {piece.device}
        return [(piece.path.name, piece.offset, piece.size_bytes, len(piece.targets), piece.device.type) for piece in found]

    assert cut(wanted("a", 10), wanted("a", 0)) == [("a", 0, 20, 2, "cpu")]
    assert cut(wanted("a", 0), wanted("b", 10)) == [("a", 0, 10, 1, "cpu"), ("b", 10, 10, 1, "cpu")]
    assert cut(wanted("a", 0), wanted("a", 10, meta)) == [("a", 0, 10, 1, "cpu"), ("a", 10, 10, 1, "meta")]
    assert cut(wanted("a", 0, modified_ns=1), wanted("a", 10, modified_ns=2)) == [("a", 0, 10, 1, "cpu"), ("a", 10, 10, 1, "cpu")]
    assert cut(wanted("a", 0), wanted("a", 5)) == [("a", 0, 10, 1, "cpu"), ("a", 5, 10, 1, "cpu")]
    assert cut(wanted("a", 0), wanted("a", 0)) == [("a", 0, 10, 1, "cpu")] * 2


def test_there_are_buffers_to_read_into_while_others_are_copied() -> None:
    assert reading.BUFFERS > reading.THREADS


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


def test_threads_are_there_only_while_they_are_used(tmp_path: Path) -> None:
    reader, others = TensorReader(), set(threading.enumerate())

    def names_of_threads() -> list[str]:
        return [one.name for one in threading.enumerate() if one.name.startswith("wan-sharded-reader") and one not in others]

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


def test_for_nothing_no_thread_is_made(reader: TensorReader) -> None:
    before = threading.active_count()
    reader.begin([]).wait()
    assert threading.active_count() == before


def test_gguf_of_what_is_no_matrix(reader: TensorReader, tmp_path: Path) -> None:
    """A bias that is quantized: one row."""
    content = any_bytes(4 * 34)
    for got in read_all(reader, stored_in(tmp_path / "a.gguf", content, "GGUF:Q8_0", (128,), 32)):
        assert torch.equal(got, content.view(1, 136))
