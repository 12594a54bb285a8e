"""Matrices in few bits: what they stand for, against float64 and the gguf package; products with them; what LoRAs add to a product."""

from typing import Any

import gguf
import numpy
import pytest
import torch
from diffusers.quantizers.gguf import utils as diffusers_gguf
from tiny_single_files import K_QUANTS
from wan_sharded.engine.checkpoints.gguf_file import widenable_types
from wan_sharded.engine.transformer import low_precision
from wan_sharded.engine.transformer.low_precision import LARGEST, multiplied_rows, quantized_rows, widened_gguf, widened_rows
from wan_sharded.engine.transformer.wan_block import QKV, _fused, _linear, fused_name

F32, F16, BF16, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.int8
FP8, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Where in a block the float16 scale lies, and where that of the minimum.
SCALES = {"Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q4_1": (0, 2), "Q5_1": (0, 2)} | {
    kind: tuple(at for at in places[:2] if at is not None) for kind, places in K_QUANTS.items()
}
GGUF_TYPES = sorted(SCALES)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- scaled rows (what rows of all sizes keep is in tests/engine/weights/test_precision.py)


@pytest.mark.parametrize("dtype", LARGEST)
def test_rows_are_the_same_whether_compiled_or_not(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their largest value is found in two ways."""
    weight = random(9, 80)
    weight[0], weight[1, 3], weight[2, 4], weight[3] = 0, -100, 100, -weight[3].abs()
    found = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        found.append(quantized_rows(weight, dtype))
    assert torch.equal(found[0][0].float(), found[1][0].float()) and torch.equal(found[0][1], found[1][1])
    weight[5, 6] = float("nan")
    assert quantized_rows(weight, dtype)[1][5].isnan()


@pytest.mark.parametrize("dtype", [INT8, FP8, E5M2], ids=str)
def test_every_value_becomes_the_nearest(dtype: torch.dtype) -> None:
    weight = random(200, 96) * torch.logspace(-30, 30, 200)[:, None]
    values, scale = quantized_rows(weight, dtype)
    assert torch.isfinite(values.float()).all(), "float8 has no room above its largest value"
    assert torch.equal(values.float().abs().amax(1), torch.full((200,), LARGEST[dtype])), "the whole range is used"
    grid = torch.arange(-127, 128) if dtype == INT8 else torch.arange(256, dtype=torch.uint8).view(dtype).float()
    grid = grid[torch.isfinite(grid)].double()
    wanted = weight.double() / scale.double()
    nearest = (wanted[..., None] - grid).abs().amin(-1)
    assert bool(((values.double() - wanted).abs() <= nearest + 1e-4).all())


def test_quantizing_what_was_quantized_changes_nothing() -> None:
    for dtype in (INT8, FP8):
        values, scale = quantized_rows(random(64, 80), dtype)
        again, scale_again = quantized_rows(widened_rows(values, scale, F32), dtype)
        assert torch.equal(again.float(), values.float())
        torch.testing.assert_close(scale_again, scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 16), (16, 1), (1, 16)], ids=str)
def test_matrices_of_any_size(shape: tuple[int, int]) -> None:
    values, scale = quantized_rows(random(*shape), INT8)
    assert values.shape == shape and scale.shape == (shape[0], 1)
    assert widened_rows(values, scale, BF16).shape == shape


@pytest.mark.parametrize("stored", [INT8, FP8, E5M2], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_widening_is_the_exact_product_rounded(stored: torch.dtype, dtype: torch.dtype) -> None:
    values, _ = quantized_rows(random(24, 40), stored)
    before = values.clone()
    for scale in (random(24, 1, seed=2).abs() * 1e-2, torch.tensor(0.0123), torch.tensor([[0.0123]]).expand(24, 1)):
        wide = widened_rows(values, scale, dtype)
        assert torch.equal(wide, (values.double() * scale.double()).float().to(dtype))
    assert torch.equal(values.float(), before.float()), "what is kept stays"


# ---- GGUF


def gguf_bytes(kind: str, rows: int, blocks: int, seed: int = 0) -> torch.Tensor:
    """Any bytes but for the scales, which are of all sizes and signs that float16 has near those of weights."""
    generator = numpy.random.default_rng(seed)
    size_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    data = generator.integers(0, 256, (rows, blocks, size_bytes), dtype=numpy.uint8)
    for at in SCALES[kind]:
        scales = (generator.standard_normal((rows, blocks, 1)) * 0.01).astype(numpy.float16)
        data[:, :, at : at + 2] = scales.view(numpy.uint8)
    return torch.from_numpy(data.reshape(rows, blocks * size_bytes))


def expected_of(data: torch.Tensor, kind: str) -> torch.Tensor:
    """By the format's own package."""
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]).astype("float32"))


