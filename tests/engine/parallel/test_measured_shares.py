"""Shares of the tokens follow what workers took, by clocks that tell what they are told.

The workers are all the CPU, and the numbers computed are right all the time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from crews import CPU, cpu_workers, crew_of, expert_of, inputs, on_cpu, relative, saved_model
from diffusers import WanTransformer3DModel
from wan_sharded.engine.parallel import forward as forward_module
from wan_sharded.engine.parallel import workers as workers_module
from wan_sharded.engine.parallel.crew import Crew
from wan_sharded.engine.parallel.forward import CALIBRATION_BLOCKS, ParallelForward
from wan_sharded.engine.parallel.functions import BlockFunctions
from wan_sharded.engine.parallel.workers import Worker
from wan_sharded.engine.weights.expert import Expert

Model = tuple[WanTransformer3DModel, Expert]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Model]:
    """diffusers' model with so many blocks, and the same weights as an expert on the CPU."""
    made: dict[int, Model] = {}

    def make(blocks: int) -> Model:
        if blocks not in made:
            theirs, files = saved_model(tmp_path_factory.mktemp("model") / "transformer", num_layers=blocks)
            made[blocks] = theirs, on_cpu(expert_of(files))
        return made[blocks]

    return make


@pytest.fixture(autouse=True)
def as_comfyui_runs_it() -> Iterator[None]:
    with torch.inference_mode():
        yield


def tokens_of(forward: ParallelForward) -> dict[int, int]:
    return {index: timing.tokens for index, timing in forward.latest_timings().items()}


class Clock:
    """A worker's time passes only while it computes, by its tokens and its real speed (tokens per second)."""

    def __init__(self, *speeds: float):
        self.speeds = list(speeds)
        self.now = 0.0
        self.computing: int | None = None

    def tick(self, tokens: int) -> None:
        assert self.computing is not None
        self.now += tokens / self.speeds[self.computing]


class ClockedWorker(Worker):
    clock: Clock

    @contextmanager
    def computing(self):
        before, self.clock.computing = self.clock.computing, self.index
        with super().computing():
            yield
        self.clock.computing = before


class ClockedFunctions(BlockFunctions):
    clock: Clock

    def keys_into(self, weights, x, *rest):
        self.clock.tick(x.shape[1])
        return super().keys_into(weights, x, *rest)

    def finish(self, weights, x, *rest):
        self.clock.tick(x.shape[1])
        return super().finish(weights, x, *rest)


class ClockedCrew(Crew):
    """Whose copies take much longer than its computing."""

    def link(self, *args, **kwargs):
        self.workers[0].clock.now += 1000.0
        return super().link(*args, **kwargs)


