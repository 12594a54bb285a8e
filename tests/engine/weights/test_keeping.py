"""From each form of file to what is kept in memory: the same values to the last bit, each tensor read once, as large as was said."""

import weakref
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from expert_reference import held, in_use, same_bits, values_in, watch_reads
from imagined_gpus import ImaginedGpus
from safetensors.torch import load_file, save_file
from tiny_single_files import FORMS, file_names
from wan_sharded.engine.checkpoints.single_file import open_expert_file
from wan_sharded.engine.checkpoints.stored import ComponentFiles, StoredTensor
from wan_sharded.engine.errors import CheckpointError
from wan_sharded.engine.transformer.low_precision import quantized_rows
from wan_sharded.engine.weights import keeping
from wan_sharded.engine.weights.errands import Reading
from wan_sharded.engine.weights.expert import CPU, Expert
from wan_sharded.engine.weights.precision import Precision, block_matrices, resolve_precision

F32, F16, BF16, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.int8
FP8, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LAZY = torch.device("lazy:0")
# What a block's matrices are kept as where nothing else is asked for; ``None``: in the precision of computing.
KEPT = {
    **dict.fromkeys(("fp8", "fp8_scaled_old", "fp8_scaled_new", "fp8_scaled_metadata"), FP8),
    "fp8_e5m2": E5M2,
    "int8_scaled": INT8,
    **dict.fromkeys(("gguf_q8_0", "gguf_q4_0", "gguf_q4_k"), torch.uint8),
}
HOMES = {"loose": (CPU, False), "packed": (CPU, True), "on a GPU": (LAZY, True)}
ON_HOST = ["loose", "packed"]
PROJECTION = "blocks.1.attn1.to_q"


def file_of(folder: Path, form: str) -> Path:
    return folder / file_names(form)["transformer"]


def load(path: Path, precision: Precision, home: str = "loose") -> Expert:
    device, packed = HOMES[home]
    expert = Expert("high noise expert", open_expert_file(path), precision)
    for part in expert.parts:
        expert.bring(part, device, device, packed=packed)
    return expert


@lru_cache
def values_of(path: Path) -> dict[str, torch.Tensor]:
    return values_in(path, open_expert_file(path).config)


@pytest.fixture
def gpus() -> Iterator[ImaginedGpus]:
    with ImaginedGpus() as gpus:
        yield gpus


def precision_of(path: Path, choice: str = "default", *, on_gpu: bool = True) -> Precision:
    return resolve_precision(choice, open_expert_file(path).stored_dtype, on_gpu=on_gpu)[0]


# ---- as the file has it


@pytest.mark.parametrize("home", ON_HOST)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_value_is_the_files(tiny_single_files: Path, form: str, dtype: torch.dtype, home: str) -> None:
    """Matrices in few bits stay what they are; everything else is rounded once, but for diffusers' exceptions, which are float32."""
    path = file_of(tiny_single_files, form)
    expert = load(path, Precision(dtype, dtype, precision_of(path).as_stored), home)
    matrices = block_matrices(expert.model)
    assert {kept.dtype for name, kept in held(expert).items() if name in matrices} == {KEPT.get(form, dtype)}
    exceptions = set(expert.model._keep_in_fp32_modules)
    used = in_use(expert, dtype)
    for name, value in values_of(path).items():
        expected, got = value if exceptions.intersection(name.split(".")) else value.to(dtype), used[name]
        assert got.dtype == expected.dtype
        if form.startswith("gguf_q") and name in matrices:  # widened by other code than the reference
            torch.testing.assert_close(got.float(), expected.float(), rtol=max(1e-6, torch.finfo(dtype).eps), atol=1e-7, msg=name)
        else:
            assert torch.equal(got, expected), name


# ---- as was chosen


