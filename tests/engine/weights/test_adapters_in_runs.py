"""LoRAs in whole forwards and runs on imagined GPUs: fetched, parked and placed with the blocks they belong to, and counted by plans."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from crews import crew_of, expert_of, inputs, poison, relative
from diffusers_reference import HostVae
from expert_reference import TinyLora, diffusers_model, merged, output, tiny_lora, values_in, watch_reads
from imagined_gpus import ImaginedGpus
from imagined_machine import TinyExpert, gpu
from tiny_single_files import file_names
from wan_sharded.engine import Callbacks, ModelHandle, VideoResult, open_model
from wan_sharded.engine.checkpoints.lora import LoraChoice
from wan_sharded.engine.checkpoints.single_file import open_expert_file
from wan_sharded.engine.checkpoints.stored import HIGH_NOISE, LOW_NOISE
from wan_sharded.engine.errors import CheckpointError
from wan_sharded.engine.owner import ModelOwner
from wan_sharded.engine.parallel.forward import ParallelForward
from wan_sharded.engine.parallel.functions import BlockFunctions
from wan_sharded.engine.parallel.workers import Worker
from wan_sharded.engine.pipeline.image_to_video import ImageToVideo
from wan_sharded.engine.planning.devices import GIB, Machine
from wan_sharded.engine.planning.placement import HOST, Placement
from wan_sharded.engine.weights.expert import CPU, Expert
from wan_sharded.engine.weights.precision import Precision, block_matrices

F32 = torch.float32
LAZY = [torch.device("lazy:0"), torch.device("lazy:1")]
MIB = 1024**2
# Activations, embeddings and the VAE of 64x48x5, generously (as in tests/engine/test_owner.py).
SMALL_CHANGE = int(3.5 * MIB)
GIVEN = inputs(channels=36, frames=3, size=(6, 14), batch=2)
ROUNDING = 3e-6


@pytest.fixture
def gpus() -> Iterator[ImaginedGpus]:
    with torch.inference_mode(), ImaginedGpus() as gpus:
        yield gpus
        gc.collect()


# ---- one forward


@pytest.fixture(scope="module")
def uneven(tiny_single_files: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[TinyLora, float]]:
    """Two LoRAs that make a large block of one, a small one of another, and leave the third alone."""
    shapes = {n: s.shape for n, s in open_expert_file(tiny_single_files / file_names("fp8")[HIGH_NOISE]).tensors.items()}
    folder, first = tmp_path_factory.mktemp("loras"), {name: s for name, s in shapes.items() if name.startswith("blocks.0")}
    last = {name: shape for name, shape in shapes.items() if name.startswith("blocks.2")}
    return [(tiny_lora(folder / "a.safetensors", first, rank=48), 0.8), (tiny_lora(folder / "b.safetensors", last, rank=8), -0.6)]


def with_blocks_at(path: Path, loras: list[tuple[TinyLora, float]], homes: list[torch.device | bool]) -> Expert:
    """Blocks on GPUs, packed on the host (True), or there as their files have them (False); all else on the first GPU."""
    files = open_expert_file(path)
    expert = expert_of(files, Precision(F32, F32, files.stored_dtype))
    expert.use_loras([lora.choice(strength) for lora, strength in loras])
    turns = iter(homes)
    for part in expert.parts:
        home = next(turns) if part.startswith("blocks.") else LAZY[0]
        expert.bring(part, home if isinstance(home, torch.device) else CPU, LAZY[0], packed=home is not False)
    return expert


def merged_output(path: Path, loras: list[tuple[TinyLora, float]]) -> torch.Tensor:
    config = open_expert_file(path).config
    return output(diffusers_model(config, merged(values_in(path, config), loras)), GIVEN)


@pytest.mark.parametrize("form", ["fp8_scaled_old", "gguf_q4_k"])
@pytest.mark.parametrize("homes", [[True, True, True], [False, True, LAZY[1]], [LAZY[1], False, True]], ids=str)
def test_blocks_bring_their_loras(tiny_single_files: Path, uneven, homes: list, form: str, gpus: ImaginedGpus) -> None:
    """Three sizes of blocks come through the same buffers, and nothing of one block's LoRA stays for the next."""
    path = tiny_single_files / file_names(form)[HIGH_NOISE]
    expert, wanted = with_blocks_at(path, uneven, homes), merged_output(path, uneven)
    assert len({expert.part_bytes(f"blocks.{i}") for i in range(3)}) == 3
    crew = crew_of([Worker(i, device) for i, device in enumerate(LAZY)])
    forward = ParallelForward(expert, crew, BlockFunctions(expert.math))
    for _ in range(2):
        assert relative(output(forward, GIVEN), wanted) < ROUNDING
        poison(crew)


