"""How far the host queues ahead of the devices: with a clock of our own, and devices that take as long as they are told to."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from wan_sharded.engine import run_ahead
from wan_sharded.engine.parallel.blocks import BlockLoop
from wan_sharded.engine.run_ahead import QUEUED_SECONDS, RUN_AHEAD_BLOCKS, RunAhead
from wan_sharded.engine.weights import hooks

BLOCKS = 12


class Cancelled(Exception):
    pass


class Device:
    """Computes one block after the other; the host's own work takes no time.

    Attributes:
        now: the host's clock.
        busy_until: when the last block that is queued will be done.
        most_queued: blocks that were not done when another one had been queued, at most.
    """

    def __init__(self, block_seconds: float):
        self.block_seconds = block_seconds
        self.now = self.busy_until = 0.0
        self.ends: list[float] = []
        self.most_queued = 0
        self.cancelled_at: float | None = None

    def compute(self, *_: Any, **__: Any) -> None:
        self.busy_until = max(self.now, self.busy_until) + self.block_seconds
        self.ends.append(self.busy_until)
        self.most_queued = max(self.most_queued, sum(end > self.now for end in self.ends))

    def mark(self) -> SimpleNamespace:
        end = self.busy_until

        def synchronize() -> None:
            self.now = max(self.now, end)

        return SimpleNamespace(synchronize=synchronize)

    def check_cancelled(self) -> None:
        if self.cancelled_at is not None and self.now >= self.cancelled_at:
            raise Cancelled


def loop_of(device: Device, monkeypatch: pytest.MonkeyPatch) -> tuple[BlockLoop, list[Any]]:
    monkeypatch.setattr(run_ahead, "time", SimpleNamespace(perf_counter=lambda: device.now))
    crew: Any = SimpleNamespace(ceilings={}, run_ahead=RunAhead())
    loop = BlockLoop(crew, SimpleNamespace(), device.check_cancelled)  # type: ignore[arg-type]
    monkeypatch.setattr(loop, "_run_block", device.compute)
    state = SimpleNamespace(worker=SimpleNamespace(mark=device.mark, device="cpu"), fetcher=SimpleNamespace(begin=lambda: None))
    return loop, [state]


@pytest.mark.parametrize("block_seconds", [0.01, 0.3, 0.65, 1.4])
@pytest.mark.parametrize("moment", [0.0, 0.3, 0.999])
def test_a_cancel_leaves_little_to_be_waited_for(block_seconds: float, moment: float, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(block_seconds)
    loop, states = loop_of(device, monkeypatch)
    loop.run(states, range(BLOCKS), ())  # so that the host knows how long a block takes
    device.cancelled_at = device.busy_until + (3 + moment) * block_seconds
    with pytest.raises(Cancelled):
        loop.run(states, range(BLOCKS), ())
    # The error goes on when all that is queued is done.
    assert max(device.busy_until, device.now) - device.cancelled_at <= QUEUED_SECONDS + 1e-9


@pytest.mark.parametrize("block_seconds", [0.3, 1.4, 6.0])
def test_before_any_block_was_timed_too(block_seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first forward on slow GPUs: no more than the block that computes is waited for."""
    device = Device(block_seconds)
    loop, states = loop_of(device, monkeypatch)
    device.cancelled_at = 0.1
    with pytest.raises(Cancelled):
        loop.run(states, range(BLOCKS), ())
    assert max(device.busy_until, device.now) <= max(block_seconds, device.cancelled_at + QUEUED_SECONDS)


def test_the_other_experts_forward_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each expert's forward has a loop of its own; the crew is the same."""
    device = Device(0.01)
    loop, states = loop_of(device, monkeypatch)
    loop.run(states, range(BLOCKS), ())
    device.most_queued = 0
    device.now = device.busy_until
    other = BlockLoop(loop._crew, SimpleNamespace(), device.check_cancelled)  # type: ignore[arg-type]
    monkeypatch.setattr(other, "_run_block", device.compute)
    other.run(states, range(3), ())
    assert device.most_queued == RUN_AHEAD_BLOCKS + 1


def test_one_device_at_a_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around each block of a model that has hooks: before any was timed, one block is queued, and then what its time allows."""
    monkeypatch.setattr(hooks.probe, "trim", lambda *_: None)
    monkeypatch.setattr(hooks.torch.cuda, "current_stream", lambda device: None)
    for block_seconds, first_most, most in ((0.01, 1, RUN_AHEAD_BLOCKS + 1), (2.5, 1, 1)):
        device, ahead = Device(block_seconds), RunAhead()
        monkeypatch.setattr(run_ahead, "time", SimpleNamespace(perf_counter=lambda device=device: device.now))
        monkeypatch.setattr(
            hooks.torch.cuda, "Event", lambda device=device: SimpleNamespace(record=lambda stream: None, **vars(device.mark()))
        )
        cuda = torch.device("cuda", 0)
        around = [hooks.PaceHook(cuda, device.check_cancelled, {cuda: 0}, ahead, first=number == 0) for number in range(BLOCKS)]
        for number, hook in enumerate(2 * around):
            hook.pre_forward(torch.nn.Identity())
            device.compute()
            hook.post_forward(torch.nn.Identity(), None)
            assert device.most_queued <= (first_most if number < 2 else most)
        assert device.most_queued == most


def test_short_blocks_are_queued_ahead_and_the_longest_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for block_seconds, most in ((0.01, RUN_AHEAD_BLOCKS + 1), (0.65, 2), (2.5, 1)):
        device = Device(block_seconds)
        loop, states = loop_of(device, monkeypatch)
        loop.run(states, range(BLOCKS), ())
        device.most_queued = 0
        before = device.now = device.busy_until
        loop.run(states, range(BLOCKS), ())
        assert device.most_queued == most
        assert device.busy_until - before == pytest.approx(BLOCKS * block_seconds)


def test_one_slow_block_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first one, for which functions are compiled."""
    device = Device(20.0)
    loop, states = loop_of(device, monkeypatch)
    loop.run(states, range(4), ())
    for _ in range(2):
        device.block_seconds, device.now, device.most_queued = 0.01, device.busy_until, 0
        loop.run(states, range(BLOCKS), ())
    assert device.most_queued == RUN_AHEAD_BLOCKS + 1
