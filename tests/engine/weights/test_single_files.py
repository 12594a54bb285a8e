"""An expert from a single file computes what diffusers' model computes with the values that the file stands for, wherever its parts are."""

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from crews import crew_of, expert_of, inputs, on_cpu, poison, relative
from diffusers import WanTransformer3DModel
from expert_reference import diffusers_model, output, values_in
from imagined_gpus import ImaginedGpus
from tiny_single_files import FORMS, file_names, original_name
from wan_sharded.engine.checkpoints.single_file import open_expert_file
from wan_sharded.engine.checkpoints.stored import HIGH_NOISE, LOW_NOISE
from wan_sharded.engine.parallel.crew import Crew
from wan_sharded.engine.parallel.forward import ParallelForward
from wan_sharded.engine.parallel.functions import BlockFunctions
from wan_sharded.engine.parallel.workers import Worker
from wan_sharded.engine.planning.placement import HOST, Placement
from wan_sharded.engine.transformer.low_precision import MULTIPLIED
from wan_sharded.engine.weights import expert as expert_module
from wan_sharded.engine.weights import hooks
from wan_sharded.engine.weights.expert import CPU, Expert
from wan_sharded.engine.weights.precision import Precision, block_matrices, resolve_precision

F32, BF16 = torch.float32, torch.bfloat16
LAZY = [torch.device("lazy:0"), torch.device("lazy:1")]
PACKED, MAPPED = "packed on the host", "mapped from its file"
Home = torch.device | str
GIVEN = inputs(channels=36, frames=3, size=(6, 14), batch=2)  # 63 tokens a video
# Sums in another order.
ROUNDING = 2e-6


def precision_of(path: Path, dtype: torch.dtype = F32, choice: str = "default") -> Precision:
    """As chosen, computing in ``dtype``."""
    found, _ = resolve_precision(choice, open_expert_file(path).stored_dtype, on_gpu=True)
    return Precision(dtype, found.storage_dtype if choice != "default" else dtype, found.as_stored)


@lru_cache
def expected_of(path: Path, dtype: torch.dtype = F32) -> torch.Tensor:
    config = open_expert_file(path).config
    return output(diffusers_model(config, values_in(path, config), dtype), GIVEN, dtype)


def expert_in(path: Path, dtype: torch.dtype = F32, choice: str = "default") -> Expert:
    return expert_of(open_expert_file(path), precision_of(path, dtype, choice))


def file_of(folder: Path, form: str, part: str = HIGH_NOISE) -> Path:
    return folder / file_names(form)[part]


@pytest.fixture
def gpus() -> Iterator[ImaginedGpus]:
    with torch.inference_mode(), ImaginedGpus() as gpus:
        yield gpus
        gc.collect()


def place(expert: Expert, homes: list[Home]) -> list[Home]:
    """Blocks to their homes in turn, all else to the first GPU; each part's home."""
    blocks = [part for part in expert.parts if part.startswith("blocks.")]
    found = [homes[blocks.index(part) % len(homes)] if part in blocks else LAZY[0] for part in expert.parts]
    for part, home in zip(expert.parts, found, strict=True):
        device = home if isinstance(home, torch.device) else CPU
        expert.bring(part, device, LAZY[0], packed=True if home == PACKED else None)
    return found


def in_parallel(expert: Expert, homes: list[Home], crew: Crew | None = None) -> ParallelForward:
    place(expert, homes)
    return ParallelForward(expert, crew or crew_of([Worker(i, device) for i, device in enumerate(LAZY)]), BlockFunctions(expert.math))


def one_after_the_other(expert: Expert, homes: list[Home]) -> Any:
    found = [home.index if isinstance(home, torch.device) else HOST for home in place(expert, homes)]
    placement = Placement(dict(zip(expert.parts, found, strict=True)), expert.sizes(), {}, 0, ())
    expert.dispatch(placement, dict(enumerate(LAZY)), lambda: None, dict.fromkeys(LAZY, 2**60))
    return expert.model


# ---- every form


