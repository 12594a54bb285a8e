"""When compiling pays, what it may not change, and that a compiler that fails costs nothing but time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crews import cpu_workers, crew_of, expert_of, inputs, on_cpu, relative, saved_model
from diffusers import WanTransformer3DModel
from torch._dynamo.testing import CompileCounter
from wan_sharded.engine.parallel import functions as functions_module
from wan_sharded.engine.parallel.forward import ParallelForward
from wan_sharded.engine.parallel.functions import COMPILE_SECONDS, SAVED_SHARE, BlockFunctions, can_compile, pays_off
from wan_sharded.engine.weights.expert import Expert

MANY = 10**9


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[WanTransformer3DModel, Expert]:
    """diffusers' model, and the same weights as an expert on the CPU."""
    theirs, files = saved_model(tmp_path_factory.mktemp("model") / "transformer")
    return theirs, on_cpu(expert_of(files))


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> Expert:
    return on_cpu(expert_of(tiny_checkpoint))


@pytest.fixture(autouse=True)
def nothing_compiled_stays() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def failing_compiler(error: Exception, *, after: int = 0) -> Callable[..., Any]:
    """Fails as torch does: when what it has compiled is called, at once or at a later size."""

    def compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        calls = 0

        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                raise error
            return function(*args)

        return call

    return compile


def forward_of(expert: Expert, functions: BlockFunctions, *, forwards_left: int = MANY, count: int = 2, **options: Any) -> ParallelForward:
    crew = crew_of(cpu_workers(count), timed=False, range_tokens=40)
    return ParallelForward(expert, crew, functions, forwards_left=lambda: forwards_left, **options)


# ---- whether to compile


def test_compiling_pays_when_it_saves_more_than_it_takes() -> None:
    forwards = 40
    break_even = COMPILE_SECONDS / (forwards * SAVED_SHARE)
    assert pays_off(1.01 * break_even, forwards, 1) and not pays_off(0.99 * break_even, forwards, 1)
    # Each device compiles for itself.
    assert pays_off(2.02 * break_even, forwards, 2) and not pays_off(1.98 * break_even, forwards, 2)
    assert not pays_off(1000.0, 0, 1), "nothing is left to be faster"
    assert not pays_off(0.0, 1000, 1)


def test_twenty_steps_of_a_real_video_pay_and_a_preview_does_not() -> None:
    """40 forwards of 480x832x81 take an H200 some three seconds each."""
    assert pays_off(3.0, 40, 1)
    assert not pays_off(0.3, 8, 1)


def test_nothing_is_compiled_without_a_gpu(monkeypatch: pytest.MonkeyPatch, both: tuple[WanTransformer3DModel, Expert]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not can_compile()
    functions = BlockFunctions(both[1].math)
    forward_of(both[1], functions)(**inputs())
    assert not functions.compiled and functions.failure is None


@pytest.mark.parametrize(("compilable", "forwards_left"), [(False, MANY), (True, 0)], ids=["not compilable", "no forwards left"])
def test_nothing_is_compiled_where_it_is_not_wanted(monkeypatch, both, compilable: bool, forwards_left: int) -> None:
    monkeypatch.setattr(functions_module, "can_compile", lambda: True)
    monkeypatch.setattr(torch, "compile", failing_compiler(RuntimeError("must not be called")))
    functions, said = BlockFunctions(both[1].math, compilable=compilable), []
    forward_of(both[1], functions, forwards_left=forwards_left, on_stage=said.append)(**inputs())
    assert not functions.compiled and functions.failure is None and said == []


# ---- a compiler that works


def test_one_compiled_version_serves_all_blocks_and_all_sizes(monkeypatch, both: tuple[WanTransformer3DModel, Expert]) -> None:
    """Traced by torch's own compiler, into graphs that are run as they are: generating code for them is its business."""
    theirs, expert = both
    counter, real = CompileCounter(), torch.compile
    monkeypatch.setattr(functions_module, "can_compile", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=counter, **options))
    functions, said = BlockFunctions(expert.math), []
    graphs = []
    with torch.inference_mode():
        for frames in (3, 5, 2):
            forward = forward_of(expert, functions, on_stage=said.append)
            for share in forward._crew.shares:
                share.most = 0.5  # even shares, whatever is measured: a range of one token would be another graph
            for seed in (1, 2):
                given = inputs(frames=frames, seed=seed)
                assert relative(forward(**given).sample, theirs(**given).sample) < 1e-5
            graphs.append(counter.frame_count)
    assert functions.compiled and functions.failure is None
    assert said == ["Compiling the blocks"], "once"
    assert graphs == [3, 3, 3], "keys and values, queries, and all that comes after attention"


