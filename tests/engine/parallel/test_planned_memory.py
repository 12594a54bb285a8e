"""What a worker holds during a forward is what the plan keeps for it: counted at the real size, on the meta device."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from crews import expert_of
from diffusers import WanTransformer3DModel
from stored_like import described
from torch.utils._python_dispatch import TorchDispatchMode
from wan_sharded.engine.parallel.crew import Crew, Share
from wan_sharded.engine.parallel.forward import ParallelForward
from wan_sharded.engine.parallel.functions import BlockFunctions
from wan_sharded.engine.parallel.workers import Worker
from wan_sharded.engine.planning.footprint import RUN_OVERHEAD_BYTES, VideoShape, worker_activation_bytes
from wan_sharded.engine.weights.expert import NOWHERE, Expert
from wan_sharded.engine.weights.precision import Precision

P480 = VideoShape(832, 480, 81)
P720 = VideoShape(1280, 720, 81)
WIDTH = 5120
BF16 = Precision(torch.bfloat16, torch.bfloat16)


class WorkersMemory(TorchDispatchMode):
    """Counts the bytes of all storages alive that were made under it, by the worker whose turn it was to compute."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.now, self.peak = Counter(), Counter()
        self.computing: int | None = None
        self._known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device == NOWHERE:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size, whose = storage._cdata, storage.nbytes(), self.computing
        if key in self._known:
            return
        self._known.add(key)
        self.now[whose] += size
        self.peak[whose] = max(self.peak[whose], self.now[whose])

        def gone() -> None:
            self._known.discard(key)
            self.now[whose] -= size

        weakref.finalize(storage, gone)


class CountedWorker(Worker):
    """Whose memory is what is made while it computes, as on a GPU it is what its stream allocates."""

    memory: WorkersMemory

    @contextmanager
    def computing(self) -> Iterator[None]:
        before, self.memory.computing = self.memory.computing, self.index
        with super().computing():
            yield
        self.memory.computing = before


@pytest.fixture(scope="module")
def expert() -> Expert:
    """A block of the real size, without weights. Nowhere is where the workers are too, so they find the weights there."""
    with torch.device("meta"):
        model = WanTransformer3DModel(in_channels=36, out_channels=16, num_layers=1)
    expert = expert_of(described(model), BF16)
    for part in expert.parts:
        expert._hold(
            part, {name: torch.empty(spec.shape, dtype=spec.dtype, device=NOWHERE) for name, spec in expert.layout(part).specs.items()}
        )
    expert.model.rope.to(NOWHERE)
    return expert


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused attention keeps nothing but its result, and these are one kernel each; the meta device takes them apart into steps."""
    for name in ("scaled_dot_product_attention", "gelu", "layer_norm", "rms_norm"):
        monkeypatch.setattr(torch.nn.functional, name, lambda x, *_, **__: torch.empty_like(x))


def peaks(monkeypatch: pytest.MonkeyPatch, expert: Expert, shape: VideoShape, shares: list[float], main: int) -> Counter[Any]:
    """The most that each worker held in the second of two forwards, when everything that is kept is there."""
    memory = WorkersMemory(expert.model)
    monkeypatch.setattr(CountedWorker, "memory", memory, raising=False)
    team = [CountedWorker(index, NOWHERE) for index in range(len(shares))]
    for worker in team:
        worker.is_timed = True
    forward = ParallelForward(
        expert, Crew([Share(*pair) for pair in zip(team, shares, strict=True)], team[main]), BlockFunctions(expert.math)
    )
    forward._learn = lambda states: None  # shares as planned
    batch, (height, width) = shape.batch_size, (shape.height // 8, shape.width // 8)
    with torch.no_grad(), memory, NOWHERE:
        latents = torch.empty(batch, 36, shape.latent_frames, height, width, dtype=torch.bfloat16)
        given = (latents, torch.empty(batch), torch.empty(batch, 512, 4096, dtype=torch.bfloat16))
        for _ in range(2):
            memory.peak.clear()
            forward(*given, return_dict=False)
    return memory.peak


@pytest.mark.parametrize(
    ("shape", "shares", "main"),
    [
        (P480, [0.5, 0.5], 0),
        (P480, [0.1, 0.9], 1),
        (P720, [0.7, 0.2, 0.1], 0),
        # The main one holds all tokens before the blocks, however few it computes.
        (P720, [0.25] * 4, 0),
        (P480, [0.02, 0.98], 0),
        (VideoShape(832, 480, 81, 2), [0.5, 0.5], 0),
    ],
    ids=str,
)
def test_the_plan_counts_what_a_worker_takes(monkeypatch, expert: Expert, shape: VideoShape, shares: list[float], main: int) -> None:
    counted = peaks(monkeypatch, expert, shape, shares, main)
    for index, share in enumerate(shares):
        planned = worker_activation_bytes(shape, WIDTH, 2, share=share, main=index == main, fragmentation=1.0)
        assert counted[index] <= planned, (index, counted[index] / planned)
        assert planned - RUN_OVERHEAD_BYTES < 1.25 * counted[index], (index, counted[index] / planned)


def test_everything_large_is_made_by_the_worker_that_needs_it(monkeypatch, expert: Expert) -> None:
    """What is made outside of ``computing`` would be on another stream than what uses it. The latents are the caller's."""
    counted = peaks(monkeypatch, expert, P480, [0.5, 0.5], 0)
    assert counted[None] < 0.02 * counted[0]
