"""Parallel execution on real GPUs: streams, copies and buffers under delays, poison and fresh inputs. A race is a moving error.

Where there is one GPU, several workers share it, each with a stream of its own; then everything but the speed is as with several.
"""

import contextlib
import random

import pytest
import torch
from wan_sharded.engine.checkpoints.diffusers_folder import open_diffusers_folder
from wan_sharded.engine.checkpoints.stored import HIGH_NOISE
from wan_sharded.engine.parallel.crew import Crew, Share
from wan_sharded.engine.parallel.forward import ParallelForward
from wan_sharded.engine.parallel.functions import BlockFunctions, can_compile
from wan_sharded.engine.parallel.links import StagedLink
from wan_sharded.engine.parallel.workers import Worker, mark, new_stream, wait
from wan_sharded.engine.weights.expert import Expert
from wan_sharded.engine.weights.precision import Precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16
MILLISECOND_CYCLES = 1_500_000


class DelayedWorker(Worker):
    """Is late at random."""

    @contextlib.contextmanager
    def computing(self):
        with super().computing():
            if random.random() < 0.2:
                torch.cuda._sleep(int(random.random() * MILLISECOND_CYCLES))
            yield


class DelayedCrew(Crew):
    """Whose copies start late at random."""

    def link(self, *args, **kwargs):
        link = super().link(*args, **kwargs)
        for stream in (link._source, link._target):
            if stream is not None and random.random() < 0.1:
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(int(random.random() * MILLISECOND_CYCLES))
        return link


def device_of(number: int) -> torch.device:
    return torch.device("cuda", number % torch.cuda.device_count())


def workers(count: int, kind: type[Worker] = Worker) -> list[Worker]:
    return [kind(i, device_of(i), new_stream(device_of(i))) for i in range(count)]


def expert(folder, dtype: torch.dtype = F32) -> Expert:
    return Expert("high noise expert", open_diffusers_folder(folder).experts[HIGH_NOISE], Precision(dtype, dtype))


def placed(one: Expert, homes: list[torch.device]) -> Expert:
    blocks = [part for part in one.parts if part.startswith("blocks.")]
    for part in one.parts:
        home = homes[blocks.index(part) % len(homes)] if part in blocks else device_of(0)
        one.bring(part, home, device_of(0), packed=True if part in blocks else None)
    return one


def inputs(seed: int, *, batch: int = 1, frames: int = 5, dtype: torch.dtype = F32) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 36, frames, 24, 32, generator=generator).to(device_of(0), dtype),
        "timestep": torch.full((batch,), 900 - seed, device=device_of(0)),
        "encoder_hidden_states": torch.randn(batch, 512, 32, generator=generator).to(device_of(0), dtype),
    }


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def poison(crew: Crew) -> None:
    """Nothing may read what this forward has not written."""
    crew.settle()
    for exchange in crew._exchanges.values():
        for room in (*exchange.keys, *exchange.values):
            room.fill_(float("nan"))
    for slots in crew._slots.values():
        for slot in slots:
            slot.flat.fill_(255)


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_fifty_forwards_with_fresh_inputs_delays_and_poison(make_checkpoint, staged, count, batch):
    random.seed(count)
    one = placed(expert(make_checkpoint(num_blocks=6, num_heads=3)), [device_of(0), CPU, device_of(1)])
    alone = ParallelForward(one, Crew([Share(Worker(0, device_of(0)), 1.0)], Worker(0, device_of(0))), BlockFunctions(one.math))
    alone._crew.main = alone._crew.workers[0]
    team = workers(count, DelayedWorker)
    crew = DelayedCrew([Share(w, 1.0 + i, range_tokens=100) for i, w in enumerate(team)], team[0], staged=staged)
    together = ParallelForward(one, crew, BlockFunctions(one.math))
    with torch.inference_mode():
        for seed in range(50):
            given = inputs(seed, batch=batch)
            expected = alone(**given, return_dict=False)[0]
            torch.cuda.synchronize()
            got = together(**given, return_dict=False)[0]
            error = relative(got, expected)
            assert error < 1e-5, (seed, error)
            poison(crew)


@pytest.mark.parametrize("staged", [False, True])
def test_half_precision_with_fresh_inputs_delays_and_poison(make_checkpoint, staged):
    """Attention by what runs use, FlashAttention 3 where it is installed; each input's bits the same at its second turn."""
    random.seed(7)
    one = placed(expert(make_checkpoint(num_blocks=4, num_heads=4, head_dim=128), BF16), [device_of(0), CPU, device_of(1)])
    alone = ParallelForward(one, Crew([Share(Worker(0, device_of(0)), 1.0)], Worker(0, device_of(0))), BlockFunctions(one.math))
    alone._crew.main = alone._crew.workers[0]
    team = workers(2, DelayedWorker)
    for worker in team:
        worker.is_timed = True
    crew = DelayedCrew([Share(w, 1.0 + i, range_tokens=100) for i, w in enumerate(team)], team[0], staged=staged)
    together = ParallelForward(one, crew, BlockFunctions(one.math))
    together._learn = lambda states: None  # shares as planned
    before: dict[int, torch.Tensor] = {}
    with torch.inference_mode():
        for seed in [*range(15), *range(15)]:
            given = inputs(seed, frames=9, dtype=BF16)
            expected = alone(**given, return_dict=False)[0]
            torch.cuda.synchronize()
            got = together(**given, return_dict=False)[0]
            assert relative(got, expected) < 2e-2, seed
            assert torch.equal(got, before.setdefault(seed, got)), seed
            poison(crew)