def clocked(monkeypatch: pytest.MonkeyPatch, expert: Expert, guesses: list[float], clock: Clock, *, timed: bool) -> ParallelForward:
    monkeypatch.setattr(workers_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(ClockedWorker, "clock", clock, raising=False)
    monkeypatch.setattr(ClockedFunctions, "clock", clock, raising=False)
    team = [ClockedWorker(index, CPU) for index in range(len(guesses))]
    plain = crew_of(team, guesses, range_tokens=20, timed=timed)
    return ParallelForward(expert, ClockedCrew(plain.shares, plain.main), ClockedFunctions(expert.math))


def test_the_first_forward_is_shared_out_by_measured_speeds(monkeypatch, model: Callable[[int], Model]) -> None:
    theirs, expert = model(3)
    forward = clocked(monkeypatch, expert, [1.0, 1.0], Clock(300.0, 100.0), timed=False)
    got = forward(**inputs(), return_dict=False)[0]
    assert relative(got, theirs(**inputs()).sample) < 1e-5
    timings = forward.latest_timings()
    assert {index: timing.tokens for index, timing in timings.items()} == {0: 79, 1: 26}
    # Two passes over its tokens in each block; waiting for the other's keys and values left out.
    assert timings[0].seconds == pytest.approx(2 * 79 / 300) and timings[1].seconds == pytest.approx(2 * 26 / 100)


class OddAtFirst(Clock):
    """The last worker takes some times as long, or as short, in the first blocks that are computed."""

    def __init__(self, *speeds: float, odd: dict[range, float]):
        super().__init__(*speeds)
        self.odd = odd
        self.block = -1

    def next_block(self) -> None:
        self.block += 1

    def tick(self, tokens: int) -> None:
        before = self.now
        super().tick(tokens)
        if self.computing == len(self.speeds) - 1:
            self.now = before + (self.now - before) * next((factor for blocks, factor in self.odd.items() if self.block in blocks), 1.0)


FIRST, ALL = CALIBRATION_BLOCKS, CALIBRATION_BLOCKS + 8


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {range(FIRST): 2.0},
        {range(FIRST): 2800 / 3000},
        {range(FIRST + 4): 2.0, range(ALL - 1, ALL): 2.0},
    ],
    ids=["nothing", "slow at first", "fast at first", "slow for long, and in the last block"],
)
@pytest.mark.parametrize(
    ("speed", "tokens", "corrected"), [(3000.0, [52, 53], [52, 53]), (2800.0, [52, 53], [54, 51]), (2640.0, [56, 49], [56, 49])]
)
def test_where_blocks_are_short_what_is_odd_does_not_count(
    monkeypatch, model: Callable[[int], Model], odd: dict[range, float], speed: float, tokens: list[int], corrected: list[int]
) -> None:
    """A difference that equal GPUs may have for a moment is left for later forwards to find, unless the shares must change anyway."""
    _, expert = model(8)
    clock = OddAtFirst(3000.0, speed, odd=odd)
    forward = clocked(monkeypatch, expert, [1.0, 1.0], clock, timed=False)
    forward._blocks._check_cancelled = clock.next_block
    forward(**inputs())
    assert clock.block == ALL + 8 - 1
    slow_at_first = 2.0 in odd.values()
    assert list(tokens_of(forward).values()) == (corrected if slow_at_first else tokens)


@pytest.mark.parametrize(
    ("speeds", "odd", "tokens"),
    [((3000.0, 3000.0), {range(FIRST): 1.12}, [52, 53]), ((105.0, 105 / 1.15), {}, [56, 49])],
    ids=["others follow", "blocks are long"],
)
def test_the_first_blocks_alone_say_little_where_others_follow(
    monkeypatch, model: Callable[[int], Model], speeds: tuple[float, float], odd: dict[range, float], tokens: list[int]
) -> None:
    _, expert = model(8)
    clock = OddAtFirst(*speeds, odd=odd)
    forward = clocked(monkeypatch, expert, [1.0, 1.0], clock, timed=False)
    forward._blocks._check_cancelled = clock.next_block
    forward(**inputs())
    assert list(tokens_of(forward).values()) == tokens


@pytest.mark.parametrize(("seconds", "more"), [((0.3, 0.05), 3), ((0.05, 0.24), 4), ((0.45, 0.45), 0), ((3.0, 0.1), 0), ((1e-9, 1e-9), 8)])
def test_no_more_blocks_are_timed_than_a_second_allows(
    monkeypatch, model: Callable[[int], Model], seconds: tuple[float, float], more: int
) -> None:
    _, expert = model(8)
    asked: list[int] = []
    forward = clocked(monkeypatch, expert, [1.0, 1.0], Clock(*(105 / one for one in seconds)), timed=False)
    forward._blocks._check_cancelled = lambda: asked.append(1)
    forward(**inputs())
    assert len(asked) == CALIBRATION_BLOCKS + more + 8