# ---- a compiler that does not


def test_a_torch_that_cannot_compile_at_all(tiny: Expert, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("not supported on Python 3.99")

    monkeypatch.setattr(functions_module, "can_compile", lambda: True)
    monkeypatch.setattr(torch, "compile", refuse)
    functions = BlockFunctions(tiny.math)
    given = inputs(channels=36)
    with torch.inference_mode():
        got = forward_of(tiny, functions)(**given).sample
        assert relative(got, forward_of(tiny, BlockFunctions(tiny.math), forwards_left=0)(**given).sample) < 1e-5
    assert functions.failure == "RuntimeError: not supported on Python 3.99" and not functions.compiled


def test_what_fails_once_is_not_tried_again(caplog: pytest.LogCaptureFixture, tiny: Expert, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions_module, "can_compile", lambda: True)
    monkeypatch.setattr(torch, "compile", failing_compiler(RuntimeError("no"), after=1))
    functions = BlockFunctions(tiny.math)
    assert functions.may_compile
    functions.compile()
    assert functions.compiled and not functions.may_compile
    given = (
        tiny.block_weights("blocks.0"),
        torch.randn(1, 7, 48),
        torch.randn(1, 6, 48),
        torch.randn(1, 7, 1, 16),
        torch.randn(1, 7, 1, 16),
    )
    expected = tiny.math.project(*given)
    for compiled in (True, False, False):
        assert all(torch.equal(a, b) for a, b in zip(functions.project(*given), expected, strict=True))
        assert functions.compiled == compiled
    assert functions.failure == "RuntimeError: no" and not functions.may_compile, "for good"
    assert caplog.text.count("going on without: RuntimeError: no") == 1


def test_one_gpu_that_cannot_be_compiled_for_does_not_slow_the_others(tiny: Expert, monkeypatch: pytest.MonkeyPatch) -> None:
    """An RTX 30 beside an RTX 50: older Triton knows fp8 only from RTX 40 on."""
    real, other = torch.device("cpu"), torch.device("meta")
    monkeypatch.setattr(functions_module, "can_compile", lambda: True)
    monkeypatch.setattr(torch, "compile", failing_compiler(RuntimeError("type fp8e4nv not supported in this architecture")))
    functions = BlockFunctions(tiny.math)
    functions.devices = {real, other}
    functions.compile()
    given = (tiny.block_weights("blocks.0"), torch.randn(1, 7, 48), torch.randn(1, 6, 48), *(torch.randn(1, 7, 1, 16) for _ in range(2)))
    assert all(torch.equal(a, b) for a, b in zip(functions.project(*given), tiny.math.project(*given), strict=True))
    assert functions.compiled and functions.compiled_on(other) and not functions.compiled_on(real)
    assert functions.failure is not None and "fp8e4nv" in functions.failure
    functions._give_up(RuntimeError("no"), {other})
    assert not functions.compiled


@pytest.mark.parametrize("words", ["C:\\Users\\Jane\\a\\x.py", "/home/jane/venv/lib/x.so", "C:/Users/jane/AppData/Local/tcc.exe"])
def test_a_note_names_nobodys_folders(tiny: Expert, words: str) -> None:
    functions = BlockFunctions(tiny.math)
    functions._give_up(OSError(f"cannot run {words}: exit code 1"), set())
    assert functions.failure is not None and "jane" not in functions.failure.lower()
    assert functions.failure.startswith("OSError: cannot run ...")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable."),
            "RuntimeError: Failed to find C compiler.",
        ),
        (ImportError(""), "ImportError: no reason given"),
        (AssertionError("\n  misaligned  \nmore"), "AssertionError: misaligned"),
    ],
    ids=["lines", "empty", "blank lines"],
)
def test_a_forward_whose_compiler_fails_is_right_all_the_same(monkeypatch, both, error: Exception, reason: str) -> None:
    theirs, expert = both
    monkeypatch.setattr(functions_module, "can_compile", lambda: True)
    monkeypatch.setattr(torch, "compile", failing_compiler(error))
    functions, said = BlockFunctions(expert.math), []
    forward = forward_of(expert, functions, on_stage=said.append)
    with torch.inference_mode():
        for seed in (1, 2):
            assert relative(forward(**inputs(seed=seed)).sample, theirs(**inputs(seed=seed)).sample) < 1e-5
        # Another size, or the other expert, with the same functions.
        again = forward_of(expert, functions, on_stage=said.append)
        assert relative(again(**inputs(frames=5)).sample, theirs(**inputs(frames=5)).sample) < 1e-5
    assert functions.failure is not None and functions.failure.strip() == reason
    assert not functions.compiled and said == ["Compiling the blocks"], "tried once"
    assert sum(timing.tokens for timing in forward.latest_timings().values()) == 105, "and timed without it"


