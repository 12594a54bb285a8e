"""Which workers multiply weights of few bits as they are: decided by measuring, for each of them, on the first blocks of a run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from crews import cpu_workers, crew_of, expert_of, inputs, on_cpu, relative
from wan_sharded.engine.parallel import forward as forward_module
from wan_sharded.engine.parallel.forward import ParallelForward
from wan_sharded.engine.parallel.functions import BlockFunctions
from wan_sharded.engine.weights.expert import Expert
from wan_sharded.engine.weights.precision import Precision

INT8 = Precision(torch.bfloat16, torch.int8)
BF16 = Precision(torch.bfloat16, torch.bfloat16)


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Workers that are said to have products of few bits; all of them on the CPU, which really multiplies int8."""
    indices = {0, 1}
    monkeypatch.setattr(forward_module.probe, "multiplies_few_bits", lambda device, dtype: dtype == torch.int8)
    real = ParallelForward._may_multiply_few_bits
    monkeypatch.setattr(ParallelForward, "_may_multiply_few_bits", lambda self, share: share.worker.index in indices and real(self, share))
    return indices


class Told(list):
    """A time that was told, not measured."""


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Worker index -> what products of few bits take of the time that widening does, whatever the clock says."""
    shares = {0: 0.8, 1: 0.8}
    first_blocks, seconds = ParallelForward._first_blocks, forward_module.busy_seconds

    def told(self: ParallelForward, given: list) -> tuple:
        states, added = first_blocks(self, given)
        for state in states:
            state.timed = Told([shares[state.worker.index] if state.share.multiplies_few_bits(self._expert.name) else 1.0])
        return states, added

    monkeypatch.setattr(ParallelForward, "_first_blocks", told)
    monkeypatch.setattr(forward_module, "busy_seconds", lambda blocks: blocks[0] if isinstance(blocks, Told) else seconds(blocks))
    return shares


@pytest.fixture
def expert(make_checkpoint: Callable[..., Path]) -> Callable[[Precision], Expert]:
    checkpoint = make_checkpoint(num_heads=8, num_blocks=4, dtype=torch.bfloat16)
    return lambda precision: on_cpu(expert_of(checkpoint, precision), packed=True)


def given() -> dict:
    """105 tokens and a short text, in bf16."""
    made = inputs(channels=36, frames=3, size=(10, 14))
    return {name: tensor.bfloat16() if name != "timestep" else tensor for name, tensor in made.items()}


def run(expert: Expert, *, compiled: bool = True, fixed: bool | None = None) -> tuple[list[bool | None], torch.Tensor, ParallelForward]:
    """A first forward of two workers: what each does with few bits, and the output."""
    functions = BlockFunctions(expert.math)
    if compiled:  # what a compiler would make computes the same
        functions.compiled = True
        functions._compiled = {name: getattr(expert.math, name) for name in ("project", "keys_into", "query", "finish")}
    crew = crew_of(cpu_workers(2), timed=False)
    for share in crew.shares:
        share.multiply_few_bits = fixed
    forward = ParallelForward(expert, crew, functions, forwards_left=lambda: 10**9)
    with torch.inference_mode():
        output = forward(**given(), return_dict=False)[0]
    return decided(forward), output, forward


def decided(forward: ParallelForward) -> list[bool | None]:
    """What was measured for each worker with this forward's expert."""
    return [share.measured_few_bits.get(forward._expert.name) for share in forward._crew.shares]


def test_faster_and_near_enough(able: set[int], saved: dict[int, float], expert: Callable[[Precision], Expert]) -> None:
    chosen, output, forward = run(expert(INT8))
    assert chosen == [True, True]
    _, widened, _ = run(expert(INT8), fixed=False)
    assert 1e-3 < relative(output, widened) < 0.1, "other products, nearly the same output"
    with torch.inference_mode():
        again = forward(**given(), return_dict=False)[0]
    assert relative(again, output) < 0.02, "and so it stays"


def test_each_by_its_own_ability(able: set[int], saved: dict[int, float], expert: Callable[[Precision], Expert]) -> None:
    able.remove(1)
    chosen, output, _ = run(expert(INT8))
    assert chosen == [True, None]
    saved.update({0: 1.1, 1: 0.5})
    able.add(1)
    assert run(expert(INT8))[0] == [False, True]
    assert bool(torch.isfinite(output).all())


def test_what_is_not_faster_is_widened(able: set[int], saved: dict[int, float], expert: Callable[[Precision], Expert]) -> None:
    saved.update({0: 0.99, 1: 1.5})
    chosen, output, _ = run(expert(INT8))
    assert chosen == [False, False]
    assert torch.equal(output, run(expert(INT8), fixed=False)[1])


