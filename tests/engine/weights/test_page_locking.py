"""Which of an expert's weights in system memory are page-locked when: before a GPU copies there, behind what is read. The driver is played."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from crews import expert_of
from expert_reference import same_bits, tiny_lora
from played_driver import PlayedDriver
from tiny_single_files import file_names
from wan_sharded.engine import host_memory
from wan_sharded.engine.checkpoints.single_file import open_expert_file
from wan_sharded.engine.errors import CheckpointError
from wan_sharded.engine.weights import pieces
from wan_sharded.engine.weights.expert import CPU, Expert
from wan_sharded.engine.weights.keeping import Filling, Keeper
from wan_sharded.engine.weights.precision import Precision, resolve_precision
from wan_sharded.engine.weights.reading import Reading

BEHIND = "wan-sharded-locking"
HERE = threading.current_thread().name
BLOCKS = ("blocks.0", "blocks.1", "blocks.2")


made: list[Expert] = []


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedDriver]:
    played = PlayedDriver.installed(monkeypatch, 1024**3)
    yield played
    played.when_asked = lambda pointer, size: None  # it may know an expert, whose memory knows the driver
    while made:
        made.pop().close_files()  # which ends its threads


def expert_in(folder: Path, choice: str = "default") -> Expert:
    """Of a file in fp8: kept as it is, or converted."""
    path = folder / file_names("fp8_scaled_old")["transformer"]
    found, _ = resolve_precision(choice, open_expert_file(path).stored_dtype, on_gpu=True)
    made.append(expert_of(open_expert_file(path), Precision(torch.float32, found.storage_dtype, found.as_stored)))
    return made[-1]


def flat(expert: Expert, part: str) -> torch.Tensor:
    packed = expert.packed(part)
    assert packed is not None
    return packed.flat


def bring(expert: Expert, *parts: str, later: bool = False) -> None:
    for part in parts:
        expert.bring(part, CPU, CPU, packed=True, later=later)


@contextmanager
def read_when(may_read: threading.Event) -> Iterator[None]:
    read_at = pieces.read_at

    def held(file: object, rest: memoryview, offset: int) -> None:
        assert may_read.wait(timeout=30)
        read_at(file, rest, offset)

    with mock.patch.object(pieces, "read_at", held):
        yield


def test_what_is_read_as_it_is_kept_is_locked_behind(tiny_single_files: Path, driver: PlayedDriver) -> None:
    """Not before it is there; and it is when everything has arrived."""
    expert, may_read = expert_in(tiny_single_files), threading.Event()
    there: dict[int, torch.Tensor] = {}
    driver.when_asked = lambda pointer, size: there.update({pointer: by_address()[pointer].clone()})

    def by_address() -> dict[int, torch.Tensor]:
        return {flat(expert, part).data_ptr(): flat(expert, part) for part in BLOCKS}

    with read_when(may_read):
        bring(expert, *BLOCKS, later=True)
        assert driver.asked == 0 and expert._host_pool.unfilled_bytes == sum(flat(expert, part).numel() for part in BLOCKS)
        may_read.set()
        expert.arrived()
    assert driver.by == [BEHIND] * 3 and expert._host_pool.unfilled_bytes == 0
    for part in BLOCKS:
        matrix = expert.layout(part).span("attn1.to_q.weight")
        assert torch.equal(there[flat(expert, part).data_ptr()][matrix], flat(expert, part)[matrix]), part


def test_it_is_locked_when_nothing_comes_later(tiny_single_files: Path, driver: PlayedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = host_memory.lock_filled
    monkeypatch.setattr(host_memory, "lock_filled", lambda buffer: time.sleep(0.05) or lock(buffer))
    expert = expert_in(tiny_single_files)
    bring(expert, "blocks.0")
    assert flat(expert, "blocks.0").is_pinned()
    bring(expert, *BLOCKS, later=True)
    expert.arrived()
    assert all(flat(expert, part).is_pinned() for part in BLOCKS)


def test_what_is_converted_is_locked_first(tiny_single_files: Path, driver: PlayedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU copies there."""
    expert, fill, pinned = expert_in(tiny_single_files, "int8"), Keeper.fill, []

    def watched(
        keeper: Keeper, part: str, names: object, adapters: object, layout: object, flat: torch.Tensor, *rest, **options
    ) -> Filling:
        pinned.append(flat.is_pinned())
        return fill(keeper, part, names, adapters, layout, flat, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Keeper, "fill", watched)
    bring(expert, *BLOCKS, later=True)
    expert.arrived()
    assert pinned == [True] * 3 and BEHIND not in driver.by


