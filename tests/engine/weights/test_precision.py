"""What each weight_dtype means, that plain ones are diffusers' own, and how far the 8-bit ones are from float32."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers_reference import HostVae
from imagined_gpus import ImaginedGpus
from imagined_machine import imagined_machine
from tiny_single_files import file_names
from wan_sharded.engine.checkpoints.diffusers_folder import open_diffusers_folder
from wan_sharded.engine.checkpoints.stored import HIGH_NOISE, LOW_NOISE
from wan_sharded.engine.errors import InvalidRequestError, UnsupportedError
from wan_sharded.engine.handle import open_model
from wan_sharded.engine.owner import ModelOwner
from wan_sharded.engine.pipeline.image_to_video import ImageToVideo
from wan_sharded.engine.transformer.low_precision import quantized_rows, widened_rows
from wan_sharded.engine.weights.expert import CPU, Expert
from wan_sharded.engine.weights.precision import Precision, block_matrices, resolve_precision

F32, F16, BF16, INT8, FP8 = torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("choice", "stored", "on_gpu", "dtype", "storage"),
    [
        ("default", "BF16", True, BF16, BF16),
        ("default", "F16", True, F16, F16),
        ("default", "F32", True, BF16, BF16),
        ("default", "F32", False, F32, F32),
        ("default", "BF16", False, BF16, BF16),
        ("bf16", "F32", True, BF16, BF16),
        ("bf16", "F16", False, BF16, BF16),
        ("fp16", "BF16", True, F16, F16),
        ("fp32", "BF16", True, F32, F32),
        ("int8", "BF16", True, BF16, INT8),
        ("int8", "F32", True, BF16, INT8),
        ("int8", "F32", False, F32, INT8),
        ("int8", "F16", True, F16, INT8),
        ("fp8_e4m3fn", "F32", True, BF16, FP8),
        ("fp8_e4m3fn", "BF16", False, BF16, FP8),
        # From files in few bits.
        ("bf16", "F8_E4M3", True, BF16, BF16),
        ("fp16", "GGUF:Q4_K", True, F16, F16),
        ("int8", "F8_E4M3", True, BF16, INT8),
        ("int8", "GGUF:Q8_0", False, F32, INT8),
    ],
)
def test_what_a_choice_means(choice: str, stored: str, on_gpu: bool, dtype: torch.dtype, storage: torch.dtype) -> None:
    precision, notes = resolve_precision(choice, stored, on_gpu=on_gpu)
    assert precision == Precision(dtype, storage)
    assert bool(notes) == (choice == "default" and stored == "F32" and on_gpu), "what was not asked for is said"


@pytest.mark.parametrize(
    ("choice", "stored", "expected", "noted"),
    [
        ("default", "BF16", Precision(F16, F16), True),
        ("default", "F8_E4M3", Precision(F16, F16, as_stored="F8_E4M3"), True),
        ("default", "GGUF:Q4_K", Precision(F16, F16, as_stored="GGUF:Q4_K"), True),
        ("int8", "F32", Precision(F16, INT8), True),
        ("fp8_e4m3fn", "BF16", Precision(F16, FP8), True),
        ("fp16", "BF16", Precision(F16, F16), False),
        ("default", "F16", Precision(F16, F16), False),
    ],
)
def test_gpus_without_bf16_compute_in_fp16(choice: str, stored: str, expected: Precision, noted: bool) -> None:
    precision, notes = resolve_precision(choice, stored, on_gpu=True, without_bf16=["GPU 1 · RTX 2080 8 GB"])
    assert precision == expected
    assert [note[:21] for note in notes] == (["GPU 1 · RTX 2080 8 GB"] if noted else [])


@pytest.mark.parametrize("stored", ["F8_E4M3", "F8_E5M2", "I8", "GGUF:Q4_K"])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_few_bits_stay_as_they_are(stored: str, on_gpu: bool) -> None:
    compute = BF16 if on_gpu else F32
    assert resolve_precision("default", stored, on_gpu=on_gpu) == (Precision(compute, compute, as_stored=stored), ())


@pytest.mark.parametrize(
    ("stored", "compute", "as_stored", "noted"),
    [
        (("BF16", "F8_E4M3"), BF16, "F8_E4M3", 1),
        (("GGUF:Q4_K", "F16"), F16, "GGUF:Q4_K", 1),
        (("F32", "GGUF:Q8_0"), BF16, "GGUF:Q8_0", 2),
        (("F8_E4M3", "GGUF:Q8_0"), BF16, "F8_E4M3", 0),
        (("F16", "BF16"), F16, "", 1),
        (("F16", "F16"), F16, "", 0),
    ],
)
def test_experts_that_are_stored_differently(stored: tuple[str, str], compute: torch.dtype, as_stored: str, noted: int) -> None:
    precision, notes = resolve_precision("default", *stored, on_gpu=True)
    assert precision == Precision(compute, compute, as_stored)
    assert len(notes) == noted


@pytest.mark.parametrize(
    ("wide", "on_gpu", "compute"), [("BF16", False, BF16), ("F16", True, F16), ("F32", True, BF16), ("F32", False, F32)]
)
def test_a_wide_file_with_some_few_bits_is_computed_in_what_it_has(wide: str, on_gpu: bool, compute: torch.dtype) -> None:
    found = resolve_precision("default", "F8_E4M3", "F8_E4M3", on_gpu=on_gpu, beside=[wide, wide])
    assert found == (Precision(compute, compute, as_stored="F8_E4M3"), ())


def test_each_expert_is_kept_as_its_file_has_it(tiny_single_files: Path, make_request: Callable) -> None:
    high = tiny_single_files / file_names("original_bf16")[HIGH_NOISE]
    low = tiny_single_files / file_names("fp8_scaled_old")[LOW_NOISE]
    handle = open_model(tiny_single_files / "diffusers", high_noise_model=high, low_noise_model=low)
    owner = ModelOwner()
    with ImaginedGpus():
        vae = HostVae(tiny_single_files / "diffusers")
        result = ImageToVideo(owner, lambda: imagined_machine(1))(handle, make_request(), vae=vae)
        assert owner.loaded is not None
        kept = [expert.block_weights("blocks.0")["attn1.to_q.weight"].dtype for expert in owner.loaded.experts.values()]
        assert torch.isfinite(result.frames).all()
    assert kept == [BF16, FP8]
    assert "One expert's file has few bits and the other's has not" in result.placement


def test_names_for_people() -> None:
    assert str(Precision(BF16, BF16, "F8_E4M3")) == "fp8_e4m3fn (computing in bf16)"
    assert str(Precision(BF16, BF16, "GGUF:Q4_K")) == "GGUF Q4_K (computing in bf16)"
    assert str(Precision(BF16, INT8)) == "int8 (computing in bf16)"
    assert str(Precision(BF16, FP8)) == "fp8_e4m3fn (computing in bf16)"
    assert str(Precision(F16, F16)) == "fp16"


def test_unknown_choices() -> None:
    with pytest.raises(InvalidRequestError, match="weight_dtype is 'fp4'; choose one of default, bf16"):
        resolve_precision("fp4", "BF16", on_gpu=True)
    with pytest.raises(UnsupportedError, match="stored as F4, which this version does not read. Use a bf16"):
        resolve_precision("default", "F4", on_gpu=True)


def load(checkpoint: Path, precision: Precision) -> Expert:
    """The high noise expert, all of it on the CPU."""
    expert = Expert("high noise expert", open_diffusers_folder(checkpoint).experts["transformer"], precision)
    for part in expert.parts:
        expert.bring(part, CPU, CPU)
    return expert


def forward(model: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        return model(
            hidden_states=torch.randn(1, 36, 2, 6, 8, generator=generator).to(dtype),
            timestep=torch.tensor([700]),
            encoder_hidden_states=torch.randn(1, 20, 32, generator=generator).to(dtype),
            return_dict=False,
        )[0].float()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_plain_precisions_are_diffusers_own(tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    """The same exceptions in float32, and the same output to the last bit."""
    expert = load(tiny_checkpoint, Precision(dtype, dtype))
    theirs = WanTransformer3DModel.from_pretrained(tiny_checkpoint / "transformer", torch_dtype=dtype)
    assert {n: p.dtype for n, p in expert.model.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
    assert torch.equal(forward(expert.model, dtype), forward(theirs, dtype))


@pytest.mark.parametrize(("storage", "bound"), [(INT8, 0.02), (FP8, 0.06)], ids=["int8", "fp8_e4m3fn"])
def test_how_far_eight_bits_are(make_checkpoint: Callable[..., Path], storage: torch.dtype, bound: float) -> None:
    """Relative to float32, computing in float32 so that only the storage counts."""
    checkpoint = make_checkpoint(num_heads=8)
    exact = forward(load(checkpoint, Precision(F32, F32)).model, F32)
    quantized = forward(load(checkpoint, Precision(F32, storage)).model, F32)
    error = float((quantized - exact).norm() / exact.norm())
    assert 1e-4 < error < bound


@pytest.mark.parametrize("storage", [INT8, FP8], ids=["int8", "fp8_e4m3fn"])
def test_eight_bits_take_half(make_checkpoint: Callable[..., Path], storage: torch.dtype) -> None:
    checkpoint = make_checkpoint(num_heads=8)
    block = "blocks.0"
    experts = {kept: load(checkpoint, Precision(BF16, kept)) for kept in (BF16, storage)}
    sizes = {kept: expert.part_bytes(block) for kept, expert in experts.items()}
    assert sizes[storage] < 0.6 * sizes[BF16]
    held = sum(t.numel() * t.itemsize for t in experts[storage].block_weights(block).values())
    assert held <= sizes[storage] <= held + 16 * len(experts[storage].block_weights(block)), "what is said is what is held"


def test_only_the_blocks_are_quantized(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, Precision(BF16, INT8)).model
    plain = load(tiny_checkpoint, Precision(BF16, BF16)).model
    names = block_matrices(model)
    assert names == {n for n, p in plain.named_parameters() if n.startswith("blocks.") and n.endswith(".weight") and p.ndim == 2}
    dtypes = {name: p.dtype for name, p in model.named_parameters() if not name.endswith("weight_scale")}
    assert {dtypes[name] for name in names} == {INT8}
    assert {dtype for name, dtype in dtypes.items() if name not in names} == {BF16, F32}


# ---- scaled rows


@pytest.mark.parametrize(("storage", "bound"), [(INT8, 0.5 / 127), (FP8, 1 / 16), (torch.float8_e5m2, 1 / 8)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_rows_of_any_size_keep_their_values(storage: torch.dtype, bound: float, dtype: torch.dtype) -> None:
    """Rows that differ a million times in size, one of zeros, one of a single large value."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 64)[:, None]
    weight[5] = 0
    weight[7, 1:] *= 1e-4
    weight = weight.to(dtype)
    before = weight.clone()
    values, scale = quantized_rows(weight, storage)
    assert torch.equal(weight, before), "the caller's is not touched"
    assert values.dtype == storage and scale.dtype == F32 and scale.shape == (64, 1)
    wide = widened_rows(values, scale, F32)
    assert bool(torch.isfinite(wide).all()) and not wide[5].any()
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    # int8 is as coarse everywhere; float8 as coarse as the value is large, and as its smallest number.
    allowed = largest * bound if storage == INT8 else weight.float().abs() * bound + largest * 2**-14
    assert bool(((wide - weight.float()).abs() <= allowed * 1.01).all())