@pytest.mark.parametrize("choice", ["bf16", "fp16", "int8", "fp8_e4m3fn"])
@pytest.mark.parametrize("form", FORMS)
def test_other_precisions_of_any_file(tiny_single_files: Path, form: str, choice: str) -> None:
    path = file_of(tiny_single_files, form)
    precision = precision_of(path, choice)
    storage = {"bf16": BF16, "fp16": F16, "int8": INT8, "fp8_e4m3fn": FP8}[choice]
    assert precision == Precision(precision.dtype, storage) and (storage.itemsize == 1 or precision.dtype == storage)
    expert, values = load(path, precision), values_of(path)
    kept = held(expert)
    for name in block_matrices(expert.model):
        assert kept[name].dtype == storage
        stored = expert.files.tensors[name]
        if storage.itemsize > 1:
            torch.testing.assert_close(kept[name], values[name].to(storage), rtol=0 if "gguf" not in form else 1e-2, atol=0, msg=name)
            continue
        if KEPT.get(form) == storage:  # it is so already, and must not be rounded again
            assert torch.equal(kept[name].float() * kept[f"{name}_scale"], values[name])
            continue
        own = gguf_widened(path)[name] if stored.gguf_type else values[name].to(precision.dtype)
        expected, scale = quantized_rows(own, storage)
        assert torch.equal(kept[name].float(), expected.float()) and torch.equal(kept[f"{name}_scale"], scale), name


@lru_cache
def gguf_widened(path: Path) -> dict[str, torch.Tensor]:
    """By the engine; the package's own code differs in the last bit, which quantizing makes a step."""
    return in_use(load(path, precision_of(path)), BF16)


@pytest.mark.parametrize(("form", "choice"), [("original_bf16", "int8"), ("fp8_scaled_old", "default"), ("gguf_q4_k", "fp8_e4m3fn")])
def test_homes_hold_the_same(tiny_single_files: Path, form: str, choice: str, gpus: ImaginedGpus) -> None:
    """And whichever device converts."""
    path = file_of(tiny_single_files, form)
    first, *others = (held(load(path, precision_of(path, choice), home)) for home in HOMES)
    assert any(name.endswith("weight_scale") for name in first)
    assert all(same_bits(other, first) for other in others)


