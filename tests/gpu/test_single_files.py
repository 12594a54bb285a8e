"""Single files and LoRAs on a real GPU: what arrives through the page-locked buffers is what the file has, and computes the same."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_loras import write_lora
from tiny_single_files import FORMS, file_names
from wan_sharded.engine.checkpoints.lora import LoraChoice, open_lora_file
from wan_sharded.engine.checkpoints.safetensors_header import read_header
from wan_sharded.engine.checkpoints.single_file import open_expert_file
from wan_sharded.engine.parallel.crew import Crew, Share
from wan_sharded.engine.parallel.forward import ParallelForward
from wan_sharded.engine.parallel.functions import BlockFunctions
from wan_sharded.engine.parallel.workers import Worker, new_stream
from wan_sharded.engine.weights import library_reads
from wan_sharded.engine.weights.expert import CPU, Expert
from wan_sharded.engine.weights.precision import Precision, resolve_precision
from wan_sharded.engine.weights.reading import TensorReader

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
GPU = torch.device("cuda:0")
MIB = 1024**2


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """The patch embedding is a convolution, which by default is computed in less."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("by", ["library", "threads"])
@pytest.mark.parametrize("count", [1, 2])
def test_bytes_arrive_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str, count: int) -> None:
    """Many tensors through few buffers, larger and smaller ones in turn, to GPUs that are busy all the time."""
    if count > torch.cuda.device_count():
        pytest.skip(f"needs {count} GPUs")
    if by == "threads":
        monkeypatch.setattr(library_reads, "available", lambda: False)
    elif not library_reads.available():
        pytest.skip("only Python's threads read here")
    generator = torch.Generator().manual_seed(0)
    sizes = [48 * MIB, 1000, 17 * MIB + 3, 33 * MIB, 5, 64 * MIB, 16 * MIB, 16 * MIB + 1] * 3
    tensors = {f"t{i:02}": torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for i, size in enumerate(sizes)}
    save_file(tensors, tmp_path / "file.safetensors")
    entries = read_header(tmp_path / "file.safetensors")
    reader = TensorReader()
    gpus = [torch.device("cuda", number) for number in range(count)]
    busy = [torch.randn(4096, 4096, device=gpu) for gpu in gpus]
    streams = {gpu: [torch.cuda.default_stream(gpu), torch.cuda.Stream(gpu)] for gpu in gpus}
    for turn, at_once in enumerate((1, len(entries), 5, 7)):
        arrived = {
            name: torch.empty(entry.size_bytes, dtype=torch.uint8, device=gpus[number % count])
            for number, (name, entry) in enumerate(entries.items())
        }
        wanted = [(entry, arrived[name]) for name, entry in entries.items()]
        for gpu in gpus:
            torch.cuda.set_stream(streams[gpu][turn % 2])
        for begin in range(0, len(wanted), at_once):
            for number in range(count):  # so that copies queue up behind it
                with torch.cuda.device(gpus[number]):
                    busy[number] = busy[number] @ busy[number] * 1e-3
            reader.read_into(wanted[begin : begin + at_once])
        for name, tensor in tensors.items():
            assert torch.equal(arrived[name].cpu(), tensor), name
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
            torch.cuda.set_stream(streams[gpu][0])
        torch.cuda.set_device(0)
        reader.close()


@pytest.fixture(scope="module")
def lora(tiny_single_files: Path, tmp_path_factory: pytest.TempPathFactory) -> LoraChoice:
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    shapes = {n: s.shape for n, s in open_expert_file(tiny_single_files / file_names("original_fp32")["transformer"]).tensors.items()}
    write_lora(file, shapes, "lightx2v", 4, 1)
    return LoraChoice(open_lora_file(file), 0.8)


def inputs(text_dim: int, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 36, 3, 10, 14, generator=generator),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": torch.randn(1, 20, text_dim, generator=generator),
    }


@pytest.mark.parametrize("homes", [[GPU], [CPU], [GPU, CPU]], ids=["on the GPU", "on the host", "both"])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_computes_the_same_as_on_the_cpu(tiny_single_files: Path, lora: LoraChoice, form: str, homes: list[torch.device]) -> None:
    files = open_expert_file(tiny_single_files / file_names(form)["transformer"])
    stored, _ = resolve_precision("default", files.stored_dtype, on_gpu=False)
    precision = Precision(torch.float32, torch.float32, stored.as_stored)
    ours, theirs = (Expert("high noise expert", files, precision) for _ in range(2))
    workers = [Worker(i, GPU, new_stream(GPU)) for i in range(2)]
    for loras in ([], [lora], [LoraChoice(lora.file, -0.5)], []):
        for expert in (ours, theirs):
            expert.use_loras(loras)
        for number, part in enumerate(ours.parts):
            home = homes[number % len(homes)] if part.startswith("blocks.") else GPU
            ours.bring(part, home, GPU, packed=True)
            theirs.bring(part, CPU, CPU)
        torch.cuda.synchronize()
        forward = ParallelForward(ours, Crew([Share(worker, 1.0) for worker in workers], workers[0]), BlockFunctions(ours.math))
        for seed in range(3):
            given = inputs(files.config["text_dim"], seed)
            with torch.inference_mode():
                got = forward(**{k: v.to(GPU) for k, v in given.items()}, return_dict=False)[0].cpu()
                want = theirs.model(**given, return_dict=False)[0]
            assert float((got - want).norm() / want.norm()) < 2e-4, (loras, seed)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_products_of_few_bits(make_checkpoint: Callable[..., Path], storage: torch.dtype, compiled: bool, count: int) -> None:
    """The GPU's own products against widened ones: as far apart as rounding activations makes them, and not equal.

    Alone, a worker makes queries, keys and values in one product; of several, each makes the queries by themselves.
    """
    from wan_sharded.engine.checkpoints.diffusers_folder import open_diffusers_folder
    from wan_sharded.engine.parallel.functions import can_compile
    from wan_sharded.engine.probe import multiplies_few_bits

    if not multiplies_few_bits(GPU, storage):
        pytest.skip(f"{torch.cuda.get_device_name()} does not multiply {storage}")
    if compiled and not can_compile():
        pytest.skip("cannot compile here")
    files = open_diffusers_folder(make_checkpoint(num_heads=8, dtype=torch.bfloat16)).experts["transformer"]
    outputs = []
    for multiply in (False, True):
        expert = Expert("high noise expert", files, Precision(torch.bfloat16, storage))
        for part in expert.parts:
            expert.bring(part, GPU, GPU)
        torch.cuda.synchronize()
        functions = BlockFunctions(expert.math)
        workers = [Worker(0, GPU), *(Worker(number, GPU, new_stream(GPU)) for number in range(1, count))]
        crew = Crew([Share(worker, 1.0, multiply_few_bits=multiply) for worker in workers], workers[0])
        forward = ParallelForward(expert, crew, functions, forwards_left=lambda: 10**9 if compiled else 0)
        if compiled:
            functions.compile()
        given = {k: v.to(GPU, torch.bfloat16) if v.is_floating_point() else v.to(GPU) for k, v in inputs(32, 1).items()}
        with torch.inference_mode():
            outputs.append(forward(**given, return_dict=False)[0].float().cpu())
        assert functions.failure is None
    error = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
    assert 1e-3 < error < (0.05 if storage == torch.int8 else 0.12)