def test_what_is_too_far_off_is_widened(
    able: set[int], saved: dict[int, float], expert: Callable[[Precision], Expert], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a model whose activations have a few values far larger than all others."""
    monkeypatch.setitem(forward_module.FEW_BITS_ERROR, torch.int8, 1e-4)
    chosen, output, _ = run(expert(INT8))
    assert chosen == [False, False]
    assert torch.equal(output, run(expert(INT8), fixed=False)[1])


def test_each_expert_by_its_own_weights(able: set[int], saved: dict[int, float], expert: Callable[[Precision], Expert]) -> None:
    """Files of the two experts may hold different types; what the first one has says nothing of the second."""
    plain, few_bits = expert(BF16), expert(INT8)
    few_bits.name = "low noise expert"
    _, _, first = run(plain)
    second = ParallelForward(few_bits, first._crew, first._functions, forwards_left=lambda: 10**9)
    with torch.inference_mode():
        widened = second(**given(), return_dict=False)[0]
        assert decided(second) == [None, None], "not before it has been timed"
        multiplied = second(**given(), return_dict=False)[0]
    assert (decided(first), decided(second)) == ([None, None], [True, True])
    assert 1e-3 < relative(multiplied, widened) < 0.1
    saved.update({0: 2.0, 1: 2.0})
    later = ParallelForward(few_bits, first._crew, first._functions, forwards_left=lambda: 10**9)
    with torch.inference_mode():
        assert relative(later(**given(), return_dict=False)[0], multiplied) < 0.02
        later(**given(), return_dict=False)
    assert decided(later) == [True, True], "and so it stays when it comes back"


def test_the_second_expert_is_measured_in_a_short_run_too(
    able: set[int], saved: dict[int, float], expert: Callable[[Precision], Expert]
) -> None:
    """What is compiled for the first one is there."""
    one, other = expert(INT8), expert(INT8)
    other.name = "low noise expert"
    _, _, first = run(one)
    second = ParallelForward(other, first._crew, first._functions, forwards_left=lambda: 1)
    with torch.inference_mode():
        for _ in range(2):
            second(**given(), return_dict=False)
    assert decided(second) == [True, True]


class Stopped(BaseException):
    """As ComfyUI's interrupt."""


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_stopped_while_measuring_nothing_is_decided(
    able: set[int], saved: dict[int, float], expert: Callable[[Precision], Expert], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward_module, "better_speeds", lambda *args: None)  # other shares round otherwise
    _, _, first = run(expert(BF16))
    one = expert(INT8)
    one.name = "low noise expert"
    forward = ParallelForward(one, first._crew, first._functions, forwards_left=lambda: 10**9)
    with torch.inference_mode():
        widened = forward(**given(), return_dict=False)[0]
        blocks, asked = ParallelForward._first_blocks, 0

        def stop(self: ParallelForward, arguments: list) -> tuple:
            nonlocal asked
            asked += 1
            if asked == at:
                raise Stopped
            return blocks(self, arguments)

        with monkeypatch.context() as patch:
            patch.setattr(ParallelForward, "_first_blocks", stop)
            with pytest.raises(Stopped):
                forward(**given(), return_dict=False)
        assert decided(forward) == [None, None]
        again = ParallelForward(one, first._crew, BlockFunctions(one.math), forwards_left=lambda: 0)  # plainly, nothing is measured
        assert torch.equal(again(**given(), return_dict=False)[0], widened)
        forward(**given(), return_dict=False)
    assert decided(forward) == [True, True], "measured the next time"


@pytest.mark.parametrize(
    ("precision", "compiled"),
    [(BF16, True), (INT8, False), (Precision(torch.float32, torch.int8), True)],
    ids=["plain weights", "not compiled", "float32"],
)
def test_where_it_is_not_considered(
    able: set[int], saved: dict[int, float], expert: Callable[[Precision], Expert], precision: Precision, compiled: bool
) -> None:
    if precision.dtype == torch.float32:
        one = expert(precision)
        functions = BlockFunctions(one.math)
        functions.compiled = True
        forward = ParallelForward(one, crew_of(cpu_workers(2), timed=False), functions, forwards_left=lambda: 10**9)
        assert not any(forward._may_multiply_few_bits(share) for share in forward._crew.shares)
    else:
        assert run(expert(precision), compiled=compiled)[0] == [None, None]


def test_what_was_decided_is_said(make_checkpoint: Callable[..., Path], make_request: Callable) -> None:
    from diffusers_reference import HostVae
    from imagined_machine import imagined_machine
    from wan_sharded.engine import open_model
    from wan_sharded.engine.owner import ModelOwner
    from wan_sharded.engine.pipeline.image_to_video import ImageToVideo

    checkpoint = make_checkpoint(num_blocks=2)
    owner = ModelOwner()
    engine = ImageToVideo(owner, lambda: imagined_machine(2, all_cpu=True))
    request = make_request(prompt_embeds=torch.ones(1, 3, 32), guidance_scale=1.0, num_inference_steps=2, switch_step=1)
    handle = open_model(checkpoint, weight_dtype="fp32", execution="parallel")
    assert not any("few bits" in note for note in engine(handle, request, vae=HostVae(checkpoint)).notes)
    assert owner.loaded is not None and owner.loaded.computing.crew is not None
    owner.loaded.computing.crew.shares[1].measured_few_bits["low noise expert"] = True
    notes = [note for note in engine(handle, request, vae=HostVae(checkpoint)).notes if "few bits" in note]
    assert len(notes) == 1 and notes[0].startswith("GPU 1 · Imagined") and "GPU 0" not in notes[0]
    alone = open_model(checkpoint, weight_dtype="fp32", execution="sequential", max_memory_gib={1: -1})
    assert not any("few bits" in note for note in engine(alone, request, vae=HostVae(checkpoint)).notes)
    owner.release()
