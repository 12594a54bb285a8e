"""One forward by several workers gives what diffusers' model gives, however the tokens are shared out.

The workers are all the CPU; what several devices add is in test_fetching.py and, with streams, in tests/gpu.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from crews import CPU, cpu_workers, crew_of, expert_of, inputs, on_cpu, poison, relative, saved_model
from diffusers import WanTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from wan_sharded.engine.parallel import blocks as blocks_module
from wan_sharded.engine.parallel import forward as forward_module
from wan_sharded.engine.parallel.crew import Crew
from wan_sharded.engine.parallel.forward import CALIBRATION_BLOCKS, ParallelForward
from wan_sharded.engine.parallel.functions import BlockFunctions
from wan_sharded.engine.parallel.workers import Worker
from wan_sharded.engine.planning.shares import share_tokens
from wan_sharded.engine.transformer.wan_block import attend
from wan_sharded.engine.weights.expert import Expert

# Speeds of the workers, and how many tokens they work on at a time (0 = all of theirs).
TEAMS = [
    ([1.0], 0),
    ([1.0, 1.0], 9),
    ([3.0, 1.0], 0),
    ([1.0, 2.0, 3.0], 9),
    ([1.0, 1.0, 1.0, 1.0, 1.0], 0),
    ([5.0, 1.0, 1.0, 2.0, 0.2], 9),
]
KINDS = {
    "14b": ({}, {"batch": 2}),
    "ti2v": ({}, {"per_token_timestep": True}),
    "ti2v-batch": ({}, {"per_token_timestep": True, "batch": 2}),
    "wan2.1-i2v": ({"image_dim": 24, "added_kv_proj_dim": 80}, {"image_dim": 24, "text_tokens": 512}),
    "without-cross-attention-norm": ({"cross_attn_norm": False}, {}),
    "one-head": ({"num_attention_heads": 1}, {}),
}
Kind = tuple[WanTransformer3DModel, Expert, dict]


@pytest.fixture(scope="module")
def kind(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kind]:
    """diffusers' model, the same weights as an expert on the CPU, and inputs, by the names of ``KINDS``."""
    made: dict[str, Kind] = {}

    def make(name: str) -> Kind:
        if name not in made:
            changes, given = KINDS[name]
            theirs, files = saved_model(tmp_path_factory.mktemp(name) / "transformer", **changes)
            made[name] = theirs, on_cpu(expert_of(files)), given
        return made[name]

    return make


@pytest.fixture(autouse=True)
def as_comfyui_runs_it() -> Iterator[None]:
    with torch.inference_mode():
        yield


def forward_of(expert: Expert, crew: Crew, **options: object) -> ParallelForward:
    return ParallelForward(expert, crew, BlockFunctions(expert.math), **options)


def tokens_of(forward: ParallelForward) -> dict[int, int]:
    return {index: timing.tokens for index, timing in forward.latest_timings().items()}


# ---- the same numbers


