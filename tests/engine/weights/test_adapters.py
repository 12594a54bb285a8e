"""LoRAs of one expert: the output is that of the weights with LoRAs merged in float32, in whatever order they come and go, and wherever
parts are meanwhile. What whole runs make of them is in test_adapters_in_runs.py.
"""

import gc
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from crews import expert_of, inputs, relative
from expert_reference import TinyLora, Values, diffusers_model, held, in_use, merged, output, same_bits, tiny_lora, values_in, watch_reads
from imagined_gpus import ImaginedGpus
from safetensors.torch import save_file
from tiny_loras import wan_name
from tiny_single_files import FORMS, file_names
from wan_sharded.engine.checkpoints.lora import LoraChoice, open_lora_file
from wan_sharded.engine.checkpoints.single_file import open_expert_file
from wan_sharded.engine.checkpoints.stored import StoredTensor
from wan_sharded.engine.errors import CheckpointError
from wan_sharded.engine.weights.expert import CPU, Expert
from wan_sharded.engine.weights.precision import Precision, block_matrices, resolve_precision

F32, BF16, INT8, FP8 = torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn
LAZY = torch.device("lazy:0")
GIVEN = inputs(channels=36, frames=2, size=(6, 8), batch=2)
ROUNDING = 3e-6
HOMES = {"loose": (CPU, False), "packed": (CPU, True), "on a GPU": (LAZY, True)}
FEW_BITS = [("original_bf16", "int8"), ("fp8_scaled_old", "default"), ("gguf_q4_k", "default")]
EVERYWHERE = [(*kept, home) for kept in FEW_BITS[:2] for home in HOMES] + [(*FEW_BITS[2], "packed")]
# In one block, matrices of each kind: as they are multiplied by themselves, and as one with others.
WHOLE = ("blocks.1.attn1.to_k.weight", "blocks.1.ffn.net.0.proj.weight", "blocks.1.attn2.to_q.weight")
Chosen = tuple[tuple[str, float], ...]


@pytest.fixture(scope="module")
def loras(tiny_single_files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyLora]:
    """ "matrices": low rank for every matrix and the embedding of patches; "differences": biases, norms and tables as well, and what is
    before and after the blocks as a whole; "few": another rank, for some blocks; "whole": what is added to some matrices of a block.
    """
    folder = tmp_path_factory.mktemp("loras")
    shapes = {name: stored.shape for name, stored in open_expert_file(file_of(tiny_single_files, "original_fp32")).tensors.items()}
    few = {name: shape for name, shape in shapes.items() if name.startswith(("blocks.0", "blocks.2.ffn"))}
    added = {name: 0.02 * torch.randn(shapes[name], generator=torch.Generator().manual_seed(9)) for name in WHOLE}
    save_file({f"diffusion_model.{wan_name(n.removesuffix('.weight'))}.diff": v for n, v in added.items()}, folder / "whole.safetensors")
    return {
        "matrices": tiny_lora(folder / "matrices.safetensors", shapes, "lightning", 4, 1),
        "differences": tiny_lora(folder / "differences.safetensors", shapes, "lightx2v", 4, 2),
        "few": tiny_lora(folder / "few.safetensors", few, "kohya", 8, 3),
        "whole": TinyLora(folder / "whole.safetensors", added),
    }


def file_of(folder: Path, form: str) -> Path:
    return folder / file_names(form)["transformer"]


def expert_in(path: Path, dtype: torch.dtype = F32, choice: str = "default") -> Expert:
    found, _ = resolve_precision(choice, open_expert_file(path).stored_dtype, on_gpu=True)
    return expert_of(open_expert_file(path), Precision(dtype, dtype if choice == "default" else found.storage_dtype, found.as_stored))


def choices(loras: dict[str, TinyLora], chosen: Chosen) -> list[LoraChoice]:
    return [loras[name].choice(strength) for name, strength in chosen]


def bring(expert: Expert, home: str) -> Expert:
    device, packed = HOMES[home]
    for part in expert.parts:
        expert.bring(part, device, device, packed=packed)
    return expert


