"""A block's weights in one piece of memory: the same bits come out, and nothing is copied to read them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from imagined_gpus import ImaginedGpus
from wan_sharded.engine.checkpoints.diffusers_folder import open_diffusers_folder
from wan_sharded.engine.checkpoints.stored import HIGH_NOISE
from wan_sharded.engine.transformer.wan_block import FUSED, fused_name
from wan_sharded.engine.weights.expert import CPU, Expert
from wan_sharded.engine.weights.packing import Layout, Spec
from wan_sharded.engine.weights.precision import Precision

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


def layout_of(tensors: dict[str, torch.Tensor], together: list = [], kinds: dict[str, str] | None = None) -> Layout:  # noqa: B006
    return Layout({name: Spec.of(tensor) for name, tensor in tensors.items()}, together, kinds)


def memory(layout: Layout) -> torch.Tensor:
    """Full of what no weight is, so that what is not filled shows."""
    return torch.full((layout.total_bytes,), 255, dtype=torch.uint8)


def offset(tensor: torch.Tensor, flat: torch.Tensor) -> int:
    return tensor.data_ptr() - flat.data_ptr()


# ---- plain tensors


def test_what_goes_in_comes_out() -> None:
    tensors = mixed()
    layout = layout_of(tensors)
    flat = memory(layout)
    layout.fill(flat, tensors)
    bound = layout.bind(flat)
    assert bound.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert bound[name].dtype == tensor.dtype and bound[name].shape == tensor.shape, name
        assert torch.equal(bound[name], tensor), name


def test_bound_tensors_are_the_memory() -> None:
    tensors = mixed()
    layout = layout_of(tensors)
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
    layout = layout_of(tensors)
    flat, other = memory(layout), torch.zeros(layout.total_bytes + 64, dtype=torch.uint8)
    layout.fill(flat, tensors)
    other[: layout.total_bytes].copy_(flat)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in layout.bind(other).items())


def test_every_tensor_is_aligned_and_none_overlaps() -> None:
    tensors = mixed()
    layout = layout_of(tensors)
    flat = memory(layout)
    spans = sorted((offset(t, flat), offset(t, flat) + t.numel() * t.itemsize) for t in layout.bind(flat).values() if t.numel())
    assert all(begin % ALIGNED == 0 for begin, _ in spans)
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))
    assert spans[-1][1] <= layout.total_bytes and layout.total_bytes % ALIGNED == 0
    assert layout.total_bytes <= sum(t.numel() * t.itemsize for t in tensors.values()) + ALIGNED * len(tensors)


def test_filling_one_leaves_the_others() -> None:
    tensors = mixed()
    layout = layout_of(tensors)
    flat = memory(layout)
    layout.view(flat, "odd").copy_(tensors["odd"])
    bound = layout.bind(flat)
    assert torch.equal(bound["odd"], tensors["odd"])
    assert bound["matrix"].isnan().all() and torch.equal(bound["flags"], torch.tensor([-1, -1, -1], dtype=INT8))


def test_a_tensor_of_another_shape_is_refused() -> None:
    layout = layout_of(mixed())
    with pytest.raises(RuntimeError):
        layout.view(memory(layout), "matrix").copy_(torch.zeros(6, 4))


def test_layouts_are_compared_by_places() -> None:
    tensors = mixed()
    assert layout_of(tensors).same_as(layout_of({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}))
    assert not layout_of(tensors).same_as(layout_of({**tensors, "odd": torch.zeros(8, dtype=BF16)}))
    assert not layout_of(tensors).same_as(layout_of({**tensors, "odd": torch.zeros(7, dtype=torch.float16)}))
    assert not layout_of(tensors).same_as(layout_of({**tensors, "more": torch.zeros(1)}))
    groups = [("q+k", ("matrix", "turned"))]
    swapped = {**tensors, "turned": torch.zeros(4, 5)}
    assert not layout_of(swapped).same_as(layout_of(swapped, groups)), "other places"


# ---- several tensors as one


def qkv(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    tensors = {"norm": torch.randn(3, generator=generator)}
    tensors |= {name: torch.randn(3, 5, generator=generator) for name in "qkv"}
    return {**tensors, **changes}


def test_a_whole_shares_memory_with_its_members() -> None:
    tensors = qkv()
    layout = layout_of(tensors, [("q+k+v", ("q", "k", "v"))])
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
    layout = layout_of(tensors, [("q+k+v", ("q", "k", "v"))])
    flat = memory(layout)
    layout.fill(flat, tensors)
    assert torch.equal(layout.bind(flat)["q+k+v"], torch.cat([tensors[name] for name in "qkv"]))


@pytest.mark.parametrize(
    "changes",
    [
        {"k": torch.randn(3, 4)},
        {"k": torch.randn(3, 5).to(BF16)},
        {"q": torch.tensor(1.0), "k": torch.tensor(2.0), "v": torch.tensor(3.0)},
    ],
    ids=["another shape", "another dtype", "no dimension"],
)
def test_what_does_not_stack_stays_apart(changes: dict[str, torch.Tensor]) -> None:
    tensors = qkv(**changes)
    layout = layout_of(tensors, [("q+k+v", ("q", "k", "v"))])
    flat = memory(layout)
    layout.fill(flat, tensors)
    bound = layout.bind(flat)
    assert bound.keys() == tensors.keys()
    assert torch.equal(bound["v"], tensors["v"])


def test_a_group_with_a_missing_member_stays_apart() -> None:
    """Layers without a bias."""
    assert layout_of(qkv(), [("q+x", ("q", "x"))]).bind(memory(layout_of(qkv()))).keys() == {"norm", "q", "k", "v"}


def test_members_of_a_kind_stay_apart() -> None:
    """GGUF's bytes mean something by their type only, which a whole would not have."""
    tensors = {name: torch.zeros(3, 34, dtype=torch.uint8) for name in "qkv"}
    kinds = {"q.gguf": "Q8_0"}
    layout = layout_of(tensors, [("q+k+v", ("q", "k", "v"))], kinds)
    assert layout.bind(memory(layout)).keys() == {*tensors, "q.gguf"}
    assert layout.bind(memory(layout))["q.gguf"] == "Q8_0"
    assert not layout.same_as(layout_of(tensors)), "the same places mean something else"