def test_one_device_after_the_other(tiny_single_files: Path, uneven, gpus: ImaginedGpus) -> None:
    """Within the room that is planned for what is fetched: the largest block's."""
    path = tiny_single_files / file_names("fp8_scaled_old")[HIGH_NOISE]
    expert, wanted = with_blocks_at(path, uneven, [True, True, True]), merged_output(path, uneven)
    homes = {part: HOST if part.startswith("blocks.") else 0 for part in expert.parts}
    expert.dispatch(Placement(homes, expert.sizes(), {}, 0, ()), dict(enumerate(LAZY)), lambda: None, dict.fromkeys(LAZY, 2**60))
    before = gpus.live_bytes(0)
    for _ in range(2):
        assert relative(output(expert.model, GIVEN), wanted) < ROUNDING
        gc.collect()
        assert gpus.live_bytes(0) - before <= expert.largest_block_bytes


# ---- whole runs


class Bench:
    """An engine on imagined GPUs, as tests/engine/test_owner.py has it."""

    def __init__(self, gpus: ImaginedGpus, checkpoint: Path, make_request: Callable):
        self.gpus, self.make_request = gpus, make_request
        self.count = 1
        self.owner = ModelOwner()
        self.engine = ImageToVideo(self.owner, self.machine)
        self.vae = HostVae(checkpoint)

    def machine(self) -> Machine:
        return Machine(tuple(gpu(i, 64, 64 - self.gpus.live_bytes(i) / GIB) for i in range(self.count)), 64 * GIB)

    def run(self, handle: ModelHandle) -> VideoResult:
        """``peaks`` then has the most that each GPU held while something was loaded (True), and otherwise (False)."""
        quick = {"prompt_embeds": torch.ones(1, 3, 32), "guidance_scale": 1.0, "num_inference_steps": 2, "switch_step": 1}
        self.peaks: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
        self._is_loading = False
        self.gpus.reset_peaks()
        callbacks = Callbacks(on_load=lambda done, total, what: self._note_peaks(loads_now=done < total))
        result = self.engine(handle, self.make_request(**quick), callbacks, vae=self.vae)
        self._note_peaks(loads_now=False)
        gc.collect()
        return result

    def _note_peaks(self, *, loads_now: bool) -> None:
        self.peaks[self._is_loading] |= Counter(self.gpus.peak)
        self._is_loading = loads_now
        self.gpus.reset_peaks()


@pytest.fixture
def bench(gpus: ImaginedGpus, checkpoint: Path, make_request: Callable) -> Iterator[Bench]:
    bench = Bench(gpus, checkpoint, make_request)
    yield bench
    bench.owner.release()


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """4 blocks of 3 MiB in float32."""
    return make_checkpoint(num_blocks=4, num_heads=16)


Loras = dict[str, tuple[LoraChoice, ...]]


@pytest.fixture
def loras(checkpoint: Path, tmp_path: Path) -> Callable[..., Loras]:
    """For both experts, or for one: ``loras(0.7)``. They add a fifth to a block in float32, and nearly as much as it takes in int8."""
    shapes = {name: stored.shape for name, stored in open_model(checkpoint).model.experts[HIGH_NOISE].tensors.items()}
    files = {part: tiny_lora(tmp_path / f"{part}.safetensors", shapes, "lightx2v", 32, i) for i, part in enumerate((HIGH_NOISE, LOW_NOISE))}
    return lambda strength, *parts: {part: (files[part].choice(strength),) for part in parts or files}