_fresh: dict[tuple, tuple[Values, dict[str, int]]] = {}


def fresh(path: Path, loras: dict[str, TinyLora], chosen: Chosen, choice: str = "default") -> tuple[Values, dict[str, int]]:
    """What an expert holds that never had other LoRAs, and how large it is; the same at each home (test_keeping.py)."""
    key = (path, loras["few"].path, chosen, choice)
    if key not in _fresh:
        with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]  # no imagined GPU looks on
            expert = expert_in(path, choice=choice)
            expert.use_loras(choices(loras, chosen))
            _fresh[key] = held(bring(expert, "packed")), expert.sizes()
    return _fresh[key]


_expected: dict[tuple, torch.Tensor] = {}


def expected(path: Path, loras: dict[str, TinyLora], chosen: Chosen) -> torch.Tensor:
    """By diffusers, with the weights merged in float32."""
    key = (path, loras["few"].path, chosen)
    if key not in _expected:
        config, values = read(path)
        _expected[key] = output(diffusers_model(config, merged(values, [(loras[name], strength) for name, strength in chosen])), GIVEN)
    return _expected[key]


@lru_cache
def read(path: Path) -> tuple:
    config = open_expert_file(path).config
    return config, values_in(path, config)


# ---- the output

SETS: list[Chosen] = [
    (("matrices", 0.7),),
    (("differences", -0.4),),
    (("matrices", 0.7), ("differences", 1.1), ("few", -0.5)),
    (("whole", 1.0),),
    (("few", 0.5), ("whole", -0.8), ("matrices", -0.3)),
    (("matrices", 0.4), ("matrices", 0.3)),
]


@pytest.mark.parametrize(("form", "home"), [*((form, "packed") for form in FORMS), *((form, "loose") for form, _ in FEW_BITS)], ids=str)
def test_the_output_is_that_of_merged_weights(tiny_single_files: Path, loras: dict[str, TinyLora], form: str, home: str) -> None:
    """In float32, so that nothing is rounded but sums."""
    path = file_of(tiny_single_files, form)
    plain = output(bring(expert_in(path), home).model, GIVEN)
    expert = expert_in(path)
    for chosen in SETS:
        expert.use_loras(choices(loras, chosen))
        wanted = expected(path, loras, chosen)
        assert relative(plain, wanted) > 0.02, "they do something"
        assert relative(output(bring(expert, home).model, GIVEN), wanted) < ROUNDING, chosen
    assert relative(expected(path, loras, SETS[-1]), expected(path, loras, SETS[0])) < ROUNDING, "twice is both together"


@pytest.mark.parametrize("choice", ["int8", "fp8_e4m3fn"])
def test_on_weights_that_are_quantized_here(tiny_single_files: Path, loras: dict[str, TinyLora], choice: str) -> None:
    """Added to what the rounded matrices stand for. A matrix that is changed as a whole is not rounded: the change could be lost in it."""
    path = file_of(tiny_single_files, "original_bf16")
    config, values = read(path)
    rounded = in_use(bring(expert_in(path, choice=choice), "loose"), F32)
    expert = expert_in(path, choice=choice)
    for chosen in SETS:
        expert.use_loras(choices(loras, chosen))
        base = {**rounded, **{name: values[name] for name in WHOLE if any(which == "whole" for which, _ in chosen)}}
        wanted = output(diffusers_model(config, merged(base, [(loras[name], strength) for name, strength in chosen])), GIVEN)
        assert relative(output(bring(expert, "packed").model, GIVEN), wanted) < ROUNDING, chosen
        kept = held(expert)
        wide = {name for name in block_matrices(expert.model) if kept[name].dtype == F32}
        assert wide == (set(WHOLE) if any(which == "whole" for which, _ in chosen) else set())


