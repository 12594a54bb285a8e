"""Copies that CUDA's driver is asked for, which is played; what a real GPU gets is in tests/gpu/test_single_files.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from wan_sharded.engine.memory_errors import is_out_of_memory
from wan_sharded.engine.weights import driver_copies
from wan_sharded.engine.weights.driver_copies import DriverCopies
from wan_sharded.engine.weights.pieces import Piece, Stretch

pytestmark = pytest.mark.timeout(60)


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

    def cuGetErrorString(self, error: int, place: Any) -> int:
        place._obj.value = b"out of memory" if error == 2 else b"an illegal address"
        return 0


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
            if where["stream"] is not None:
                mode = "in inference mode" if torch.is_inference_mode_enabled() else "not in inference mode"
                played.did.append(("record by torch", self.cuda_event, mode, where["stream"]))
            assert where["device"] == stream.device or where["stream"] is stream
            played.context = 100 + stream.device.index

    where: dict[str, Any] = {"device": None, "stream": None}

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        where["device"] = device
        yield
        where["device"] = None
        played.context = 100  # torch goes back to the first GPU

    @contextmanager
    def in_stream(stream: Stream) -> Iterator[None]:
        where["stream"] = stream
        yield
        where["stream"] = None

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
        self.piece = Piece(Path("file"), 0, 0, 50, ((0, Stretch.of(self.targets[0])), (43, Stretch.of(self.targets[1]))))


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
    assert not copies.are_over(first) and copies.are_over(second)
    copies.give_back(second)
    other, again = (copies.queue(stream, [Memory()]) for stream in (Stream(1), Stream(0)))  # type: ignore[arg-type]
    assert other.number not in (first.number, second.number) and again is second


@pytest.mark.parametrize("which", ["get", "set", "copy", "record"])
def test_a_refusal_is_told(driver: PlayedDriver, which: str) -> None:
    driver.answers[which] = 700
    stream: Any = Stream(0)
    with pytest.raises(RuntimeError, match=r"CUDA error: an illegal address \(number 700"):
        DriverCopies(driver).queue(stream, [Memory()])


def test_out_of_memory_is_known_as_such(driver: PlayedDriver) -> None:
    driver.answers["copy"] = 2
    stream: Any = Stream(0)
    with pytest.raises(RuntimeError) as caught:
        DriverCopies(driver).queue(stream, [Memory()])
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("torch_says", ["arrived", "under way", "failed"])
def test_what_the_driver_cannot_tell_torch_is_asked(driver: PlayedDriver, torch_says: str) -> None:
    """A GPU that failed is not waited for; but a buffer whose copies may be under way must not be filled."""
    copies, stream = DriverCopies(driver), Stream(0)
    copied = copies.queue(stream, [Memory()])  # type: ignore[arg-type]

    def query() -> bool:
        if torch_says == "failed":
            raise RuntimeError("the GPU fell off the bus")
        return torch_says == "arrived"

    copied.event.query = query  # type: ignore[method-assign]
    driver.answers[f"query {copied.number}"] = 201
    assert copies.are_over(copied) == (torch_says != "under way")


def test_many_small_parts_are_copied_by_torch(driver: PlayedDriver) -> None:
    memory, stream = Memory(), Stream(0)
    targets = [torch.zeros(1, dtype=torch.uint8) for _ in range(driver_copies.MOST_TARGETS + 1)]
    memory.piece = Piece(Path("file"), 0, 0, 50, tuple(enumerate(map(Stretch.of, targets))))
    copied = DriverCopies(driver).queue(stream, [memory])  # type: ignore[arg-type]
    assert driver.did == [("record by torch", copied.number, "in inference mode", stream)]
    assert [int(target) for target in targets] == list(range(len(targets)))


def test_memory_that_is_not_locked_is_copied_by_torch(driver: PlayedDriver) -> None:
    """Which does not keep others waiting meanwhile."""
    memories = [Memory(), Memory(is_locked=False)]
    stream: Any = Stream(0)
    copied = DriverCopies(driver).queue(stream, memories)
    assert driver.did == [("record by torch", copied.number, "in inference mode", stream)]
    for memory in memories:
        assert [target.tolist() for target in memory.targets] == [list(range(20)), list(range(43, 50))]