@pytest.mark.parametrize("after", [1, 4])
@pytest.mark.parametrize("count", [1, 2])
def test_a_compiler_that_fails_at_a_later_call(monkeypatch, both, count: int, after: int) -> None:
    """In the middle of a block, keys and values of some tokens written."""
    theirs, expert = both
    monkeypatch.setattr(functions_module, "can_compile", lambda: True)
    monkeypatch.setattr(torch, "compile", failing_compiler(RuntimeError("no"), after=after))
    functions = BlockFunctions(expert.math)
    forward = forward_of(expert, functions, count=count)
    with torch.inference_mode():
        for seed in (1, 2):
            assert relative(forward(**inputs(seed=seed)).sample, theirs(**inputs(seed=seed)).sample) < 1e-5
    assert functions.failure == "RuntimeError: no" and not functions.compiled


def test_running_out_of_memory_is_no_failure_of_the_compiler(monkeypatch, both) -> None:
    """The run makes room and repeats the step; it would be slower for good otherwise."""
    monkeypatch.setattr(functions_module, "can_compile", lambda: True)
    monkeypatch.setattr(torch, "compile", failing_compiler(torch.OutOfMemoryError("full")))
    functions = BlockFunctions(both[1].math)
    with pytest.raises(torch.OutOfMemoryError):
        forward_of(both[1], functions)(**inputs())
    assert functions.compiled and functions.failure is None


def test_plain_functions_are_the_blocks_arithmetic(tiny: Expert) -> None:
    functions, math = BlockFunctions(tiny.math), tiny.math
    weights = tiny.block_weights("blocks.0")
    x, temb = torch.randn(1, 7, 48), torch.randn(1, 6, 48)
    cos, sin = torch.randn(1, 7, 1, 16), torch.randn(1, 7, 1, 16)
    query, key, value = math.project(weights, x, temb, cos, sin)
    rooms = (torch.empty(1, 7, 2, 1, 16), torch.empty(1, 7, 2, 2, 16))
    modulated = functions.keys_into(weights, x, temb, cos, sin, rooms)
    assert torch.equal(functions.query(weights, modulated, cos, sin), query)
    assert all(
        torch.equal(torch.cat(found, dim=2), one)
        for found, one in zip(zip(*(room.unbind(2) for room in rooms), strict=True), (key, value), strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(functions.project(weights, x, temb, cos, sin), (query, key, value), strict=True))
    text = math.text_keys(weights, torch.randn(1, 5, 48))
    assert torch.equal(functions.finish(weights, x, query, temb, text), math.finish(weights, x, query, temb, text))