@pytest.mark.parametrize("form", ["original_bf16", "fp8_scaled_old", "gguf_q4_k"])
def test_in_bf16(tiny_single_files: Path, loras: dict[str, TinyLora], form: str) -> None:
    """As far from float32 as bf16 is without LoRAs: twice that is allowed here, where a LoRA changes ten times as much."""
    path = file_of(tiny_single_files, form)
    alone = relative(output(bring(expert_in(path, BF16), "packed").model, GIVEN, BF16), expected(path, loras, ()))
    for chosen in SETS[:3]:
        expert = expert_in(path, BF16)
        expert.use_loras(choices(loras, chosen))
        got, wanted = output(bring(expert, "packed").model, GIVEN, BF16), expected(path, loras, chosen)
        assert relative(got, wanted) < 2 * alone < 0.04 < 0.2 < relative(expected(path, loras, ()), wanted)


# ---- coming and going

CHANGES: list[Chosen] = [
    (("matrices", 0.7),),
    (("matrices", -0.2),),  # another strength
    (("matrices", -0.2), ("differences", 1.1)),  # one more
    (("differences", 1.1), ("matrices", -0.2)),  # the other way round
    (("few", 0.5), ("whole", 0.9)),  # others
    (("few", 0.5), ("whole", 0.4)),
    (("few", 0.0), ("whole", 0.4), ("matrices", 0.0)),  # strength 0 is not there
    (("differences", 0.3),),
    (),
    (("matrices", 0.7), ("whole", 0.4)),
    (("matrices", 0.0),),
]


def without_zeros(chosen: Chosen) -> Chosen:
    return tuple((name, strength) for name, strength in chosen if strength)


@pytest.mark.parametrize(("form", "choice", "home"), [("original_bf16", "default", "loose"), *EVERYWHERE], ids=str)
def test_any_order_ends_where_it_would_begin(
    tiny_single_files: Path, loras: dict[str, TinyLora], form: str, choice: str, home: str
) -> None:
    """What is held is that of an expert which never had others, to the last bit; so is the room it takes, and what the bits mean."""
    path = file_of(tiny_single_files, form)
    with ImaginedGpus() if home == "on a GPU" else nullcontext() as gpus:
        expert = bring(expert_in(path, choice=choice), home)
        before: Chosen = ()
        for chosen in CHANGES:
            there = without_zeros(chosen)
            assert expert.use_loras(choices(loras, chosen)) == (there != before)
            bring(expert, home)
            values, sizes = fresh(path, loras, there, choice)
            assert same_bits(held(expert), values), chosen
            assert expert.sizes() == sizes == expert.sizes(choices(loras, chosen))
            kinds = {name for name in WHOLE if f"{name.removeprefix('blocks.1.')}.gguf" in expert.block_weights("blocks.1")}
            assert kinds == (set(WHOLE) - (set(WHOLE) if "whole" in dict(there) else set()) if "gguf" in form else set())
            gc.collect()
            rotary = sum(buffer.nbytes for buffer in expert.model.rope.buffers())
            assert gpus is None or gpus.live_bytes(0) == sum(sizes.values()) + rotary
            before = there
        del expert
        gc.collect()


def test_memory_is_made_only_where_a_part_will_stand_elsewhere(tiny_single_files: Path, loras: dict[str, TinyLora]) -> None:
    """Locking a block's memory takes longer than reading a LoRA. Of what a GPU converts; what comes in place is locked afterwards."""
    in_place = expert_in(file_of(tiny_single_files, "fp8_scaled_old"))
    expert, part = expert_in(file_of(tiny_single_files, "fp8_scaled_old"), choice="int8"), "blocks.1"
    assert in_place.host_bytes_to_make(part) == 0
    assert expert.host_bytes_to_make(part) == expert.sizes()[part], "nowhere yet"
    expert.bring(part, CPU, CPU, packed=True)
    assert expert.host_bytes_to_make(part) == 0
    for strength, elsewhere in ((1.0, True), (0.5, False), (0.0, True)):
        expert.use_loras(choices(loras, (("matrices", strength),)) if strength else [])
        assert expert.host_bytes_to_make(part) == (expert.sizes()[part] if elsewhere else 0)
        expert.bring(part, CPU, CPU, packed=True)
    with ImaginedGpus():
        expert.bring(part, LAZY, LAZY)
        assert expert.host_bytes_to_make(part) == expert.sizes()[part], "on a GPU"
    expert.drop(part)
    expert.bring(part, CPU, CPU, packed=False)
    assert expert.host_bytes_to_make(part) == 0, "not in one piece"
    with ImaginedGpus():
        in_place.bring(part, LAZY, LAZY)
        assert in_place.host_bytes_to_make(part) == in_place.sizes()[part], "on a GPU"