@pytest.mark.parametrize("target", [0, 1])
def test_a_staged_link_with_copies_of_any_size_at_once(target):
    """Chunks through the ring, which a larger copy makes anew, nothing waited for in between."""
    link = StagedLink(device_of(0), device_of(target))
    for seed in range(5):
        generator = torch.Generator(device_of(0)).manual_seed(seed)
        sizes = [2**20, 300 * 2**20 + 7, 2**20 + 1, 40 * 2**20, 700 * 2**20]
        sources = [torch.randint(0, 256, (size,), dtype=torch.uint8, device=device_of(0), generator=generator) for size in sizes]
        targets = [torch.zeros(size, dtype=torch.uint8, device=device_of(target)) for size in sizes]
        ready = [mark(torch.cuda.current_stream(device)) for device in (device_of(0), device_of(target))]
        arrived = [link.copy(into, out_of, ready) for into, out_of in zip(targets, sources, strict=True)]
        wait(torch.cuda.current_stream(device_of(target)), arrived)
        for source, got in zip(sources, targets, strict=True):
            assert torch.equal(got, source.to(device_of(target)))


def test_the_same_plan_gives_the_same_bits(make_checkpoint):
    one = placed(expert(make_checkpoint(num_blocks=6, num_heads=3)), [device_of(0), CPU])
    team = workers(2)
    for worker in team:
        worker.is_timed = True
    crew = Crew([Share(w, 1.0 + i) for i, w in enumerate(team)], team[0])
    forward = ParallelForward(one, crew, BlockFunctions(one.math))
    forward._learn = lambda states: None  # shares as planned
    with torch.inference_mode():
        first, *others = [forward(**inputs(3), return_dict=False)[0] for _ in range(10)]
    assert all(torch.equal(first, other) for other in others)


def test_sizes_change_and_memory_does_not_grow(make_checkpoint):
    one = placed(expert(make_checkpoint(num_blocks=4, num_heads=3)), [device_of(0), CPU])
    team = workers(2)
    crew = Crew([Share(w, 1.0) for w in team], team[0])
    forward = ParallelForward(one, crew, BlockFunctions(one.math))
    held = []
    with torch.inference_mode():
        for number in range(30):
            forward(**inputs(number, frames=(3, 9, 5)[number % 3]), return_dict=False)
            if number % 3 == 2:
                crew.settle()
                held.append(sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count())))
    assert len(set(held[1:])) == 1, held


def test_an_error_in_the_middle_leaves_nothing_under_way(make_checkpoint):
    one = placed(expert(make_checkpoint(num_blocks=6, num_heads=3)), [device_of(0), CPU])
    team = workers(2)
    crew = Crew([Share(w, 1.0) for w in team], team[0])
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt

    forward = ParallelForward(one, crew, BlockFunctions(one.math), check_cancelled=stop)
    with torch.inference_mode():
        with pytest.raises(KeyboardInterrupt):
            forward(**inputs(1), return_dict=False)
        got = forward(**inputs(1), return_dict=False)[0]
        again = forward(**inputs(1), return_dict=False)[0]
    assert relative(got, again) < 1e-5


@pytest.mark.parametrize("count", [1, 2])
def test_compiled_is_as_near_to_float32_as_plain(make_checkpoint, count):
    if not can_compile():
        pytest.skip("needs Triton")
    folder = make_checkpoint(num_blocks=4, num_heads=4)
    exact_expert = placed(expert(folder), [device_of(0)])
    main = Worker(0, device_of(0))
    exact = ParallelForward(exact_expert, Crew([Share(main, 1.0)], main), BlockFunctions(exact_expert.math))
    one = placed(expert(folder, BF16), [device_of(0), CPU])
    errors = {}
    for compiled in (False, True):
        team = workers(count)
        crew = Crew([Share(w, 1.0) for w in team], team[0])
        functions = BlockFunctions(one.math)
        forward = ParallelForward(one, crew, functions, forwards_left=lambda: 10**9 if compiled else 0)  # noqa: B023
        with torch.inference_mode():
            errors[compiled] = [
                relative(
                    forward(**inputs(seed, frames=frames, dtype=BF16), return_dict=False)[0],
                    exact(**inputs(seed, frames=frames), return_dict=False)[0],
                )
                for seed, frames in ((1, 5), (2, 9), (3, 3))
            ]
        assert functions.compiled == compiled, functions.failure
    assert max(errors[True]) <= 1.1 * max(errors[False]), errors
