"""Blocks that live on another device than the worker: fetched through two buffers each, on imagined GPUs that count every byte."""

import gc
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from crews import CPU, F32, crew_of, expert_of, inputs, on_cpu, poison, relative
from imagined_gpus import ImaginedGpus
from wan_sharded.engine.checkpoints.stored import HIGH_NOISE, LOW_NOISE
from wan_sharded.engine.parallel.crew import Crew
from wan_sharded.engine.parallel.forward import ParallelForward
from wan_sharded.engine.parallel.functions import BlockFunctions
from wan_sharded.engine.parallel.links import Link
from wan_sharded.engine.parallel.workers import Mark, Worker
from wan_sharded.engine.weights.expert import Expert
from wan_sharded.engine.weights.precision import Precision

LAZY = [torch.device("lazy:0"), torch.device("lazy:1")]
INT8 = Precision(torch.float32, torch.int8)
PACKED, MAPPED = "packed on the host", "mapped from its file"
Home = torch.device | str
MIB = 1024**2


@pytest.fixture
def gpus() -> Iterator[ImaginedGpus]:
    with torch.inference_mode(), ImaginedGpus() as gpus:
        yield gpus
        gc.collect()


@pytest.fixture
def small(make_checkpoint: Callable[..., Path]) -> Path:
    """As few blocks as use a buffer twice on either of two workers."""
    return make_checkpoint(num_blocks=4, num_heads=3)


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """8 blocks of 3 MiB in float32: large beside what a few tokens take."""
    return make_checkpoint(num_blocks=8, num_heads=16)


def place(expert: Expert, homes: list[Home], main: torch.device) -> Expert:
    """Blocks to their homes in turn, all else to the main worker."""
    blocks = [part for part in expert.parts if part.startswith("blocks.")]
    for part in expert.parts:
        home = homes[blocks.index(part) % len(homes)] if part in blocks else main
        device = home if isinstance(home, torch.device) else CPU
        expert.bring(part, device, main, packed=True if home == PACKED else None)
    return expert


def forward_of(expert: Expert, devices: list[torch.device], *, main: int = 0, **options: object) -> ParallelForward:
    crew = crew_of([Worker(index, device) for index, device in enumerate(devices)], main=main)
    return ParallelForward(expert, crew, BlockFunctions(expert.math), **options)


def given(seed: int = 4) -> dict:
    """63 tokens and a short text, on the host."""
    return inputs(seed=seed, channels=36, frames=3, size=(6, 14))


@lru_cache
def expected_of(checkpoint: Path, precision: Precision = F32, seed: int = 4, part: str = HIGH_NOISE) -> torch.Tensor:
    """By diffusers' own forward on the host (see tests/engine/weights/test_precision.py)."""
    expert = on_cpu(expert_of(checkpoint, precision, part=part))
    return expert.model(**given(seed), return_dict=False)[0]


# ---- the same numbers, wherever blocks live


@pytest.mark.parametrize("main", [0, 1])
def test_blocks_come_from_wherever_they_live(gpus: ImaginedGpus, small: Path, main: int) -> None:
    expert = place(expert_of(small), [LAZY[1], PACKED, LAZY[0], MAPPED], LAZY[main])
    forward = forward_of(expert, LAZY, main=main)
    forward._crew.shares[1].range_tokens = 20
    for seed in (1, 2):
        got = forward(**given(seed=seed), return_dict=False)[0]
        assert got.device == CPU, "where it was asked from"
        assert relative(got, expected_of(small, seed=seed)) < 1e-5
        poison(forward._crew)


def test_quantized_blocks_are_fetched_too(gpus: ImaginedGpus, small: Path) -> None:
    expert = place(expert_of(small, INT8), [LAZY[1], PACKED, LAZY[0], MAPPED], LAZY[0])
    got = forward_of(expert, LAZY)(**given(), return_dict=False)[0]
    assert relative(got, expected_of(small, INT8)) < 1e-5


def test_one_gpu_fetches_what_the_host_holds(gpus: ImaginedGpus, small: Path) -> None:
    expert = place(expert_of(small), [PACKED], LAZY[0])
    got = forward_of(expert, LAZY[:1])(**given(), return_dict=False)[0]
    assert relative(got, expected_of(small)) < 1e-5


# ---- two buffers, and no more


@pytest.mark.parametrize("homes", [[MAPPED], [LAZY[0], LAZY[1], PACKED]], ids=["mapped", "all"])
def test_no_more_than_two_blocks_are_being_fetched(gpus: ImaginedGpus, checkpoint: Path, homes: list[Home]) -> None:
    expert = place(expert_of(checkpoint), homes, LAZY[0])
    block = expert.layout("blocks.0").total_bytes
    weights = [gpus.live_bytes(index) for index in (0, 1)]
    assert block > 3 * MIB
    forward = forward_of(expert, LAZY)
    buffers = 2 * block
    assert [gpus.live_bytes(index) - weights[index] for index in (0, 1)] == [buffers, buffers]
    gpus.reset_peaks()
    forward(**given(), return_dict=False)
    for index in (0, 1):
        assert gpus.peak[index] - weights[index] < buffers + 0.5 * block, "activations are a tenth of a block here"
    forward._crew.give_back_buffers()
    del forward
    gc.collect()
    assert [gpus.live_bytes(index) for index in (0, 1)] == weights