def test_every_type_that_is_accepted_is_tested() -> None:
    assert widenable_types() == set(GGUF_TYPES)


@pytest.mark.parametrize("shape", [(1, 1), (7, 2), (16, 3), (0, 2)], ids=str)
@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_gguf_means_what_its_package_says(kind: str, shape: tuple[int, int]) -> None:
    data = gguf_bytes(kind, *shape)
    before = data.clone()
    wide = widened_gguf(data, kind, F32)
    values = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    assert wide.shape == (shape[0], shape[1] * values) and wide.is_contiguous()
    if shape[0]:
        torch.testing.assert_close(wide, expected_of(data, kind), rtol=1e-6, atol=1e-7)  # multiplied in another order
    assert torch.equal(data, before)
    for dtype in (F16, BF16):
        assert torch.equal(widened_gguf(data, kind, dtype), wide.to(dtype)), "widened in float32, rounded once"


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q6_K", "IQ4_XS"])
def test_gguf_in_chunks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are widened at a time: never more values than are allowed for, but for one row."""
    data = gguf_bytes(kind, 11, 2)
    whole = widened_gguf(data, kind, BF16)
    number = gguf.GGMLQuantizationType[kind]
    widen, counts = diffusers_gguf.dequantize_functions[number], []

    def counted(blocks: torch.Tensor, values: int, *arguments: Any) -> torch.Tensor:
        counts.append(blocks.shape[0] * values)
        return widen(blocks, values, *arguments)

    monkeypatch.setitem(diffusers_gguf.dequantize_functions, number, counted)
    width = whole.shape[1]
    for allowed, expected in ((1, 11), (width, 11), (int(2.5 * width), 6), (5 * width, 3), (10**9, 1)):
        counts.clear()
        monkeypatch.setattr(low_precision, "GGUF_CHUNK_VALUES", allowed)
        assert torch.equal(widened_gguf(data, kind, BF16), whole)
        assert len(counts) == expected and max(counts) <= max(allowed, width)


def test_gguf_where_it_lies_in_a_larger_piece() -> None:
    """As blocks do that travel: behind other tensors, at a multiple of 16 bytes."""
    for kind in GGUF_TYPES:
        data = gguf_bytes(kind, 5, 2)
        flat = torch.full((16 + data.numel() + 7,), 255, dtype=torch.uint8)
        view = flat[16 : 16 + data.numel()].view(data.shape)
        view.copy_(data)
        assert torch.equal(widened_gguf(view, kind, F32), widened_gguf(data, kind, F32)), kind


# ---- products of few bits


def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch does so on a CPU."""
    try:
        multiplied_rows(torch.ones(16, 32), torch.ones(16, 32).to(dtype), torch.ones(16, 1), None)
    except (RuntimeError, NotImplementedError):
        return False
    return True


