"""A block's weights in one piece of memory: the same bits come out, quantized tensors included, and nothing is copied to read them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from imagined_gpus import ImaginedGpus
from wan_sharded.engine.checkpoints.diffusers_folder import HIGH_NOISE, open_diffusers_folder
from wan_sharded.engine.transformer.wan_block import QKV, TEXT_KV, fused_name
from wan_sharded.engine.weights.expert import CPU, TOGETHER, Expert
from wan_sharded.engine.weights.moving import inner_tensors
from wan_sharded.engine.weights.packing import Layout, take_apart
from wan_sharded.engine.weights.precision import Precision, quantized_weight

F32, BF16, INT8, FP8 = torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn
LAZY = torch.device("lazy:0")
# What kernels read at a time.
ALIGNED = 16


def mixed() -> dict[str, torch.Tensor]:
    """Shapes and dtypes that leave gaps: 0-d, odd sizes, an empty one, one that is not contiguous."""
    generator = torch.Generator().manual_seed(5)
    return {
        "scale": torch.tensor(2.5),
        "odd": torch.randn(7, generator=generator).to(BF16),
        "flags": torch.tensor([1, -2, 3], dtype=INT8),
        "matrix": torch.randn(6, 5, generator=generator),
        "turned": torch.randn(5, 6, generator=generator).t(),
        "empty": torch.empty(0, 4),
        "count": torch.tensor(-(2**40), dtype=torch.int64),
        "table": torch.randn(1, 6, 3, generator=generator, dtype=torch.float64),
    }


def memory(layout: Layout) -> torch.Tensor:
    """Full of what no weight is, so that what is not filled shows."""
    return torch.full((layout.total_bytes,), 255, dtype=torch.uint8)


def offset(tensor: torch.Tensor, flat: torch.Tensor) -> int:
    return tensor.data_ptr() - flat.data_ptr()


# ---- plain tensors


def test_what_goes_in_comes_out() -> None:
    tensors = mixed()
    layout = Layout(tensors)
    flat = memory(layout)
    layout.fill(flat, tensors)
    bound = layout.bind(flat)
    assert bound.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert bound[name].dtype == tensor.dtype and bound[name].shape == tensor.shape, name
        assert torch.equal(bound[name], tensor), name


def test_bound_tensors_are_the_memory() -> None:
    tensors = mixed()
    layout = Layout(tensors)
    flat = memory(layout)
    bound = layout.bind(flat)
    layout.fill(flat, tensors)
    assert torch.equal(bound["matrix"], tensors["matrix"]), "bound before it was filled"
    bound["matrix"].zero_()
    bound["scale"].fill_(1.0)
    again = layout.bind(flat)
    assert not again["matrix"].any() and again["scale"] == 1.0
    assert torch.equal(again["odd"], tensors["odd"]), "nobody else's bytes were touched"


def test_the_same_bytes_mean_the_same_anywhere() -> None:
    """Which is how a block travels: one copy of the bytes into another buffer, which may be longer."""
    tensors = mixed()
    layout = Layout(tensors)
    flat, other = memory(layout), torch.zeros(layout.total_bytes + 64, dtype=torch.uint8)
    layout.fill(flat, tensors)
    other[: layout.total_bytes].copy_(flat)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in layout.bind(other).items())


def test_every_tensor_is_aligned_and_none_overlaps() -> None:
    tensors = mixed()
    layout = Layout(tensors)
    flat = memory(layout)
    spans = sorted((offset(t, flat), offset(t, flat) + t.numel() * t.itemsize) for t in layout.bind(flat).values() if t.numel())
    assert all(begin % ALIGNED == 0 for begin, _ in spans)
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))
    assert spans[-1][1] <= layout.total_bytes and layout.total_bytes % ALIGNED == 0
    assert layout.total_bytes <= sum(t.numel() * t.itemsize for t in tensors.values()) + ALIGNED * len(tensors)


def test_filling_one_leaves_the_others() -> None:
    tensors = mixed()
    layout = Layout(tensors)
    flat = memory(layout)
    layout.fill_one(flat, "odd", tensors["odd"])
    bound = layout.bind(flat)
    assert torch.equal(bound["odd"], tensors["odd"])
    assert bound["matrix"].isnan().all() and torch.equal(bound["flags"], torch.tensor([-1, -1, -1], dtype=INT8))


def test_a_tensor_of_another_shape_is_refused() -> None:
    layout = Layout(mixed())
    with pytest.raises(RuntimeError):
        layout.fill_one(memory(layout), "matrix", torch.zeros(6, 4))


def test_layouts_are_compared_by_places() -> None:
    tensors = mixed()
    assert Layout(tensors).same_as(Layout({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}))
    assert not Layout(tensors).same_as(Layout({**tensors, "odd": torch.zeros(8, dtype=BF16)}))
    assert not Layout(tensors).same_as(Layout({**tensors, "odd": torch.zeros(7, dtype=torch.float16)}))
    assert not Layout(tensors).same_as(Layout({**tensors, "more": torch.zeros(1)}))
    groups = [("q+k", ("matrix", "turned"))]
    swapped = {**tensors, "turned": torch.zeros(4, 5)}
    assert not Layout(swapped).same_as(Layout(swapped, groups)), "other places"


# ---- several tensors as one


def qkv(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    tensors = {"norm": torch.randn(3, generator=generator)}
    tensors |= {name: torch.randn(3, 5, generator=generator) for name in "qkv"}
    return {**tensors, **changes}


def test_a_whole_shares_memory_with_its_members() -> None:
    tensors = qkv()
    layout = Layout(tensors, [("q+k+v", ("q", "k", "v"))])
    flat = memory(layout)
    layout.fill(flat, tensors)
    bound = layout.bind(flat)
    assert bound.keys() == {*tensors, "q+k+v"}
    assert torch.equal(bound["q+k+v"], torch.cat([tensors[name] for name in "qkv"]))
    assert offset(bound["q+k+v"], flat) == offset(bound["q"], flat)
    assert offset(bound["q+k+v"], flat) % ALIGNED == 0
    bound["k"].zero_()
    assert not bound["q+k+v"][3:6].any() and bound["q+k+v"][[0, 1, 2, 6, 7, 8]].all()
    assert torch.equal(bound["norm"], tensors["norm"])


def test_members_may_differ_in_their_first_dimension() -> None:
    tensors = qkv(k=torch.randn(1, 5), v=torch.randn(2, 5))
    layout = Layout(tensors, [("q+k+v", ("q", "k", "v"))])
    flat = memory(layout)
    layout.fill(flat, tensors)
    assert torch.equal(layout.bind(flat)["q+k+v"], torch.cat([tensors[name] for name in "qkv"]))


@pytest.mark.parametrize(
    "changes",
    [
        {"k": torch.randn(3, 4)},
        {"k": torch.randn(3, 5).to(BF16)},
        {"q": torch.tensor(1.0), "k": torch.tensor(2.0), "v": torch.tensor(3.0)},
        {"k": quantized_weight(torch.randn(3, 5), INT8)},
    ],
    ids=["another shape", "another dtype", "no dimension", "quantized"],
)
def test_what_does_not_stack_stays_apart(changes: dict[str, torch.Tensor]) -> None:
    tensors = qkv(**changes)
    layout = Layout(tensors, [("q+k+v", ("q", "k", "v"))])
    flat = memory(layout)
    layout.fill(flat, tensors)
    bound = layout.bind(flat)
    assert bound.keys() == tensors.keys()
    assert torch.equal(bound["v"], tensors["v"])


def test_a_group_with_a_missing_member_stays_apart() -> None:
    """Layers without a bias."""
    assert Layout(qkv(), [("q+x", ("q", "x"))]).bind(memory(Layout(qkv()))).keys() == {"norm", "q", "k", "v"}


# ---- quantized tensors


@pytest.mark.parametrize("storage", [INT8, FP8], ids=["int8", "fp8_e4m3fn"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_quantized_tensors_come_out_as_they_went_in(storage: torch.dtype, dtype: torch.dtype) -> None:
    tensors = {"bias": torch.randn(9).to(dtype), "weight": quantized_weight(torch.randn(9, 7).to(dtype), storage)}
    layout = Layout(tensors)
    flat = memory(layout)
    layout.fill(flat, tensors)
    weight = layout.bind(flat)["weight"]
    assert type(weight) is type(tensors["weight"]) and weight.shape == (9, 7) and weight.dtype == dtype
    for got, expected in zip(inner_tensors(weight), inner_tensors(tensors["weight"]), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
        assert 0 <= offset(got, flat) < layout.total_bytes and offset(got, flat) % ALIGNED == 0
    x = torch.randn(2, 7).to(dtype)
    assert torch.equal(torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, tensors["weight"]))
    assert layout.total_bytes < 9 * 7 + 9 * dtype.itemsize * 2 + 4 * ALIGNED, "as small as the 8 bits are"


def test_a_quantized_tensor_over_other_bytes_is_another_one() -> None:
    """One bound tensor serves block after block, as its buffer is filled again."""
    first, second = (quantized_weight(torch.randn(8, 8), INT8) for _ in range(2))
    layout = Layout({"weight": first})
    flat = memory(layout)
    bound = layout.bind(flat)["weight"]
    for weight in (first, second, first):
        layout.fill(flat, {"weight": weight})
        assert torch.equal(bound.dequantize(), weight.dequantize())


def test_taking_apart() -> None:
    plain = torch.randn(2, 3)
    inner, rebuild = take_apart(plain)
    assert inner == [plain] and rebuild(iter(inner)) is plain
    weight = quantized_weight(torch.randn(4, 4), INT8)
    inner, rebuild = take_apart(weight)
    assert len(inner) >= 2 and not any(hasattr(piece, "__tensor_flatten__") for piece in inner)
    assert torch.equal(rebuild(iter([piece.clone() for piece in inner])).dequantize(), weight.dequantize())


# ---- a real block


@pytest.mark.parametrize("precision", [Precision(F32, F32), Precision(BF16, BF16), Precision(BF16, INT8)], ids=str)
def test_all_blocks_of_an_expert_lie_alike(tiny_checkpoint: Path, precision: Precision) -> None:
    """Else one buffer could not serve them all; and plain projections of one input are one matrix."""
    expert = Expert("high noise expert", open_diffusers_folder(tiny_checkpoint).experts[HIGH_NOISE], precision)
    loose = Expert("high noise expert", open_diffusers_folder(tiny_checkpoint).experts[HIGH_NOISE], precision)
    for part in ("blocks.0", "blocks.3"):
        expert.bring(part, CPU, CPU, packed=True)
        loose.bring(part, CPU, CPU)
        assert expert.packed(part) is not None and loose.packed(part) is None
        assert expert.block_layout(part).same_as(expert.block_layout("blocks.0"))
        assert expert.block_layout(part).same_as(Layout(loose.block_weights(part), TOGETHER))
        weights, plain = expert.block_weights(part), loose.block_weights(part)
        for name, tensor in plain.items():
            pairs = zip(inner_tensors(weights[name]), inner_tensors(tensor), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), name
        for names in (QKV, TEXT_KV):
            assert (f"{fused_name(names)}.weight" in weights) == (not precision.quantized)
            assert f"{fused_name(names)}.bias" in weights


def test_one_piece_travels_between_devices(make_checkpoint: Callable[..., Path]) -> None:
    folder = open_diffusers_folder(make_checkpoint())
    with ImaginedGpus() as gpus:
        expert = Expert("high noise expert", folder.experts[HIGH_NOISE], Precision(F32, F32))
        expert.bring("blocks.0", CPU, CPU, packed=True)
        before = {name: tensor.clone() for name, tensor in expert.block_weights("blocks.0").items()}
        expert.bring("blocks.0", LAZY, CPU)
        layout = expert.block_layout("blocks.0")
        assert gpus.live_bytes(0) == layout.total_bytes, "one piece, nothing beside it"
        expert.bring("blocks.0", CPU, CPU)
        assert gpus.live_bytes(0) == 0
        assert all(torch.equal(tensor, before[name]) for name, tensor in expert.block_weights("blocks.0").items())
