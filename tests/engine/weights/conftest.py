"""Readers of files whose pieces are small."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from played_library import PlayedCalls
from played_streams import PlayedCopies
from read_files import PIECE, Watch
from wan_sharded.engine.weights import library_reads, pieces
from wan_sharded.engine.weights.library_reads import Buffers, LibraryReads
from wan_sharded.engine.weights.reading import TensorReader


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few kilobytes are as many pieces as gigabytes are."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(library_reads, "PIECE_BYTES", PIECE)


@pytest.fixture
def reader() -> Iterator[TensorReader]:
    reader = TensorReader()
    yield reader
    reader.close()


@pytest.fixture
def before_reading(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Has a function of the place in the file called before each piece is read."""
    read_at = pieces.read_at

    def watch(before: Callable[[int], None]) -> None:
        def watched(file: Any, rest: memoryview, offset: int) -> None:
            before(offset)
            read_at(file, rest, offset)

        monkeypatch.setattr(pieces, "read_at", watched)

    return watch


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
    made = LibraryReads(Buffers())
    yield made
    closing = threading.Thread(target=made.close, daemon=True)
    closing.start()
    closing.join(timeout=20)
    assert not closing.is_alive()
