"""Reads by the C library's threads for more than one GPU, each of which may be busy for long. What a real one gets is in tests/gpu."""

import time
from pathlib import Path

import pytest
from played_library import PlayedCalls, Wanted, all_buffers_are_back
from played_streams import PlayedCopies
from read_files import PIECE
from wan_sharded.engine.weights import library_reads
from wan_sharded.engine.weights.library_calls import asynchronous_reads
from wan_sharded.engine.weights.library_reads import LibraryReads

pytestmark = [pytest.mark.usefixtures("small_pieces"), pytest.mark.timeout(60)]
needs_library = pytest.mark.skipif(asynchronous_reads() is None, reason="no C library that reads in threads of its own")


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
def test_a_gpu_that_is_busy_keeps_no_other_waiting(reads: LibraryReads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        PlayedCopies, "are_over", lambda copies, copied: copied.event.stream is not busy.stream and not copied.event.stream.synchronize()
    )
    busy, idle = Wanted(tmp_path / "busy", 2), Wanted(tmp_path / "idle", 60)
    busy.begin(reads)
    idle.begin(reads)
    assert idle.arrived()
    assert sum(len(buffers) for sent in reads._sent.values() for buffers, _ in sent) >= 2
    monkeypatch.setattr(PlayedCopies, "are_over", lambda copies, copied: True)
    assert busy.arrived() and all_buffers_are_back(reads)


@needs_library
def test_a_busy_gpu_leaves_buffers_to_another(reads: LibraryReads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is to be read for it, and first."""
    played = PlayedCopies.are_over
    monkeypatch.setattr(PlayedCopies, "are_over", lambda copies, copied: copied.event.stream is not busy.stream and played(copies, copied))
    busy, idle = Wanted(tmp_path / "busy", 60), Wanted(tmp_path / "idle", 60)
    with reads._errands.lock:  # both, before it looks
        reads._errands.add([*busy.errands, *idle.errands], urgent=False)
    for wanted in (busy, idle):
        wanted.reading.add(60, 60 * PIECE)
    reads.begin([], urgent=False)
    assert idle.arrived() and not busy.reading.is_over
    monkeypatch.setattr(PlayedCopies, "are_over", played)
    assert busy.arrived() and all_buffers_are_back(reads)


@needs_library
def test_what_is_let_go_does_not_wait_for_a_busy_gpu(reads: LibraryReads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlayedCopies, "are_over", lambda copies, copied: False)
    one = Wanted(tmp_path / "a", 60)
    one.begin(reads)
    buffers = (library_reads.DEPTH + library_reads.SENT) * library_reads.THREADS
    while sum(len(filled) for sent in list(reads._sent.values()) for filled, _ in list(sent)) < buffers:
        time.sleep(0.001)
    one.reading.stop()
    monkeypatch.setattr(PlayedCopies, "are_over", lambda copies, copied: True)
    assert one.reading.incomplete and all_buffers_are_back(reads)


def test_two_that_end_together_go_to_their_own_gpus(reads: LibraryReads, calls: PlayedCalls, tmp_path: Path) -> None:
    one, two = Wanted(tmp_path / "one", 1), Wanted(tmp_path / "two", 1)
    with reads._errands.lock:
        reads._errands.add([*one.errands, *two.errands], urgent=False)
    for wanted in (one, two):
        wanted.reading.add(1, PIECE)
    reads.begin([], urgent=False)
    calls.asked_for(2)
    with calls._changed:  # it may look only after both
        calls.end()
        calls.end()
    assert one.arrived() and two.arrived()
    assert [len(wanted.stream.all_queued) for wanted in (one, two)] == [1, 1]
