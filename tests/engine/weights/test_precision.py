"""What each weight_dtype means, that plain ones are diffusers' own, and how far the 8-bit ones are from float32."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from imagined_gpus import ImaginedGpus
from imagined_machine import imagined_machine
from wan_sharded.engine.checkpoints.diffusers_folder import open_diffusers_folder
from wan_sharded.engine.errors import InvalidRequestError, UnsupportedError
from wan_sharded.engine.handle import open_model
from wan_sharded.engine.owner import ModelOwner
from wan_sharded.engine.weights.expert import CPU, Expert
from wan_sharded.engine.weights.precision import Precision, parameter_dtypes, quantizable_weights, resolve_precision

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
    ],
)
def test_what_a_choice_means(choice: str, stored: str, on_gpu: bool, dtype: torch.dtype, storage: torch.dtype) -> None:
    precision, notes = resolve_precision(choice, stored, on_gpu=on_gpu)
    assert precision == Precision(dtype, storage)
    assert bool(notes) == (choice == "default" and stored == "F32" and on_gpu), "what was not asked for is said"


def test_names_for_people() -> None:
    assert str(Precision(BF16, INT8)) == "int8 (computing in bf16)"
    assert str(Precision(BF16, FP8)) == "fp8_e4m3fn (computing in bf16)"
    assert str(Precision(F16, F16)) == "fp16"


def test_unknown_choices() -> None:
    with pytest.raises(InvalidRequestError, match="weight_dtype is 'fp4'; choose one of default, bf16"):
        resolve_precision("fp4", "BF16", on_gpu=True)
    with pytest.raises(UnsupportedError, match="stored as F8_E4M3, which this version does not read. Use a bf16"):
        resolve_precision("default", "F8_E4M3", on_gpu=True)


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs a version that suits torch, so it may be there and not import."""
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UnsupportedError) as caught:
        resolve_precision("int8", "BF16", on_gpu=True)
    message = str(caught.value)
    assert "weight_dtype int8 needs the package torchao" in message
    assert torch.__version__ in message and "pip install torchao" in message and "choose bf16" in message
    assert resolve_precision("bf16", "BF16", on_gpu=True), "the rest works without it"


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
    sizes = {kept: load(checkpoint, Precision(BF16, kept)).part_bytes(block) for kept in (BF16, storage)}
    assert sizes[storage] < 0.6 * sizes[BF16]
    weight = load(checkpoint, Precision(BF16, storage)).model.blocks[0].attn1.to_q.weight
    inside = [getattr(weight.data, name) for name in weight.data.__tensor_flatten__()[0]]
    assert sum(tensor.numel() * tensor.itemsize for tensor in inside) < 0.6 * weight.numel() * 2


def test_only_the_blocks_are_quantized(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, Precision(BF16, INT8)).model
    names = quantizable_weights(model)
    assert names == {n for n, p in model.named_parameters() if n.startswith("blocks.") and n.endswith(".weight") and p.ndim == 2}
    dtypes = parameter_dtypes(model, Precision(BF16, INT8))
    assert {dtypes[name] for name in names} == {INT8}
    assert {dtype for name, dtype in dtypes.items() if name not in names} == {BF16, F32}


@pytest.mark.parametrize("weight_dtype", ["int8", "fp8_e4m3fn"])
def test_eight_bits_are_the_same_on_several_devices(tiny_checkpoint: Path, make_request: Callable, weight_dtype: str) -> None:
    """Quantized weights survive being moved, parked and fetched."""
    from diffusers_reference import HostVae
    from wan_sharded.engine.pipeline.image_to_video import ImageToVideo

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