def test_a_span_is_where_a_tensor_stands() -> None:
    tensors = mixed()
    layout = layout_of(tensors)
    flat = memory(layout)
    flat[layout.span("odd")].copy_(tensors["odd"].view(torch.uint8))
    assert torch.equal(layout.view(flat, "odd"), tensors["odd"])


@pytest.mark.parametrize(
    ("parts", "there"), [(("b", "c"), True), (("a", "b", "c"), True), (("c", "b"), False), (("a", "c"), False), (("c", "d"), False)]
)
def test_a_group_may_be_part_of_one_before_it(parts: tuple[str, ...], there: bool) -> None:
    """Where its members lie one behind the other; else there is no whole of it, and all else is as before."""
    tensors = {name: torch.full((rows, 3), float(rows)) for rows, name in enumerate("abcd", 1)}
    specs = {name: Spec.of(tensor) for name, tensor in tensors.items()}
    layout = Layout(specs, [("all", ("a", "b", "c")), ("part", parts)])
    flat = torch.zeros(layout.total_bytes, dtype=torch.uint8)
    layout.fill(flat, tensors)
    bound = layout.bind(flat)
    assert torch.equal(bound["all"], torch.cat([tensors[name] for name in "abc"]))
    assert all(torch.equal(bound[name], tensor) for name, tensor in tensors.items())
    assert ("part" in bound) == there
    if there:
        assert torch.equal(bound["part"], torch.cat([tensors[name] for name in parts]))


# ---- a real block


@pytest.mark.parametrize("precision", [Precision(F32, F32), Precision(BF16, BF16), Precision(BF16, INT8), Precision(F32, FP8)], ids=str)
def test_all_blocks_of_an_expert_lie_alike(tiny_checkpoint: Path, precision: Precision) -> None:
    """So that one set of views serves them all; and projections of one input are one matrix, in few bits too."""
    expert = Expert("high noise expert", open_diffusers_folder(tiny_checkpoint).experts[HIGH_NOISE], precision)
    loose = Expert("high noise expert", open_diffusers_folder(tiny_checkpoint).experts[HIGH_NOISE], precision)
    for part in ("blocks.0", "blocks.3"):
        expert.bring(part, CPU, CPU, packed=True)
        loose.bring(part, CPU, CPU)
        assert expert.packed(part) is not None and loose.packed(part) is None
        assert expert.layout(part) is expert.layout("blocks.0")
        weights, plain = expert.block_weights(part), loose.block_weights(part)
        for name, tensor in plain.items():
            assert torch.equal(weights[name], tensor), name
        assert ("attn1.to_k", "attn1.to_v") in FUSED, "where several compute, queries are made by themselves"
        for names in FUSED:
            for kind in ("weight", "bias", *(["weight_scale"] if precision.quantized else [])):
                whole = weights[f"{fused_name(names)}.{kind}"]
                assert torch.equal(whole, torch.cat([plain[f"{name}.{kind}"] for name in names]))


def test_one_piece_travels_between_devices(make_checkpoint: Callable[..., Path]) -> None:
    folder = open_diffusers_folder(make_checkpoint())
    with ImaginedGpus() as gpus:
        expert = Expert("high noise expert", folder.experts[HIGH_NOISE], Precision(F32, F32))
        expert.bring("blocks.0", CPU, CPU, packed=True)
        before = {name: tensor.clone() for name, tensor in expert.block_weights("blocks.0").items()}
        expert.bring("blocks.0", LAZY, CPU)
        layout = expert.layout("blocks.0")
        assert gpus.live_bytes(0) == layout.total_bytes, "one piece, nothing beside it"
        expert.bring("blocks.0", CPU, CPU)
        assert gpus.live_bytes(0) == 0
        assert all(torch.equal(tensor, before[name]) for name, tensor in expert.block_weights("blocks.0").items())
