"""What the C library's threads read into on the way to GPUs: made together, kept for the next load, given back with the model."""

import dataclasses
import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_bench import Bench
from played_streams import PlayedCopies, PlayedStream
from read_files import PIECE, parts_of_one_file
from wan_sharded.engine import loaded, open_model
from wan_sharded.engine.errors import CheckpointError
from wan_sharded.engine.system_memory import SystemMemory
from wan_sharded.engine.weights import library_reads, reading
from wan_sharded.engine.weights.library_calls import asynchronous_reads
from wan_sharded.engine.weights.library_reads import Buffers, LibraryReads
from wan_sharded.engine.weights.reading import TensorReader

needs_library = pytest.mark.skipif(asynchronous_reads() is None, reason="no C library that reads in threads of its own")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, small_pieces: None) -> list[int]:
    """How many pieces each call made room for."""
    found: list[int] = []

    def watched(size_bytes: int) -> torch.Tensor:
        found.append(size_bytes // PIECE)
        return torch.empty(size_bytes, dtype=torch.uint8)

    monkeypatch.setattr(library_reads, "host_buffer", watched)
    monkeypatch.setattr(library_reads, "THREADS", 2)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    return found


def test_as_many_are_made_as_are_wanted_soon_and_may_be(made: list[int]) -> None:
    buffers, taken = Buffers(), []
    for wanted in (1, 5, 5, 5, 5, 5):  # three for each of two threads
        assert buffers
        taken.append(buffers.take(wanted))
    assert made == [1, 2, 2, 1] and not buffers
    assert len({buffer.address for buffer in taken}) == 6 and all(buffer.memory.numel() == PIECE for buffer in taken)
    buffers.give(taken[1:3])
    assert [buffers.take(5), buffers.take(5)] == [taken[2], taken[1]], "what came back last is still in the processor's cache"


def test_those_that_could_not_be_locked_are_made_again(made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = Buffers()
    locked = [buffers.take(2), buffers.take(2)]
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    others = [buffers.take(2), buffers.take(2)]
    buffers.give(locked + others)
    buffers.settle()
    assert list(buffers) == locked
    made.clear()
    again = [buffers.take(9) for _ in range(6)]
    assert made == [2, 2] and not buffers and not set(others) & set(again)


class SlowMaking:
    """Attributes: begun, some are being made; held, to be set so that they can be."""

    def __init__(self) -> None:
        self.begun, self.held = threading.Event(), threading.Event()


@pytest.fixture
def slow_making(made: list[int], monkeypatch: pytest.MonkeyPatch) -> SlowMaking:
    slow, make = SlowMaking(), library_reads.host_buffer

    def slowly(size_bytes: int) -> torch.Tensor:
        slow.begun.set()
        assert slow.held.wait(timeout=20)
        return make(size_bytes)

    monkeypatch.setattr(library_reads, "host_buffer", slowly)
    return slow


@needs_library
def test_all_are_made_before_anything_is_read(made: list[int], stream: PlayedStream, tmp_path: Path) -> None:
    reader = TensorReader()
    reader.prepare()
    reader._library()._thread.submit(lambda: None).result(timeout=20)
    assert made == [2, 2, 2], "three for each of two threads"
    read_whole(reader, stream, tmp_path / "a")
    reader.close()
    reader.prepare()
    reader.close()
    assert made == [2, 2, 2], "they are kept"


@needs_library
@pytest.mark.timeout(60)
def test_what_is_to_be_read_waits_for_those_only_that_are_being_made(
    made: list[int], stream: PlayedStream, tmp_path: Path, slow_making: SlowMaking
) -> None:
    reader = TensorReader()
    reader.prepare()
    assert slow_making.begun.wait(timeout=20)
    stored, targets, content = parts_of_one_file(tmp_path / "a", 1)
    reading = reader.begin([(dataclasses.replace(stored[0], shape=(PIECE,), size_bytes=PIECE), targets[0][:PIECE])])
    slow_making.held.set()
    reading.wait()
    stream.synchronize()
    assert torch.equal(targets[0][:PIECE], content[:PIECE])
    reader.close()
    assert made == [2], "one piece needs no more"


def test_nothing_is_prepared_where_the_library_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_reads, "available", lambda: False)
    reader = TensorReader()
    reader.prepare()
    assert reader._library_reads is None and reader._buffers is None


def test_nothing_is_prepared_where_no_thread_is_to_be_had(stream: PlayedStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said when something is to be read."""

    def refuses(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(reading, "LibraryReads", refuses)
    reader = TensorReader()
    reader.prepare()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        reader._library()


@needs_library
def test_what_cannot_be_locked_yet_is_made_when_it_is_needed(
    made: list[int], stream: PlayedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model may hold what can be locked, until this one is loaded."""
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    reader = TensorReader()
    reader.prepare()
    reader._library()._thread.submit(lambda: None).result(timeout=20)
    assert made == [2] and reader._buffers is not None and not list(reader._buffers) and reader._buffers._unmade == 6
    reader.close()


@needs_library
def test_no_more_is_made_than_was_begun_when_it_is_closed(made: list[int], stream: PlayedStream, slow_making: SlowMaking) -> None:
    reader = TensorReader()
    reader.prepare()
    reads = reader._library()
    assert slow_making.begun.wait(timeout=20)
    closing = threading.Thread(target=reader.close)
    closing.start()
    while not reads._closing:
        time.sleep(0.001)
    slow_making.held.set()
    closing.join(timeout=20)
    assert made == [2]


@needs_library
def test_memory_that_cannot_be_had_is_said_when_it_is_needed(
    made: list[int], stream: PlayedStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(size_bytes: int) -> torch.Tensor:
        raise MemoryError("no room")

    reader = TensorReader()
    with monkeypatch.context() as patch:
        patch.setattr(library_reads, "host_buffer", refuses)
        reader.prepare()
        with pytest.raises(MemoryError, match="no room"):
            read_whole(reader, stream, tmp_path / "a")
    read_whole(reader, stream, tmp_path / "b")
    reader.close()


class Copies(PlayedCopies):
    """Attributes: error, to be raised by whoever asks whether copies have arrived."""

    error: Exception | None = None

    def are_over(self, copied: Any) -> bool:
        if self.error is not None:
            raise self.error
        return super().are_over(copied)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> PlayedStream:
    """Of a GPU that the CPU is played for."""
    stream = PlayedStream()
    monkeypatch.setattr(library_reads, "available", lambda: True)
    monkeypatch.setattr(library_reads, "DriverCopies", Copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(reading, "CPU", torch.device("meta"))
    return stream


def read_whole(reader: TensorReader, stream: PlayedStream, path: Path) -> None:
    stored, targets, content = parts_of_one_file(path, 3)
    reader.read_into(list(zip(stored, targets, strict=True)))
    stream.synchronize()
    assert torch.equal(torch.cat(targets), content[: 12 * PIECE])


def at_rest(reader: TensorReader) -> LibraryReads:
    """What reads, once its thread has taken back all that was sent."""
    reads = reader._library_reads
    assert reads is not None
    while reads._at_work:
        time.sleep(0.001)
    return reads


@needs_library
@pytest.mark.timeout(60)
def test_none_is_lost_for_good_after_an_error(
    made: list[int], stream: PlayedStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reading thread was at: else, after some of them, the next load would wait for ever."""
    reader = TensorReader()
    monkeypatch.setattr(Copies, "error", MemoryError("nobody thought of it"))
    for turn in range(8):
        with pytest.raises(MemoryError, match="nobody thought of it"):
            read_whole(reader, stream, tmp_path / str(turn))
        reads = at_rest(reader)
        assert not any(reads._sent.values()) and sum(1 for _ in reads._buffers) + reads._buffers._unmade == 6
        assert not stream.queued, "copies from memory that may be let go have arrived"
        reader.close()
    monkeypatch.setattr(Copies, "error", None)
    read_whole(reader, stream, tmp_path / "a")
    reader.close()
    assert reader._buffers is not None and sum(1 for _ in reader._buffers) + reader._buffers._unmade == 6


@needs_library
@pytest.mark.timeout(60)
def test_nobody_waits_where_the_gpu_cannot_be_waited_for(
    made: list[int], stream: PlayedStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed() -> None:
        raise MemoryError("not even that")

    reader = TensorReader()
    stored, targets, _ = parts_of_one_file(tmp_path / "a", 12)  # more than there are buffers
    with monkeypatch.context() as patch:
        patch.setattr(Copies, "error", MemoryError("nobody thought of it"))
        patch.setattr(stream, "synchronize", failed)
        with pytest.raises(MemoryError, match="nobody thought of it"):
            reader.read_into(list(zip(stored, targets, strict=True)))
        reader.close()
    read_whole(reader, stream, tmp_path / "b")
    reader.close()


@needs_library
@pytest.mark.timeout(60)
def test_an_error_that_is_being_handled_keeps_no_memory(made: list[int], stream: PlayedStream, tmp_path: Path) -> None:
    """Its traceback knows the reading thread's frames; what runs out of memory gives the model back while it is handled."""
    reader = TensorReader()
    read_whole(reader, stream, tmp_path / "a")
    memory = [weakref.ref(buffer.memory) for buffer in at_rest(reader)._buffers]
    stored, targets, _ = parts_of_one_file(tmp_path / "b", 3)
    (tmp_path / "b").write_bytes(b"shorter")
    try:
        reader.read_into(list(zip(stored, targets, strict=True)))
    except CheckpointError as error:
        reader.close()
        reader.give_back_buffers()
        gc.collect()
        assert error.__traceback__ is not None and memory and not any(one() is not None for one in memory)
    else:
        pytest.fail("it is shorter")
    reader.close()


@needs_library
def test_unlocked_ones_are_not_kept(made: list[int], stream: PlayedStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    reader = TensorReader()
    read_whole(reader, stream, tmp_path / "a")
    reader.close()
    assert made and reader._buffers is not None and not list(reader._buffers)


@needs_library
def test_a_reader_keeps_them_until_they_are_given_back(made: list[int], stream: PlayedStream, tmp_path: Path) -> None:
    reader, counts = TensorReader(), []
    for turn in range(4):
        read_whole(reader, stream, tmp_path / str(turn))
        reader.close()
        counts.append(sum(made))
        if turn == 1:
            assert reader._buffers is not None
            memory = [weakref.ref(buffer.memory) for buffer in reader._buffers]
            reader.give_back_buffers()
            gc.collect()
            assert memory and not any(one() is not None for one in memory)
    # How many are needed depends on how fast copies arrive.
    assert 0 < counts[0] <= counts[1] <= 6 and counts[1] < counts[2] <= counts[3] <= counts[1] + 6


@needs_library
@pytest.mark.timeout(60)
def test_what_is_given_back_while_it_is_used_stays_until_then(made: list[int], stream: PlayedStream, tmp_path: Path) -> None:
    reader = TensorReader()
    read_whole(reader, stream, tmp_path / "a")
    stored, targets, content = parts_of_one_file(tmp_path / "b", 12)
    reader.begin(list(zip(stored, targets, strict=True)))
    reader.give_back_buffers()
    reader.finish()
    stream.synchronize()
    assert torch.equal(torch.cat(targets), content[: 48 * PIECE])
    reader.close()
    assert reader._buffers is None


@pytest.mark.parametrize("when", ["released", "frames need the room"])
def test_a_model_gives_them_back(
    bench: Callable[..., Bench], make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    one, given = bench(), []
    one.run(open_model(make_checkpoint(num_blocks=2), weight_dtype="fp32"))
    monkeypatch.setattr(TensorReader, "give_back_buffers", lambda reader: given.append(reader))
    model = one.owner.loaded
    assert model is not None
    model.make_room_for_frames()
    assert not given, "there is room"
    if when == "released":
        one.owner.release()
    else:
        monkeypatch.setattr(loaded, "system_memory", lambda: SystemMemory(2**36, 0))
        model.make_room_for_frames()
    assert {id(reader) for reader in given} == {id(expert._keeper.reader) for expert in model.experts.values()}