@pytest.mark.parametrize("packed", [False, True], ids=["loose", "packed"])
@pytest.mark.parametrize("form", FORMS)
def test_on_the_cpu(tiny_single_files: Path, form: str, packed: bool) -> None:
    """In one piece, layers of one input are one product, whose sums may be in another order."""
    path = file_of(tiny_single_files, form)
    for dtype, bound in ((F32, ROUNDING), (BF16, 0.02)):
        got = output(on_cpu(expert_in(path, dtype), packed=packed).model, GIVEN, dtype)
        assert relative(got, expected_of(path, dtype)) < bound
        assert packed or torch.equal(got, expected_of(path, dtype))


@pytest.mark.parametrize("form", FORMS)
def test_wherever_its_blocks_are(tiny_single_files: Path, form: str, gpus: ImaginedGpus) -> None:
    """All devices at once, and one after the other."""
    path = file_of(tiny_single_files, form)
    for model in (in_parallel(expert_in(path), [LAZY[1], PACKED, MAPPED]), one_after_the_other(expert_in(path), [MAPPED, LAZY[1], PACKED])):
        got = output(model, GIVEN)
        assert got.device == CPU and relative(got, expected_of(path)) < ROUNDING


@pytest.mark.parametrize("choice", ["bf16", "fp16", "int8", "fp8_e4m3fn"])
@pytest.mark.parametrize("form", ["original_fp32", "fp8", "fp8_scaled_old", "int8_scaled", "gguf_q8_0"])
def test_other_precisions(tiny_single_files: Path, form: str, choice: str, gpus: ImaginedGpus) -> None:
    """As far from the file's values as rounding them once more puts it, and the same everywhere."""
    path = file_of(tiny_single_files, form)
    dtype = {"bf16": BF16, "fp16": torch.float16}.get(choice, F32)
    precision = precision_of(path, dtype, choice)
    on_host = output(on_cpu(expert_of(open_expert_file(path), precision)).model, GIVEN, dtype)
    assert relative(on_host, expected_of(path)) < {"bf16": 0.02, "fp16": 0.002, "int8": 0.02, "fp8_e4m3fn": 0.08}[choice]
    got = output(in_parallel(expert_of(open_expert_file(path), precision), [LAZY[1], PACKED, MAPPED]), GIVEN, dtype)
    assert relative(got, on_host) < {F32: ROUNDING, BF16: 0.02, torch.float16: 0.002}[dtype]


@pytest.mark.parametrize("form", ["fp8_scaled_old", "int8_scaled", "fp8_e5m2", "gguf_q8_0"])
def test_products_of_few_bits(tiny_single_files: Path, form: str) -> None:
    """Where a device multiplies them as they are, what comes out is as far off as activations rounded to the same type put it.

    What can't be multiplied so is widened all the same. CPUs can, in torch's way.
    """
    path = file_of(tiny_single_files, form)
    expert = on_cpu(expert_in(path), packed=True)
    workers = [Worker(i, CPU) for i in range(2)]
    crew = crew_of(workers)
    for share in crew.shares:
        share.multiply_few_bits = True
    error = relative(output(ParallelForward(expert, crew, BlockFunctions(expert.math)), GIVEN), expected_of(path))
    matrix = next(iter(block_matrices(expert.model)))
    if dict(expert.model.named_parameters())[matrix].dtype in MULTIPLIED:
        assert 1e-3 < error < (0.02 if form == "int8_scaled" else 0.1)
    else:
        assert error < ROUNDING


# ---- GGUF files whose blocks differ, as published ones do


