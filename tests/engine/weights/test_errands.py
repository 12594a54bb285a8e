"""Whose errand is next."""

from pathlib import Path
from typing import Any

import pytest
from wan_sharded.engine.weights.errands import Errand, Errands, Reading
from wan_sharded.engine.weights.pieces import Piece

FAST, SLOW = "fast", "slow"


def errands_for(stream: Any, count: int, reading: Reading | None = None) -> list[Errand]:
    reading = reading or Reading()
    reading.add(count, count)
    return [Errand(Piece(Path("a"), 0, number, 1, ()), reading, stream) for number in range(count)]


def taken(waiting: Errands, under_way: dict[Any, int] | None = None) -> list[tuple[Any, int]]:
    found = []
    while (errand := waiting.take() if under_way is None else waiting.take(under_way)) is not None:
        found.append((errand.stream, errand.piece.offset))
    assert not waiting and len(waiting) == 0
    return found


def test_gpus_take_turns_each_in_order() -> None:
    waiting = Errands()
    waiting.add(errands_for(FAST, 4), urgent=False)
    waiting.add(errands_for(None, 1), urgent=False)
    waiting.add(errands_for(SLOW, 2), urgent=False)
    assert len(waiting) == 7 and waiting
    assert taken(waiting) == [(FAST, 0), (None, 0), (SLOW, 0), (FAST, 1), (SLOW, 1), (FAST, 2), (FAST, 3)]


def test_it_is_the_turn_of_who_has_fewest_under_way() -> None:
    waiting = Errands()
    waiting.add(errands_for(SLOW, 3), urgent=False)
    waiting.add(errands_for(FAST, 3), urgent=False)
    assert taken(waiting, {SLOW: 2, FAST: 1}) == [(FAST, 0), (FAST, 1), (FAST, 2), (SLOW, 0), (SLOW, 1), (SLOW, 2)]


def test_what_is_urgent_is_first_whoever_it_is_for() -> None:
    waiting = Errands()
    waiting.add(errands_for(FAST, 2), urgent=False)
    waiting.add(errands_for(SLOW, 2), urgent=True)
    assert taken(waiting, {SLOW: 9}) == [(SLOW, 0), (SLOW, 1), (FAST, 0), (FAST, 1)]


@pytest.mark.parametrize("urgent", [False, True])
def test_there_is_something_of_either_kind(urgent: bool) -> None:
    waiting = Errands()
    assert not waiting
    waiting.add(errands_for(FAST, 1), urgent=urgent)
    assert waiting and len(waiting) == 1


@pytest.mark.parametrize("urgent", [False, True])
def test_what_was_let_go_is_left_out_for_each_gpu(urgent: bool) -> None:
    waiting, stopped = Errands(), Reading()
    waiting.add(errands_for(FAST, 2, stopped), urgent=urgent)
    waiting.add(errands_for(SLOW, 1, stopped), urgent=urgent)
    waiting.add(errands_for(FAST, 1), urgent=urgent)
    waiting.leave_out_stopped()
    assert len(waiting) == 4
    stopped.stopped = True
    waiting.leave_out_stopped()
    assert stopped.incomplete and stopped.is_over
    assert taken(waiting) == [(FAST, 0)]


@pytest.mark.parametrize("urgent", [False, True])
def test_what_cannot_be_done_is_left_out_once(urgent: bool) -> None:
    waiting, reading = Errands(), Reading()
    mine, others = errands_for(FAST, 3, reading), errands_for(SLOW, 1)
    waiting.add([*mine, *others], urgent=urgent)
    assert waiting.take() is mine[0]
    waiting.leave_out(mine)
    assert reading.incomplete and not reading.is_over, "one was taken on"
    reading.done()
    assert reading.is_over and taken(waiting) == [(SLOW, 0)]