def matrices_read(reads: list[StoredTensor], expert: Expert) -> set[str]:
    """The blocks' matrices among what was read."""
    own = {stored: name for name, stored in expert.files.tensors.items() if name in block_matrices(expert.model)}
    return {own[read] for read in reads if read in own}


@pytest.mark.parametrize(("form", "choice", "home"), EVERYWHERE, ids=str)
def test_no_large_matrix_is_read_again(
    tiny_single_files: Path, loras: dict[str, TinyLora], form: str, choice: str, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But those that a LoRA changes as a whole, or did."""
    with ImaginedGpus() if home == "on a GPU" else nullcontext():
        expert = bring(expert_in(file_of(tiny_single_files, form), choice=choice), home)
        reads = watch_reads(monkeypatch)
        before: Chosen = ()
        for chosen in CHANGES:
            expert.use_loras(choices(loras, chosen))
            reads.clear()
            bring(expert, home)
            whole = any(name == "whole" for name, _ in (*before, *without_zeros(chosen)))
            assert matrices_read(reads, expert) == (set(WHOLE) if whole else set()), chosen
            reads.clear()
            bring(expert, home)
            assert reads == [], "twice is once"
            before = without_zeros(chosen)
        del expert
        gc.collect()


@pytest.mark.parametrize("form", ["original_bf16", "gguf_q4_k"])
def test_parts_that_were_elsewhere_meanwhile(tiny_single_files: Path, loras: dict[str, TinyLora], form: str) -> None:
    """Parked on the host, dropped, waiting there in one piece or as pages of the file: each follows when it is brought home."""
    path = file_of(tiny_single_files, form)
    with ImaginedGpus():
        expert = bring(expert_in(path), "on a GPU")
        blocks = [part for part in expert.parts if part.startswith("blocks.")]
        for number, chosen in enumerate(CHANGES):
            expert.use_loras(choices(loras, chosen))
            for part, turn in zip(blocks, range(number, number + 3), strict=True):
                if turn % 3 == 0:
                    expert.drop(part)
                    expert.bring(part, CPU, LAZY, packed=turn % 2 == 0)
                elif turn % 3 == 1:
                    expert.park(part)
            if number % 2:
                continue  # with some parts that have not followed yet
            bring(expert, "on a GPU")
            assert all(expert.is_current(part) for part in expert.parts)
            assert same_bits(held(expert), fresh(path, loras, without_zeros(chosen))[0])
        del expert
        gc.collect()


# ---- files that are gone


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("form", ["original_bf16", "fp8_scaled_old"])
def test_a_file_that_is_gone(tiny_single_files: Path, loras: dict[str, TinyLora], form: str, home: str, tmp_path: Path) -> None:
    """Says which; without it the model works as before, and with the others too."""
    path, gone = file_of(tiny_single_files, form), tmp_path / "gone.safetensors"
    with ImaginedGpus() if home == "on a GPU" else nullcontext():
        expert = bring(expert_in(path), home)
        for name in ("matrices", "whole", "differences"):
            gone.write_bytes(loras[name].path.read_bytes())
            missing = LoraChoice(open_lora_file(gone), 0.6)
            gone.unlink()
            for others in ((), (("few", 0.5),)):
                expert.use_loras([*choices(loras, others), missing])
                for _ in range(2):
                    with pytest.raises(CheckpointError, match=r"gone\.safetensors could not be read"):
                        bring(expert, home)
                expert.use_loras(choices(loras, others))
                assert same_bits(held(bring(expert, home)), fresh(path, loras, others)[0]), (name, others)
        del expert
        gc.collect()