def test_nor_where_what_is_not_computing_takes_long(monkeypatch, model: Callable[[int], Model]) -> None:
    """Weights that come from system memory, keys and values over slow links."""
    _, expert = model(8)
    asked: list[int] = []
    forward = clocked(monkeypatch, expert, [1.0, 1.0], Clock(1e9, 1e9), timed=False)
    forward._blocks._check_cancelled = lambda: asked.append(1)
    times = iter(0.4 * number for number in range(1000))
    monkeypatch.setattr(forward_module, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    forward(**inputs())
    assert len(asked) == 2 * CALIBRATION_BLOCKS + 2 + 8


@pytest.mark.parametrize(("workers", "given"), [(1, {}), (3, {"frames": 1, "size": (2, 2)})], ids=["one worker", "one token"])
def test_no_more_blocks_are_timed_where_nothing_can_be_shared_out(model: Callable[[int], Model], workers: int, given: dict) -> None:
    theirs, expert = model(8)
    asked: list[int] = []
    crew = crew_of(cpu_workers(workers), timed=False)
    forward = ParallelForward(expert, crew, BlockFunctions(expert.math), check_cancelled=lambda: asked.append(1))
    assert relative(forward(**inputs(**given)).sample, theirs(**inputs(**given)).sample) < 1e-5
    assert len(asked) == CALIBRATION_BLOCKS + 8


def test_a_worker_whose_speed_changes_gets_another_share(monkeypatch, model: Callable[[int], Model]) -> None:
    theirs, expert = model(3)
    clock = Clock(100.0, 100.0)
    forward = clocked(monkeypatch, expert, [1.0, 1.0], clock, timed=True)
    expected = theirs(**inputs()).sample

    def tokens_of_the_next() -> list[int]:
        assert relative(forward(**inputs()).sample, expected) < 1e-5
        return list(tokens_of(forward).values())

    assert tokens_of_the_next() == [52, 53]
    clock.speeds = [100.0, 400.0]  # noticed during this forward, used in the one after it
    assert tokens_of_the_next() == [52, 53]
    assert tokens_of_the_next() == [21, 84]
    clock.speeds = [100.0, 401.0]
    assert tokens_of_the_next() == tokens_of_the_next() == [21, 84], "what would be gained is not worth a change"
    forward._crew.shares[1].most = 0.6
    assert tokens_of_the_next() == [42, 63], "its memory was planned for no more"


def test_shares_settle(monkeypatch, model: Callable[[int], Model]) -> None:
    """Forwards that vary leave them alone; a small difference moves them once it has been there for some forwards."""
    _, expert = model(3)
    clock = Clock(100.0, 100.0)
    forward = clocked(monkeypatch, expert, [1.0, 1.0], clock, timed=True)

    def tokens_of_the_next(*speeds: float) -> list[int]:
        clock.speeds = list(speeds)
        forward(**inputs())
        return list(tokens_of(forward).values())

    for number in range(8):
        assert tokens_of_the_next(100.0, 100.0 if number % 2 else 97.0) == [52, 53], "by turns"
    assert tokens_of_the_next(100.0, 80.0) == tokens_of_the_next(100.0, 100.0) == [52, 53], "an odd one"
    forward._crew.measured.forget()
    found = [tokens_of_the_next(100.0, 93.0) for _ in range(8)]
    assert found == [[52, 53]] * 4 + [[54, 51]] * 4


def test_a_small_difference_is_not_followed_to_its_end(monkeypatch, model: Callable[[int], Model]) -> None:
    """The rest of it comes from the shares themselves, where power is what limits a GPU."""
    _, expert = model(3)
    clock = Clock(100.0, 100.0)
    forward = clocked(monkeypatch, expert, [1.0, 1.0], clock, timed=True)
    found = []
    for speeds in ([100.0, 88.0], [100.0, 88.0], [100.0, 40.0], [100.0, 40.0], [100.0, 40.0]):
        clock.speeds = speeds
        forward(**inputs())
        found.append(list(tokens_of(forward).values()))
    # Of 105 tokens 56 would be all of the first difference, and 75 of the second, which is a large one.
    assert found[:2] == [[52, 53], [55, 50]] and found[-1] == [75, 30]


def test_what_was_timed_before_a_calibration_does_not_count(monkeypatch, model: Callable[[int], Model]) -> None:
    _, expert = model(3)
    forward = clocked(monkeypatch, expert, [1.0, 1.0], Clock(100.0, 100.0), timed=False)
    for _ in range(5):
        forward._crew.measured.add([52, 53], [9.0, 1.0])
    forward(**inputs())
    assert list(tokens_of(forward).values()) == [52, 53]


def test_nothing_is_learnt_while_some_have_nothing_to_do(monkeypatch, model: Callable[[int], Model]) -> None:
    """Measured and guessed speeds are in different units."""
    _, expert = model(3)
    forward = clocked(monkeypatch, expert, [1.0, 1.0, 1.0], Clock(100.0, 100.0, 400.0), timed=True)
    forward(**inputs(frames=1, size=(2, 4)))
    assert tokens_of(forward) == {0: 1, 2: 1}
    forward(**inputs())
    assert tokens_of(forward) == {0: 35, 1: 35, 2: 35}