@pytest.mark.parametrize(("choice", "by"), [("default", BEHIND), ("int8", HERE)])
def test_what_a_lora_makes_larger_is_locked_again(
    tiny_single_files: Path, driver: PlayedDriver, tmp_path: Path, choice: str, by: str
) -> None:
    expert = expert_in(tiny_single_files, choice)
    shapes = {name: stored.shape for name, stored in expert.files.tensors.items()}
    lora = tiny_lora(tmp_path / "a.safetensors", shapes, "lightx2v", 4, 1)
    bring(expert, "blocks.1")
    driver.by.clear()
    expert.use_loras([lora.choice(1.0)])
    expert._host_pool.clear()
    bring(expert, "blocks.1")
    assert driver.by == [by] and flat(expert, "blocks.1").is_pinned()
    fresh = expert_in(tiny_single_files, choice)
    fresh.use_loras([lora.choice(1.0)])
    bring(fresh, "blocks.1")
    assert same_bits(expert.block_weights("blocks.1"), fresh.block_weights("blocks.1"))


def test_what_was_mapped_is_locked_behind(tiny_single_files: Path, driver: PlayedDriver) -> None:
    """System memory has room for it now."""
    expert = expert_in(tiny_single_files)
    expert.bring("blocks.1", CPU, CPU, packed=False)
    assert driver.asked == expert.host_bytes_to_make("blocks.1") == 0
    bring(expert, "blocks.1", later=True)
    expert.arrived()
    assert driver.by == [BEHIND] and flat(expert, "blocks.1").is_pinned()


@pytest.mark.parametrize("met", ["an error of the disk", "a cancel", "an error while it is locked"])
def test_what_did_not_arrive_is_forgotten_and_nothing_is_under_way(
    tiny_single_files: Path, driver: PlayedDriver, monkeypatch: pytest.MonkeyPatch, met: str
) -> None:
    expert, read_at, lock = expert_in(tiny_single_files), pieces.read_at, host_memory.lock_filled

    def slow_lock(buffer: torch.Tensor) -> bool:
        time.sleep(0.05)
        if met == "an error while it is locked":
            raise RuntimeError("the driver's")
        return lock(buffer)

    def slow_read(file: object, rest: memoryview, offset: int) -> None:
        time.sleep(0.01)
        if met == "an error of the disk":
            raise OSError("bad luck")
        read_at(file, rest, offset)

    monkeypatch.setattr(host_memory, "lock_filled", slow_lock)
    bring(expert, "blocks.0", later=True)
    expert._keeper.finish()
    monkeypatch.setattr(pieces, "PIECE_BYTES", 16 * 1024)
    monkeypatch.setattr(pieces, "read_at", slow_read)
    bring(expert, "blocks.1", "blocks.2", later=True)
    if met == "an error of the disk":
        with pytest.raises(CheckpointError):
            expert.arrived()
    expert.drop_arriving()
    assert expert._host_pool.unfilled_bytes == 0 and not [t for t in threading.enumerate() if t.name == BEHIND]
    assert flat(expert, "blocks.0").is_pinned() == (met != "an error while it is locked")
    assert expert.packed("blocks.1") is expert.packed("blocks.2") is None
    monkeypatch.setattr(pieces, "read_at", read_at)
    bring(expert, *BLOCKS)
    whole = expert_in(tiny_single_files)
    bring(whole, *BLOCKS)
    assert all(same_bits(expert.block_weights(part), whole.block_weights(part)) for part in BLOCKS)


# ---- whether it was read


def test_a_reading_has_ended_when_no_thread_reads_for_it() -> None:
    """Not when the first one failed."""
    for error in (None, OSError("bad luck")):
        reading, found = Reading(), []
        reading.add(2, 10)
        waiting = threading.Thread(target=lambda reading=reading, found=found: found.append(reading.ended()))
        waiting.start()
        reading.done(error)
        waiting.join(timeout=0.1)
        assert found == [] and waiting.is_alive()
        reading.done()
        waiting.join(timeout=30)
        assert found == [error is None]


@pytest.mark.parametrize("failed", [None, 0, 1])
def test_a_filling_is_read_when_all_its_readings_have_ended(failed: int | None) -> None:
    filling, found = Filling({}, [Reading(), Reading()]), []
    for reading in filling.readings:
        reading.add(1, 10)
    waiting = threading.Thread(target=lambda: found.append(filling.is_read()))
    waiting.start()
    for number, reading in enumerate(filling.readings):
        waiting.join(timeout=0.1)
        assert found == [], number
        reading.done(OSError("bad luck") if number == failed else None)
    waiting.join(timeout=30)
    assert found == [failed is None]