@pytest.mark.parametrize("x_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("dtype", [INT8, FP8], ids=str)
@pytest.mark.parametrize("shape", [(1, 48), (5, 48), (2, 7, 48)], ids=str)
def test_products_are_as_far_off_as_the_activations_are_rounded(shape: tuple[int, ...], dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    """Every output may be off by what each rounded activation is off, times its weight: half a step of int8, or a 16th of a float8."""
    if not multiplies(dtype):
        pytest.skip(f"this torch does not multiply {dtype} on a CPU")
    x = random(*shape, seed=3).to(x_dtype)
    x[..., 5] *= 30
    x.view(-1, 48)[1:2] = 0  # a token without anything
    weight, scale = quantized_rows(random(32, 48, seed=4), dtype)
    for bias in (None, random(32, seed=5).to(x_dtype)):
        before = x.clone()
        got = multiplied_rows(x, weight, scale, bias)
        assert torch.equal(x, before) and got.dtype == x_dtype and got.shape == (*x.shape[:-1], 32)
        matrix = widened_rows(weight, scale, F32).double()
        exact = torch.nn.functional.linear(x.double(), matrix, None if bias is None else bias.double())
        step = x.float().abs().amax(-1, keepdim=True) / LARGEST[dtype]
        off = (step / 2).expand(x.shape) if dtype == INT8 else x.float().abs() / 16 + step * 2**-10
        rounding = 3 * torch.finfo(x_dtype).eps * (exact.abs() + (0 if bias is None else bias.double().abs()))
        allowed = off.double() @ matrix.abs().t() + rounding + 1e-5
        assert bool(((got.double() - exact).abs() <= allowed).all())
        assert bool(((got.double() - exact).abs() > rounding + 1e-5).any()), "they are rounded"


# ---- what LoRAs add, to matrices kept in any way


def kept(name: str, weight: torch.Tensor, kind: str) -> dict[str, Any]:
    """A matrix as "plain", "int8" or "Q8_0" weights of a block."""
    if kind == "int8":
        return dict(zip((f"{name}.weight", f"{name}.weight_scale"), quantized_rows(weight, INT8), strict=True))
    if kind == "Q8_0":
        data = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
        return {f"{name}.weight": torch.from_numpy(data), f"{name}.weight.gguf": "Q8_0"}
    return {f"{name}.weight": weight}


def wide(name: str, weights: dict[str, Any]) -> torch.Tensor:
    weight, scale = weights[f"{name}.weight"], weights.get(f"{name}.weight_scale")
    if f"{name}.weight.gguf" in weights:
        return expected_of(weight, weights[f"{name}.weight.gguf"])
    return weight if scale is None else weight.float() * scale


def projections(kinds: tuple[str, ...], ranked: set[str], width: int = 32) -> dict[str, Any]:
    """Three layers of one input; those in ``ranked`` with a LoRA. As one matrix where they are of one kind that can be joined."""
    weights: dict[str, Any] = {}
    for number, (name, kind) in enumerate(zip(QKV, kinds, strict=True)):
        weights |= kept(name, random(width, width, seed=number) / width**0.5, kind)
        weights[f"{name}.bias"] = random(width, seed=10 + number)
        if name in ranked:
            weights[f"{name}.lora_A"], weights[f"{name}.lora_B"] = random(3, width, seed=20 + number), random(width, 3, seed=30 + number)
    if len(set(kinds)) == 1 and "Q8_0" not in kinds:
        for part in ("weight", "weight_scale", "bias"):
            if f"{QKV[0]}.{part}" in weights:
                weights[f"{fused_name(QKV)}.{part}"] = torch.cat([weights[f"{name}.{part}"] for name in QKV])
    return weights


@pytest.mark.parametrize("tokens", [slice(0, 9), slice(2, 8), slice(4, 5)], ids=["all", "a range", "one"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("ranked", [set(QKV), {QKV[1]}, {QKV[0], QKV[2]}], ids=["all", "k", "q and v"])
@pytest.mark.parametrize("kinds", [("plain",) * 3, ("int8",) * 3, ("Q8_0",) * 3, ("plain", "Q8_0", "int8")], ids=str)
def test_loras_are_added_to_their_own_layer(kinds: tuple[str, ...], ranked: set[str], batch: int, tokens: slice) -> None:
    """Of a product of all three, the thirds are views with gaps; of a batch, the tokens are too. Weights stay what they are."""
    x = random(batch, 9, 32, seed=7)[:, tokens]
    weights = projections(kinds, ranked)
    before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in weights.items()}
    ways: list[dict[str, Any]] = [{}, {"multiply_few_bits": True}] if set(kinds) == {"int8"} and multiplies(INT8) else [{}]
    for way in ways:
        for name, got in zip(QKV, _fused({**weights, **way}, QKV, x), strict=True):
            # Rounded activations put every product of int8 off, by at most half a step each; what is added, never.
            loose = 0.0 if not way else float(x.abs().amax() / 127 / 2 * wide(name, weights).abs().sum(1).amax())
            expected = torch.nn.functional.linear(x, wide(name, weights), weights[f"{name}.bias"])
            if name in ranked:
                expected = expected + x @ weights[f"{name}.lora_A"].t() @ weights[f"{name}.lora_B"].t()
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 + loose)
            torch.testing.assert_close(_linear({**weights, **way}, name, x), got, rtol=1e-5, atol=2e-5)
    assert all(torch.equal(value, before[name]) for name, value in weights.items() if isinstance(value, torch.Tensor))
