"""The thread that sends what was read: every piece once and in its own GPU's stream, every buffer back, whatever fails. Streams are played."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from wan_sharded.engine.weights.pieces import Piece, Stretch
from wan_sharded.engine.weights.sending import Sender, Sending

pytestmark = [pytest.mark.usefixtures("small_pieces"), pytest.mark.timeout(60)]
BUFFERS = 3


class PlayedStream:
    def __init__(self) -> None:
        self.waited = 0

    def synchronize(self) -> None:
        self.waited += 1


class Gpus:
    """What torch would have been asked for.

    Attributes:
        copied: the stream, and the values that went into each target, in order.
        copies_fail, waits_fail: with what a GPU that is gone answers.
    """

    def __init__(self) -> None:
        self.copied: list[tuple[Any, list[int]]] = []
        self.copies_fail = self.waits_fail = False
        self._current: Any = None

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self._current = stream
        yield
        self._current = None

    def foreach_copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor], *, non_blocking: bool) -> None:
        if self.copies_fail:
            raise RuntimeError("the GPU fell off the bus")
        assert all(target.shape == source.shape for target, source in zip(targets, sources, strict=True))
        self.copied.append((self._current, [int(source[0]) for source in sources]))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    played = Gpus()

    class Event:
        def record(self, stream: Any) -> None:
            pass

        def synchronize(self) -> None:
            if played.waits_fail:
                raise RuntimeError("the GPU fell off the bus")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", played.stream)
    monkeypatch.setattr(torch, "_foreach_copy_", played.foreach_copy)
    return played


class Answers:
    """What senders said of pieces: the numbers of those that were sent, and the errors."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.errors: list[BaseException] = []
        self._changed = threading.Condition()

    def of(self, number: int) -> Any:
        def done(error: BaseException | None) -> None:
            with self._changed:
                self.sent.append(number) if error is None else self.errors.append(error)
                self._changed.notify_all()

        return done

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.sent) + len(self.errors) >= count, timeout=20)


@pytest.fixture
def sender(gpus: Gpus) -> Iterator[Sender]:
    made = Sender(BUFFERS)
    yield made
    made.close()


def a_piece(sender: Sender, number: int, stream: Any, answers: Answers) -> Sending:
    """One whose bytes are its number."""
    buffer = sender.buffer()
    buffer.room(10)[:] = bytes([number] * 10)
    return Sending(
        buffer, Piece(Path("file"), 0, 0, 10, ((0, Stretch.of(torch.zeros(10, dtype=torch.uint8))),)), stream, answers.of(number)
    )


def all_buffers(sender: Sender) -> set[int]:
    """Have every buffer once, and give them back."""
    buffers = [sender.buffer() for _ in range(BUFFERS)]
    for buffer in buffers:
        sender.give(buffer)
    return {id(buffer) for buffer in buffers}


def test_each_piece_once_in_its_own_stream(sender: Sender, gpus: Gpus) -> None:
    streams, answers = [PlayedStream(), PlayedStream()], Answers()
    together = [a_piece(sender, number, streams[number % 2], answers) for number in range(BUFFERS)]
    with sender._sending:  # so that all wait for it
        for one in together:
            sender.send(one)
    answers.wait_for(BUFFERS)
    for number in range(BUFFERS, 20):
        sender.send(a_piece(sender, number, streams[number % 2], answers))
    answers.wait_for(20)
    assert sorted(answers.sent) == list(range(20))
    for which, stream in enumerate(streams):
        assert [number for where, numbers in gpus.copied if where is stream for number in numbers] == list(range(which, 20, 2))
    assert len(all_buffers(sender)) == BUFFERS


def test_after_a_copy_that_failed(sender: Sender, gpus: Gpus) -> None:
    """Some of what was queued with it may be under way: its buffer must not be filled before that is over."""
    stream, answers = PlayedStream(), Answers()
    gpus.copies_fail = True
    for number in range(2 * BUFFERS):
        sender.send(a_piece(sender, number, stream, answers))
    answers.wait_for(2 * BUFFERS)
    assert not answers.sent and stream.waited == len({id(error) for error in answers.errors}) >= 1
    gpus.copies_fail = False
    sender.send(a_piece(sender, 99, stream, answers))
    answers.wait_for(2 * BUFFERS + 1)
    assert answers.sent == [99] and len(all_buffers(sender)) == BUFFERS


def test_after_a_wait_that_failed(sender: Sender, gpus: Gpus) -> None:
    gpus.waits_fail = True
    answers = Answers()
    for number in range(2 * BUFFERS):
        sender.send(a_piece(sender, number, PlayedStream(), answers))
    answers.wait_for(2 * BUFFERS)
    assert len(all_buffers(sender)) == BUFFERS


def test_what_comes_while_it_finds_nothing_more_is_sent(sender: Sender, gpus: Gpus) -> None:
    stream, answers = PlayedStream(), Answers()
    first, second = (a_piece(sender, number, stream, answers) for number in range(2))

    class Outbox(SimpleQueue):
        """Another piece comes just when it has been seen to be empty."""

        late: Sending | None = second

        def empty(self) -> bool:
            found = super().empty()
            late = self.late
            if found and late is not None:
                self.late = None
                sender.send(late)
            return found

    outbox: Any = Outbox()
    sender._outbox = outbox
    sender.send(first)
    answers.wait_for(2)
    assert answers.sent == [0, 1]


def test_closing_waits_for_what_is_to_be_sent(gpus: Gpus) -> None:
    sender, answers = Sender(BUFFERS), Answers()
    for number in range(BUFFERS):
        sender.send(a_piece(sender, number, PlayedStream(), answers))
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("wan-sharded-sender")]
    sender.close()
    assert sorted(answers.sent) == list(range(BUFFERS)) and threads
    assert not any(thread.is_alive() for thread in threads)