def mixed_gguf(path: Path, folder: Path, part: str = HIGH_NOISE) -> Path:
    """Q8_0 and Q4_0 by turns, the other way round in the next block: two kinds of blocks, each with matrices that the other has larger."""
    writer = gguf.GGUFWriter(path, "wan")
    number = 0
    for ours, tensor in WanTransformer3DModel.from_pretrained(folder / "diffusers" / part).state_dict().items():
        values, name = tensor.float().numpy(), original_name(ours)
        if values.ndim != 2 or not name.startswith("blocks."):
            writer.add_tensor(name, values)
            continue
        number += 1
        kind = gguf.GGMLQuantizationType.Q8_0 if (number + int(name.split(".")[1])) % 2 else gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def mixed(tiny_single_files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mixed")
    return {part: mixed_gguf(folder / file_names("gguf_q8_0")[part], tiny_single_files, part) for part in (HIGH_NOISE, LOW_NOISE)}


def test_blocks_of_several_types_are_told_apart(mixed: dict[str, Path]) -> None:
    expert = on_cpu(expert_in(mixed[HIGH_NOISE]), packed=True)
    kinds = [{name: kind for name, kind in expert.block_weights(f"blocks.{i}").items() if name.endswith(".gguf")} for i in range(3)]
    assert set(kinds[0].values()) == {"Q8_0", "Q4_0"} and kinds[0] == kinds[2] != kinds[1]
    assert expert.layout("blocks.0") is expert.layout("blocks.2") is not expert.layout("blocks.1")
    assert relative(output(expert.model, GIVEN), expected_of(mixed[HIGH_NOISE])) < ROUNDING


@pytest.mark.parametrize("homes", [[PACKED], [MAPPED], [LAZY[1]], [PACKED, MAPPED, LAZY[1]]], ids=str)
def test_blocks_of_several_types_share_buffers(mixed: dict[str, Path], homes: list[Home], gpus: ImaginedGpus) -> None:
    """Both experts', by turns. A buffer holds whichever block comes, and is as large as the largest of them."""
    experts = [expert_in(path) for path in mixed.values()]
    largest = max(expert.largest_block_bytes for expert in experts)
    crew = crew_of([Worker(i, device) for i, device in enumerate(LAZY)])
    crew.slot_bytes = largest  # as loaded.py does
    forwards = [in_parallel(expert, homes, crew) for expert in experts]
    buffers = [sum(slot.flat.numel() for slot in slots) for slots in crew._slots.values()]
    assert buffers and set(buffers) == {2 * largest}
    for _ in range(2):
        for forward, path in zip(forwards, mixed.values(), strict=True):
            assert relative(output(forward, GIVEN), expected_of(path)) < ROUNDING
            poison(crew)


def test_what_is_fetched_needs_the_room_of_the_largest_block(mixed: dict[str, Path], gpus: ImaginedGpus) -> None:
    """One after the other, too: it is what the plan keeps free for it."""
    expert = expert_in(mixed[HIGH_NOISE])
    model = one_after_the_other(expert, [PACKED])
    before = gpus.live_bytes(0)
    for _ in range(2):
        assert relative(output(model, GIVEN), expected_of(mixed[HIGH_NOISE])) < ROUNDING
        gc.collect()
        assert gpus.live_bytes(0) - before <= expert.largest_block_bytes


def test_hooks_are_looked_for_where_there_may_be_some(tiny_single_files: Path, gpus: ImaginedGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes milliseconds, and is asked for each part that leaves a GPU."""
    expert = expert_in(file_of(tiny_single_files, FORMS[0]))
    removed: list[Any] = []
    remove = expert_module.remove_hook_from_module
    monkeypatch.setattr(
        expert_module, "remove_hook_from_module", lambda model, recurse: (removed.append(model), remove(model, recurse=recurse))[1]
    )
    expert.undispatch()
    assert not removed
    for attach_fails in (False, True):
        if attach_fails:
            monkeypatch.setattr(hooks, "attach", lambda *given, attach=hooks.attach: (attach(*given), 1 / 0))
        with pytest.raises(ZeroDivisionError) if attach_fails else nullcontext():
            one_after_the_other(expert, [LAZY[1], PACKED])
        assert any(hasattr(module, "_hf_hook") for module in expert.model.modules())
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(expert_module, "remove_hook_from_module", lambda model, recurse: 1 / 0)
            expert.undispatch()
        expert.undispatch()
        expert.undispatch()
        assert not any(hasattr(module, "_hf_hook") for module in expert.model.modules()) and removed == [expert.model]
        removed.clear()
