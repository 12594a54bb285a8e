"""Step time and time left, as the sampler node says them."""

import pytest
import torch

pytest.importorskip("comfy.cli_args", reason="put a ComfyUI folder on PYTHONPATH to run this")
from wan_sharded.bridge.pace import Pace, duration
from wan_sharded.engine import StepReport

HIGH, LOW = "high noise expert", "low noise expert"


def report(step: int, expert: str, seconds: float, loading: float = 0.0, forwards: int = 1, left: int = 0, to_come: str = "") -> StepReport:
    return StepReport(step, 6, expert, seconds, loading, forwards, left, to_come, torch.zeros(1, 16, 1, 2, 2))


def test_a_run_with_both_experts_and_guidance_for_the_first() -> None:
    pace = Pace()
    # Loads, compiles, and is all that is known.
    first = pace.words(report(1, HIGH, 70.0, 20.0, 2, left=7, to_come=LOW))
    assert first == (
        "Step 1 of 6 (high noise expert), 50.0 s a step, about 2 min 55 s left and loading the low noise expert\n"
        "Loading the high noise expert took 20 s."
    )
    # From here on the first step doesn't count: 10 s a forward.
    second = pace.words(report(2, HIGH, 20.0, 0.0, 2, left=5, to_come=LOW))
    assert second.splitlines()[0] == "Step 2 of 6 (high noise expert), 20.0 s a step, about 50 s left and loading the low noise expert"
    third = pace.words(report(3, HIGH, 22.0, 0.0, 2, left=3, to_come=LOW))
    assert third.startswith("Step 3 of 6 (high noise expert), 21.0 s a step, about 32 s left and")
    # The switch: loading is told apart, and a step is one forward now.
    fourth = pace.words(report(4, LOW, 40.0, 30.0, 1, left=2))
    assert fourth == (
        "Step 4 of 6 (low noise expert), 10.0 s a step, about 20 s left\n"
        "Loading the high noise expert took 20 s.\nLoading the low noise expert took 30 s."
    )
    assert "left" not in pace.words(report(6, LOW, 10.0))


def test_the_newest_steps_count() -> None:
    pace = Pace()
    for seconds in [30.0] * 10 + [60.0] * 5:
        words = pace.words(report(3, HIGH, seconds, left=1))
    assert "60.0 s a step, about 60 s left" in words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (99.4, "99 s"), (100, "1 min 40 s"), (3599, "59 min 59 s"), (6300, "1 h 45 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