@pytest.mark.parametrize("choice", ["default", "bf16", "int8"])
@pytest.mark.parametrize("form", FORMS)
def test_lists_of_copies_are_alike(
    tiny_single_files: Path, form: str, choice: str, gpus: ImaginedGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some versions of torch take all of a list for what its first is; between devices nothing is converted, which they wait for."""
    path = file_of(tiny_single_files, form)
    copy, lists = torch._foreach_copy_, []

    def watched(targets: list[torch.Tensor], sources: list[torch.Tensor], *, non_blocking: bool) -> None:
        assert non_blocking
        pairs = zip(targets, sources, strict=True)
        lists.append({(to.device, to.dtype, of.device, of.dtype, to.stride() == of.stride()) for to, of in pairs})
        copy(targets, sources, non_blocking=non_blocking)

    monkeypatch.setattr(torch, "_foreach_copy_", watched)
    for home, converts in ((CPU, CPU), (CPU, LAZY), (LAZY, LAZY)):
        lists.clear()
        expert = Expert("high noise expert", open_expert_file(path), precision_of(path, choice))
        for part in expert.parts:
            expert.bring(part, home, converts, packed=True)
        assert lists
        for kinds in lists:
            ((to_device, to, of_device, of, _),) = kinds
            assert to_device == home and of_device == converts
            assert to == of or home == converts
        if form == "original_fp32" and choice == "bf16" and home == converts:
            assert (BF16, F32) in [(to, of) for kinds in lists for _, to, _, of, _ in kinds], "the copy converts"


@pytest.mark.parametrize(("form", "choice"), [("original_fp32", "bf16"), ("fp8_scaled_old", "default"), ("gguf_q4_k", "int8")])
def test_what_a_gpu_converts_for_the_host_is_there(tiny_single_files: Path, form: str, choice: str, gpus: ImaginedGpus) -> None:
    path = file_of(tiny_single_files, form)
    expert, expected = (
        Expert("high noise expert", open_expert_file(path), precision_of(path, choice)),
        load(path, precision_of(path, choice)),
    )
    for part in expert.parts:
        expert.bring(part, CPU, LAZY, packed=False)
    assert same_bits(held(expert), held(expected))
    assert {tensor.device for part in expert.parts for tensor in expert._holder.held(part).values()} == {CPU}


def test_no_more_is_made_than_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is copied to where it is kept; nobody knows it then."""
    monkeypatch.setattr(keeping, "WAITING_BYTES", 2500)
    made: list[weakref.ref[torch.Tensor]] = []
    living: list[int] = []

    def step(number: int) -> keeping._Step:
        def make(raws: list[torch.Tensor]) -> dict[str, torch.Tensor]:
            tensor = torch.full((1000,), number, dtype=torch.uint8)
            made.append(weakref.ref(tensor))
            living.append(sum(one() is not None for one in made))
            return {str(number): tensor}

        return keeping._Step(str(number), (), make)

    filling = keeping.Filling({str(number): torch.zeros(1000, dtype=torch.uint8) for number in range(8)}, unconverted=1)
    keeping._Batch(filling, [step(number) for number in range(8)], {}, Reading()).convert()
    assert living == [1, 2, 3, 1, 2, 3, 1, 2] and not any(one() is not None for one in made)
    assert all((filling.views[str(number)] == number).all() for number in range(8)) and not filling.unconverted


# ---- reading once, and memory


@pytest.mark.parametrize("choice", ["default", "bf16", "int8"])
@pytest.mark.parametrize("form", FORMS)
def test_each_tensor_is_read_once(tiny_single_files: Path, form: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_of(tiny_single_files, form)
    reads = watch_reads(monkeypatch)
    for home in ON_HOST:
        reads.clear()
        expert = load(path, precision_of(path, choice), home)
        stored = list(expert.files.tensors.values())
        assert Counter(read.key for read in reads) == Counter([one.key for one in stored] + [one.scale.key for one in stored if one.scale])


def test_each_tensor_is_read_once_to_a_gpu(tiny_single_files: Path, gpus: ImaginedGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = watch_reads(monkeypatch)
    for form in ("original_fp16", "int8_scaled", "gguf_q4_k"):
        reads.clear()
        path = file_of(tiny_single_files, form)
        expert = load(path, precision_of(path), "on a GPU")
        assert {key: count for key, count in Counter(read.key for read in reads).items() if count > 1} == {}
        assert {stored.key for stored in expert.files.tensors.values()} <= {read.key for read in reads}


@pytest.mark.parametrize("choice", ["default", "int8"])
@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("diffusers_bf16", "prefixed_bf16", "fp8_scaled_metadata")])
def test_what_is_said_is_what_is_held(tiny_single_files: Path, form: str, choice: str, gpus: ImaginedGpus) -> None:
    path = file_of(tiny_single_files, form)
    expert = Expert("high noise expert", open_expert_file(path), precision_of(path, choice))
    sizes = expert.sizes()
    assert list(sizes) == expert.parts and gpus.live_bytes(0) == 0
    rotary = sum(buffer.nbytes for buffer in expert.model.rope.buffers())
    for part, size in sizes.items():
        before = gpus.live_bytes(0)
        expert.bring(part, LAZY, LAZY)
        assert gpus.live_bytes(0) - before == size + (rotary if part == "rope" else 0), part
        own = [p.nbytes for name, p in expert.model.named_parameters() if name == part or name.startswith(f"{part}.")]
        assert sum(own) <= size <= sum(own) + 16 * len(own), "no more than alignment wants"
    assert expert.sizes() == sizes and expert.resident_bytes(LAZY) == sum(sizes.values())
    assert expert.largest_block_bytes == max(size for part, size in sizes.items() if part.startswith("blocks."))
    for part in expert.parts:
        expert.drop(part)
    assert gpus.live_bytes(0) == rotary and expert.resident_bytes(LAZY) == 0


def test_few_bits_take_the_room_they_take_in_the_file(tiny_single_files: Path) -> None:
    for form, bits in (("fp8_scaled_old", 8), ("gguf_q8_0", 8.5), ("gguf_q4_0", 4.5)):
        path = file_of(tiny_single_files, form)
        expert = Expert("high noise expert", open_expert_file(path), precision_of(path))
        matrices = sum(expert.files.tensors[name].elements for name in block_matrices(expert.model) if name.startswith("blocks.0."))
        assert 1 <= expert.part_bytes("blocks.0") / (matrices * bits / 8) < 1.06


@pytest.mark.parametrize("form", FORMS)
def test_what_is_cheap_to_read_again(tiny_single_files: Path, form: str) -> None:
    """A block that is kept as its file has it needs no copy in system memory."""
    path = file_of(tiny_single_files, form)
    for choice in ("default", "bf16", "fp16", "int8", "fp8_e4m3fn"):
        precision = precision_of(path, choice)
        kept = {"default": KEPT.get(form, precision.dtype)}.get(choice, precision.storage_dtype)
        stored = KEPT.get(form) or {"fp32": F32, "fp16": F16, "bf16": BF16}[form.split("_")[-1]]
        cheap = Expert("high noise expert", open_expert_file(path), precision).is_cheap_to_read("blocks.1")
        assert cheap == (kept == stored), choice


# ---- scales in unusual places


def rewritten(folder: Path, target: Path, changes: dict[str, torch.Tensor]) -> ComponentFiles:
    """An fp8 file with other tensors."""
    save_file({**load_file(file_of(folder, "fp8_scaled_old")), **changes}, target)
    return open_expert_file(target)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_a_scale_beside_what_is_wide(tiny_single_files: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Kept in the precision it is stored in, or in another one: it is multiplied all the same."""
    raw = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)).to(F16)
    scale = torch.rand(256, 1, generator=torch.Generator().manual_seed(2))
    changes = {"blocks.1.self_attn.q.weight": raw, "blocks.1.self_attn.q.scale_weight": scale}
    files = rewritten(tiny_single_files, tmp_path / "a.safetensors", changes)
    expert = Expert("high noise expert", files, Precision(dtype, dtype, "F8_E4M3"))
    for packed in (False, True):
        expert.bring("blocks.1", CPU, CPU, packed=packed)
        got, expected = in_use(expert, dtype)[f"{PROJECTION}.weight"], raw.float() * scale
        torch.testing.assert_close(got.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["blocks.1.self_attn.q.weight"], raw), "the file stays"


@pytest.mark.parametrize("home", ON_HOST)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (256,), (256, 1)], ids=str)
def test_scales_of_any_shape(tiny_single_files: Path, tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype, home: str) -> None:
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.5
    files = rewritten(tiny_single_files, tmp_path / "a.safetensors", {"blocks.1.self_attn.q.scale_weight": scale.to(dtype)})
    raw = load_file(tmp_path / "a.safetensors")["blocks.1.self_attn.q.weight"].float()
    expert = Expert("high noise expert", files, Precision(F32, F32, "F8_E4M3"))
    expert.bring("blocks.1", CPU, CPU, packed=HOMES[home][1])
    assert held(expert)[f"{PROJECTION}.weight_scale"].shape == (256, 1)
    assert torch.equal(in_use(expert, F32)[f"{PROJECTION}.weight"], raw * scale.to(dtype).float().reshape(-1, 1))


def test_a_scale_beside_a_vector_is_refused_or_used(tiny_single_files: Path, tmp_path: Path) -> None:
    """Nobody writes such files; if one is read, then rightly."""
    norm = torch.rand(256, generator=torch.Generator().manual_seed(4)).to(FP8)
    changes = {"blocks.1.self_attn.norm_q.weight": norm, "blocks.1.self_attn.norm_q.scale_weight": torch.tensor(2.0)}
    try:
        files = rewritten(tiny_single_files, tmp_path / "a.safetensors", changes)
    except CheckpointError:
        return
    expert = Expert("high noise expert", files, Precision(F32, F32, "F8_E4M3"))
    expert.bring("blocks.1", CPU, CPU)
    assert torch.equal(in_use(expert, F32)["blocks.1.attn1.norm_q.weight"], 2 * norm.float())


def test_stored_tensors_are_told_apart(tiny_single_files: Path) -> None:
    """The forms that this file is about are what their names say."""
    for form, kept in KEPT.items():
        stored: StoredTensor = open_expert_file(file_of(tiny_single_files, form)).tensors[f"{PROJECTION}.weight"]
        assert (stored.gguf_type is not None) == (kept == torch.uint8)
        assert (stored.scale is not None) == form.startswith(("fp8_scaled", "int8"))