def test_a_worker_that_holds_all_blocks_has_no_buffers(gpus: ImaginedGpus, checkpoint: Path) -> None:
    expert = place(expert_of(checkpoint), [LAZY[0]], LAZY[0])
    before = gpus.live_bytes(0)
    forward = forward_of(expert, LAZY)
    assert gpus.live_bytes(0) == before
    assert gpus.live_bytes(1) == 2 * expert.layout("blocks.0").total_bytes
    assert forward._crew.slots(forward._crew.workers[1], 1) == forward._crew._slots[1]


def test_both_experts_share_the_buffers(gpus: ImaginedGpus, small: Path) -> None:
    high, low = expert_of(small), expert_of(small, part=LOW_NOISE)
    for expert in (high, low):
        place(expert, [PACKED, LAZY[0]], LAZY[0])
    first = forward_of(high, LAZY)
    before = [gpus.live_bytes(index) for index in (0, 1)]
    second = ParallelForward(low, first._crew, BlockFunctions(low.math))
    assert [gpus.live_bytes(index) for index in (0, 1)] == before
    expected = [expected_of(small, part=part) for part in (HIGH_NOISE, LOW_NOISE)]
    assert relative(*expected) > 0.1, "the experts differ"
    for forward, wanted in ((first, expected[0]), (second, expected[1]), (first, expected[0])):  # taking turns
        assert relative(forward(**given(), return_dict=False)[0], wanted) < 1e-5


# ---- keys and values go first


def test_most_of_a_block_sets_out_behind_the_keys_and_values(gpus: ImaginedGpus, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []
    link_of = Crew.link

    class Told:
        def __init__(self, purpose: str, reader: Worker, link: Link):
            self.purpose, self.reader, self.link = purpose, reader, link

        def copy(self, target: torch.Tensor, source: torch.Tensor, after: Iterable[Mark]) -> Mark:
            after = tuple(after)
            asked.append((f"{self.purpose} of {self.reader.index}", target.nbytes, len(after)))
            return self.link.copy(target, source, after)

    def told(crew: Crew, purpose: str, source: torch.device, reader: Worker, writer: Worker | None = None) -> Told:
        return Told(purpose, reader, link_of(crew, purpose, source, reader, writer))

    monkeypatch.setattr(Crew, "link", told)
    expert = place(expert_of(checkpoint), [LAZY[0], PACKED], LAZY[0])
    forward = forward_of(expert, LAZY)
    forward(**given(), return_dict=False)
    for worker, blocks in ((0, 4), (1, 8)):  # one GPU fetches what is on the host, the other all
        weights = [(number, size, after) for number, (what, size, after) in enumerate(asked) if what == f"weights of {worker}"]
        firsts, rests = weights[::2], weights[1::2]
        assert len(firsts) == len(rests) == blocks
        assert {3 * size for _, size, _ in firsts} == {size for _, size, _ in rests}
        # The first block of all is waited for by everybody; of the others the rest waits for what both pulled.
        assert rests[0][0] == firsts[0][0] + 1
        for (first, _, _), (rest, _, after) in zip(firsts[1:], rests[1:], strict=True):
            between = {what for what, _, _ in asked[first:rest]}
            assert {"keys of 0", "keys of 1"} <= between and after == 2


# ---- what goes wrong in the middle


class Stopped(BaseException):
    """As ComfyUI's interrupt."""


def test_cancelling_with_blocks_under_way(gpus: ImaginedGpus, small: Path) -> None:
    asked = 0

    def check_cancelled() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise Stopped

    expert = place(expert_of(small), [LAZY[1], PACKED, LAZY[0]], LAZY[0])
    forward = forward_of(expert, LAZY, check_cancelled=check_cancelled)
    with pytest.raises(Stopped):
        forward(**given(seed=1))
    poison(forward._crew)
    assert relative(forward(**given(seed=2), return_dict=False)[0], expected_of(small, seed=2)) < 1e-5


def test_running_out_of_memory_leaves_a_forward_that_works(gpus: ImaginedGpus, small: Path) -> None:
    index = 1
    expert = place(expert_of(small), [LAZY[1], PACKED, LAZY[0]], LAZY[0])
    forward = forward_of(expert, LAZY)
    before = gpus.live_bytes(index)
    gpus.capacity[index] = before + 24 * 1024
    with pytest.raises(torch.OutOfMemoryError, match=f"imagined GPU {index}"):
        forward(**given())
    gc.collect()
    gpus.capacity.clear()
    forward._crew._exchanges.clear()  # what it had of them by then
    forward._crew._exchange_key = ()
    gc.collect()
    assert gpus.live_bytes(index) == before, "nothing of the failed forward stays"
    assert relative(forward(**given(), return_dict=False)[0], expected_of(small)) < 1e-5