@pytest.mark.parametrize(
    ("weight_dtype", "options"),
    [
        ("fp32", {"execution": "sequential"}),
        ("int8", {"execution": "parallel"}),
        ("bf16", {"execution": "parallel", "offload": "cpu"}),
        ("fp8_e4m3fn", {"execution": "sequential", "offload": "cpu"}),
    ],
    ids=str,
)
def test_runs_with_and_without(
    bench: Bench, checkpoint: Path, loras: Callable[..., Loras], monkeypatch: pytest.MonkeyPatch, weight_dtype: str, options: dict[str, str]
) -> None:
    """For one expert or both, another strength, none: each run is as if there had been no other, and reads no matrix of a block."""
    bench.count = 2
    handle = open_model(checkpoint, weight_dtype=weight_dtype, **options)
    handles = [handle, *(replace(handle, loras=chosen) for chosen in (loras(1.0), loras(-0.5, LOW_NOISE)))]
    alone = []
    for one in handles:
        alone.append(bench.run(one).frames)
        bench.owner.release()
    assert not any(torch.equal(one, other) for number, one in enumerate(alone) for other in alone[:number])
    bench.run(handles[0])
    reads = watch_reads(monkeypatch)
    for number in (1, 2, 1, 0):
        assert torch.equal(bench.run(handles[number]).frames, alone[number]), number
    assert bench.owner.loaded is not None
    expert = bench.owner.loaded.experts[HIGH_NOISE]
    large = {expert.files.tensors[name].key for name in block_matrices(expert.model)}
    files = {stored.file for part in handle.model.experts.values() for stored in part.tensors.values()}
    assert [read for read in reads if read.file in files and read.key in large] == []


def test_a_file_that_is_gone_stops_only_its_own_run(bench: Bench, checkpoint: Path, loras: Callable[..., Loras]) -> None:
    handle = open_model(checkpoint, weight_dtype="int8")
    chosen = loras(0.5)
    plain, with_loras = bench.run(handle).frames, bench.run(replace(handle, loras=chosen)).frames
    low = chosen[LOW_NOISE][0]
    content = low.file.path.read_bytes()
    low.file.path.unlink()
    gone = replace(handle, loras={HIGH_NOISE: chosen[HIGH_NOISE], LOW_NOISE: (replace(low, strength=0.6),)})
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"{LOW_NOISE}\.safetensors could not be read"):
            bench.run(gone)
    assert torch.equal(bench.run(handle).frames, plain)
    low.file.path.write_bytes(content)
    assert torch.equal(bench.run(replace(handle, loras=loras(0.5))).frames, with_loras)


@pytest.mark.parametrize(
    ("weight_dtype", "rooms", "options"),
    [
        ("fp32", (2.1,), {}),
        ("fp32", (1.1,), {}),
        ("fp32", (0.6, 0.5), {"execution": "parallel"}),
        ("fp32", (0.5, 0.3), {"execution": "sequential"}),
        ("int8", (0.6,), {"execution": "sequential"}),
        ("int8", (0.6, 0.5), {"execution": "parallel"}),
        ("int8", (2.0, 2.0), {"offload": "cpu"}),
    ],
    ids=str,
)
def test_loras_count(
    bench: Bench, checkpoint: Path, loras: Callable[..., Loras], weight_dtype: str, rooms: tuple[float, ...], options: dict[str, str]
) -> None:
    """No more weights than sliders leave room for, and nothing unplanned beside them that computes: with LoRAs, and after they went."""
    bench.count = len(rooms)
    tiny, chosen = TinyExpert(checkpoint, weight_dtype), loras(0.7)
    expert = expert_of(checkpoint, tiny.precision)
    sizes = expert.sizes(chosen[HIGH_NOISE])
    block = max(size for part, size in sizes.items() if part.startswith("blocks."))
    assert block > 1.2 * tiny.block_bytes
    tiny.widened_bytes = expert.widened_bytes(chosen[HIGH_NOISE])
    weights = [room * sum(sizes.values()) + 2 * block for room in rooms]
    handle = open_model(checkpoint, weight_dtype=weight_dtype, max_memory_gib=tiny.sliders(bench.make_request().shape, weights), **options)
    # What is converted or merged passes through float32, and stands a few times beside what it becomes. While that happens, the room that
    # is planned for activations is free: a constant that all of this model would go into many times.
    passing = SMALL_CHANGE + 5 * 4 * max(stored.elements for stored in expert.files.tensors.values())
    frames = []
    for one in (replace(handle, loras=chosen), handle, replace(handle, loras=chosen)):
        frames.append(bench.run(one).frames)
        loaded = bench.owner.loaded
        assert loaded is not None and loaded.plan is not None
        for part, placement in loaded.plan.placements.items():
            assert placement.sizes == loaded.experts[part].sizes(one.loras.get(part, ())) == loaded.experts[part].sizes()
        for index, room in enumerate(weights):
            assert bench.peaks[False][index] <= room + tiny.widened_bytes + SMALL_CHANGE, index
            assert bench.peaks[True][index] <= room + block + passing, index
    assert torch.equal(frames[0], frames[2]) and not torch.equal(frames[0], frames[1])