def test_widening_rounds_once() -> None:
    values, scale = quantized_rows(torch.randn(8, 32, generator=torch.Generator().manual_seed(4)), INT8)
    assert torch.equal(widened_rows(values, scale, BF16), (values.double() * scale.double()).to(F32).to(BF16))


@pytest.mark.usefixtures("steady_shares")
@pytest.mark.parametrize("weight_dtype", ["int8", "fp8_e4m3fn"])
def test_eight_bits_are_the_same_on_several_devices(tiny_checkpoint: Path, make_request: Callable, weight_dtype: str) -> None:
    """Quantized weights survive being moved, parked and fetched."""
    request = make_request(prompt_embeds=torch.ones(1, 3, 32), negative_prompt_embeds=torch.zeros(1, 1, 32))
    handle = open_model(tiny_checkpoint, weight_dtype=weight_dtype)
    with ImaginedGpus():
        one = ImageToVideo(ModelOwner(), lambda: imagined_machine(1))(handle, request, vae=HostVae(tiny_checkpoint)).frames
        for offload in ("auto", "cpu"):
            handle = open_model(tiny_checkpoint, weight_dtype=weight_dtype, offload=offload)
            engine = ImageToVideo(ModelOwner(), lambda: imagined_machine(2))
            for _ in range(2):
                frames = engine(handle, request, vae=HostVae(tiny_checkpoint)).frames
                assert torch.equal(frames, one)