@pytest.mark.parametrize(("speeds", "range_tokens"), TEAMS, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_equals_diffusers(kind: Callable[[str], Kind], name: str, speeds: list[float], range_tokens: int) -> None:
    theirs, expert, given = kind(name)
    crew = crew_of(cpu_workers(len(speeds)), speeds, main=len(speeds) - 1, range_tokens=range_tokens)
    forward = forward_of(expert, crew)
    for seed in (1, 2):
        expected = theirs(**inputs(seed=seed, **given), return_dict=False)[0]
        got = forward(**inputs(seed=seed, **given), return_dict=False)[0]
        assert got.shape == expected.shape and relative(got, expected) < 1e-5
        if seed == 1:
            assert tokens_of(forward) == dict(enumerate(share_tokens(105, speeds)))
        poison(crew)


@pytest.mark.parametrize("packed", [False, True])
def test_a_checkpoints_expert_equals_diffusers(tiny_checkpoint: Path, packed: bool) -> None:
    theirs = WanTransformer3DModel.from_pretrained(tiny_checkpoint / "transformer")
    expert = on_cpu(expert_of(tiny_checkpoint), packed=packed)
    given = inputs(channels=36, frames=2, size=(6, 8))
    got = forward_of(expert, crew_of(cpu_workers(3)))(**given, return_dict=False)[0]
    assert relative(got, theirs(**given, return_dict=False)[0]) < 1e-5


@pytest.mark.parametrize("main", [0, 2, 4])
@pytest.mark.parametrize(("frames", "size"), [(1, (2, 2)), (1, (2, 4)), (2, (2, 4))], ids=str)
def test_fewer_tokens_than_workers(kind: Callable[[str], Kind], frames: int, size: tuple[int, int], main: int) -> None:
    """Some have nothing to do, the one that hands the tokens out among them."""
    theirs, expert, _ = kind("14b")
    forward = forward_of(expert, crew_of(cpu_workers(5), main=main))
    for _ in range(2):
        given = inputs(frames=frames, size=size)
        got = forward(**given, return_dict=False)[0]
        assert relative(got, theirs(**given, return_dict=False)[0]) < 1e-5
    tokens = tokens_of(forward)
    assert sum(tokens.values()) == frames * size[1] // 2 and len(tokens) < 5 and 0 not in tokens.values()


def test_sizes_that_change(kind: Callable[[str], Kind]) -> None:
    theirs, expert, _ = kind("14b")
    crew = crew_of(cpu_workers(2), [2.0, 1.0])
    forward = forward_of(expert, crew)
    for frames, batch in ((3, 1), (5, 1), (5, 2), (1, 1), (3, 1)):
        given = inputs(frames=frames, batch=batch)
        assert relative(forward(**given, return_dict=False)[0], theirs(**given, return_dict=False)[0]) < 1e-5
        assert all(exchange.keys[0].shape[:2] == (batch, frames * 35) for exchange in crew._exchanges.values())
        poison(crew)


def test_the_call_is_diffusers_own(kind: Callable[[str], Kind]) -> None:
    theirs, expert, _ = kind("14b")
    forward, given = forward_of(expert, crew_of(cpu_workers(2))), inputs()
    before = {name: tensor.clone() for name, tensor in given.items()}
    whole = forward(**given, attention_kwargs=None)
    assert isinstance(whole, Transformer2DModelOutput)
    for got in (whole.sample, forward(*given.values(), return_dict=False)[0]):
        assert relative(got, theirs(**given).sample) < 1e-5
    assert all(torch.equal(given[name], tensor) for name, tensor in before.items()), "inputs stay as they are"


@pytest.mark.parametrize(("range_tokens", "ranges"), [(0, 1), (20, 3)])
def test_keys_and_values_may_travel_before_the_last_queries_are_made(kind: Callable[[str], Kind], range_tokens: int, ranges: int) -> None:
    """Not before all of them are made, though."""
    _, expert, _ = kind("14b")
    order: list[str] = []

    class Marking(Worker):
        def mark(self):
            order.append("mark")
            return super().mark()

    class Telling(BlockFunctions):
        def keys_into(self, *arguments):
            order.append("keys")
            return super().keys_into(*arguments)

        def query(self, *arguments):
            order.append("query")
            return super().query(*arguments)

    crew = crew_of([Marking(0, CPU), Worker(1, CPU)], range_tokens=range_tokens)
    functions = Telling(expert.math)
    ParallelForward(expert, crew, functions)(**inputs(), return_dict=False)
    own = ["keys", "query"] * (ranges - 1) + ["keys", "mark", "query"]
    other = ["keys", "query"] * ranges
    first = order.index("keys")
    assert order[first : first + len(own) + len(other)] == own + other


@pytest.mark.parametrize("count", [1, 2])
def test_self_attention_is_what_was_chosen_for_the_device(kind: Callable[[str], Kind], monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Found out before any block is timed, then used for every group of heads."""
    _, expert, given = kind("14b")
    told: list[str] = []

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        told.append(f"{query.shape[2]} heads")
        return attend(query, key, value)

    def chosen(device: torch.device, dtype: torch.dtype, head_width: int) -> object:
        assert (device, dtype, head_width) == (CPU, torch.float32, 16)
        told.append("found out")
        return attention

    for module in (blocks_module, forward_module):
        monkeypatch.setattr(module, "self_attention", chosen)
    crew = crew_of(cpu_workers(count), timed=False)
    forward = forward_of(expert, crew)
    monkeypatch.setattr(forward, "_calibrate", lambda given: told.append("calibrates"))
    expected = forward_of(expert, crew_of(cpu_workers(1)))(**inputs(**given), return_dict=False)[0]
    told.clear()
    assert relative(forward(**inputs(**given), return_dict=False)[0], expected) < 1e-5
    assert told[: count + 1] == ["found out"] * count + ["calibrates"]
    groups = crew._exchange_key[2] if count > 1 else [5]
    attended = [words for words in told if words.endswith("heads")]
    assert attended == [f"{heads} heads" for heads in groups] * (count * len(expert.model.blocks))


# ---- stopping in the middle


class Stopped(BaseException):
    """As ComfyUI's interrupt."""


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5, 6, 8])
def test_a_forward_that_is_cancelled_leaves_nothing_behind(kind: Callable[[str], Kind], stop_at: int) -> None:
    """While the first blocks are timed (1, 2), then all of them (3 to 5), and in the forward itself."""
    theirs, expert, _ = kind("14b")
    asked = 0

    def check_cancelled() -> None:
        nonlocal asked
        asked += 1
        if asked == stop_at:
            raise Stopped

    crew = crew_of(cpu_workers(2), timed=False)
    forward = forward_of(expert, crew, check_cancelled=check_cancelled)
    with pytest.raises(Stopped):
        forward(**inputs(seed=1))
    assert asked == stop_at, "nothing was computed after it"
    in_the_forward = CALIBRATION_BLOCKS + 3  # which have all three blocks timed
    assert all(worker.is_timed == (stop_at > in_the_forward) for worker in crew.workers), "what was half done is begun anew"
    poison(crew)
    for seed in (2, 3):
        assert relative(forward(**inputs(seed=seed)).sample, theirs(**inputs(seed=seed)).sample) < 1e-5


def test_cancelling_is_asked_before_every_block(kind: Callable[[str], Kind]) -> None:
    _, expert, _ = kind("14b")
    asked: list[int] = []
    forward = forward_of(expert, crew_of(cpu_workers(2), timed=False), check_cancelled=lambda: asked.append(1))
    forward(**inputs())
    all_blocks = 3  # which are so short that all of them are timed, too
    assert len(asked) == CALIBRATION_BLOCKS + 2 * all_blocks
    forward(**inputs())
    assert len(asked) == CALIBRATION_BLOCKS + 3 * all_blocks, "speeds are known now"
