"""LoRA files in every form of keys say the same, and what the published ones for Wan 2.2 hold."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_loras import FACTOR, FORMS, expert_shapes, make_lora, write_lora, write_pair
from wan_sharded.engine.checkpoints.lora import LoraFile, check_fits, fitted, open_lora_file
from wan_sharded.engine.checkpoints.stored import StoredTensor
from wan_sharded.engine.errors import CheckpointError

EXPERT = "high noise expert"
SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8}


@pytest.fixture(scope="module")
def shapes(tiny_checkpoint: Path) -> dict[str, tuple[int, ...]]:
    return expert_shapes(tiny_checkpoint / "transformer")


def write_header(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], values: Mapping[str, bytes] = {}) -> Path:
    """A file of tensors that are all zeros but for ``values``, and that take no room on the disk."""
    header, offset = {}, 0
    for key, (dtype, shape) in tensors.items():
        size = math.prod(shape) * SIZES[dtype]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + offset)
        for key, value in values.items():
            file.seek(8 + len(raw) + header[key]["data_offsets"][0])
            file.write(value)
    return path


def read(stored: StoredTensor) -> torch.Tensor:
    with safe_open(stored.file, "pt") as file:
        return file.get_tensor(stored.key).float()


def added(lora: LoraFile) -> dict[str, torch.Tensor]:
    """Parameter -> what the file adds to it, as a weight of [out, everything else]."""
    found = {f"{m}.weight": pair.factor * read(pair.up).flatten(1) @ read(pair.down).flatten(1) for m, pair in lora.low_rank.items()}
    return {**found, **{name: read(stored) for name, stored in lora.differences.items()}}


@pytest.mark.parametrize("differences", [False, True], ids=["matrices", "with differences"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(form: str, differences: bool, shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    lora = open_lora_file(write_lora(tmp_path / "my lora.safetensors", shapes, form, rank=4, seed=7, differences=differences))
    matrices, whole = make_lora(shapes, rank=4, seed=7, differences=differences)
    assert lora.unmatched == ()
    assert lora.low_rank.keys() == matrices.keys() and lora.differences.keys() == whole.keys()
    assert {pair.factor for pair in lora.low_rank.values()} == {FACTOR if FORMS[form].alpha else 1.0}
    assert {pair.rank for pair in lora.low_rank.values()} == {4}
    there = added(lora)
    for module, (down, up) in matrices.items():
        torch.testing.assert_close(there[f"{module}.weight"], FACTOR * up.flatten(1) @ down.flatten(1), rtol=1e-6, atol=1e-7)
    for parameter, value in whole.items():
        assert torch.equal(there[parameter], value)
    check_fits(lora, shapes, EXPERT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_dtypes_of_matrices(dtype: torch.dtype, shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    lora = open_lora_file(write_lora(tmp_path / "a.safetensors", shapes, dtype=dtype))
    check_fits(lora, shapes, EXPERT)
    assert len({pair.down.dtype for pair in lora.low_rank.values()} | {stored.dtype for stored in lora.differences.values()}) == 1


Q = "diffusion_model.blocks.0.self_attn.q"
PAIR = {f"{Q}.lora_down.weight": torch.ones(4, 48), f"{Q}.lora_up.weight": torch.ones(48, 4)}
ALPHA_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int32]


@pytest.mark.parametrize("shape", [(), (1,)], ids=["number", "list of one"])
@pytest.mark.parametrize("dtype", ALPHA_DTYPES, ids=str)
def test_alphas_of_every_dtype(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    """lightx2v's are 64-bit integers; trainers write what they compute in."""
    save_file({**PAIR, f"{Q}.alpha": torch.full(shape, 6).to(dtype)}, tmp_path / "a.safetensors")
    assert open_lora_file(tmp_path / "a.safetensors").low_rank["blocks.0.attn1.to_q"].factor == 1.5


def test_an_alpha_of_zero_or_below(tmp_path: Path) -> None:
    for alpha in (0.0, -2.0):
        save_file({**PAIR, f"{Q}.alpha": torch.tensor(alpha)}, tmp_path / "a.safetensors")
        assert open_lora_file(tmp_path / "a.safetensors").low_rank["blocks.0.attn1.to_q"].factor == alpha / 4


def test_matrices_of_the_patch_embedding_may_be_flat(shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    out, *inside = shapes["patch_embedding.weight"]
    for down, up in [((2, *inside), (out, 2, 1, 1, 1)), ((2, *inside), (out, 2)), ((2, math.prod(inside)), (out, 2))]:
        save_file(
            {"patch_embedding.lora_down.weight": torch.ones(down), "patch_embedding.lora_up.weight": torch.ones(up)},
            tmp_path / "a.safetensors",
        )
        check_fits(open_lora_file(tmp_path / "a.safetensors"), shapes, EXPERT)


def test_a_changed_file_has_another_fingerprint(shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    before = open_lora_file(write_lora(tmp_path / "a.safetensors", shapes, rank=2))
    after = open_lora_file(write_lora(tmp_path / "a.safetensors", shapes, rank=3))
    assert before.path == after.path == tmp_path / "a.safetensors"
    assert before.fingerprint != after.fingerprint


def test_one_for_each_expert(tiny_checkpoint: Path, shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    high, low = (open_lora_file(file) for file in write_pair(tiny_checkpoint, tmp_path))
    assert high.low_rank.keys() == low.low_rank.keys() and "high_noise" in high.path.name and "low_noise" in low.path.name
    assert not torch.equal(added(high)["blocks.0.attn1.to_q.weight"], added(low)["blocks.0.attn1.to_q.weight"])


WIDTH, FFN, RANK, BLOCKS = 5120, 13824, 64, 40
MATRICES = {
    **{f"{attention}.{part}": (WIDTH, WIDTH) for attention in ("self_attn", "cross_attn") for part in "qkvo"},
    "ffn.0": (FFN, WIDTH),
    "ffn.2": (WIDTH, FFN),
}


def pair_of(name: str, size: tuple[int, int], dtype: str, rank: int = RANK) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {f"{name}.lora_down.weight": (dtype, (rank, size[1])), f"{name}.lora_up.weight": (dtype, (size[0], rank))}


def test_lightx2vs_first_loras_for_wan_22(tmp_path: Path) -> None:
    """wan2.2_i2v_lightx2v_4steps_lora_v1_*: rank 64 for the blocks' ten matrices, float32 (1.2 GB), alpha 8 as 64-bit integers, no more."""
    names = {f"diffusion_model.blocks.{block}.{part}": size for block in range(BLOCKS) for part, size in MATRICES.items()}
    alphas = {f"{name}.alpha": ("I64", ()) for name in names}
    matrices = {key: value for name, size in names.items() for key, value in pair_of(name, size, "F32").items()}
    file = write_header(tmp_path / "a.safetensors", {**alphas, **matrices}, dict.fromkeys(alphas, struct.pack("<q", 8)))
    lora = open_lora_file(file)
    assert 1.2e9 < file.stat().st_size < 1.3e9
    assert len(lora.low_rank) == 400 and not lora.differences and lora.unmatched == ()
    assert {pair.factor for pair in lora.low_rank.values()} == {0.125}
    check_fits(lora, real_shapes(), EXPERT)


def test_lightx2vs_extracted_loras(tmp_path: Path) -> None:
    """As tools/extract/lora_extractor.py writes them (Wan2.2-Distill-Loras, and those for Wan 2.1 that people use for Wan 2.2 as well).

    Matrices of a million values or more by low rank, without alpha; everything else as a whole. Those for Wan 2.1 have its image layers too,
    and so have some that are named 2.2.
    """
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    layers = {"text_embedding.0": (WIDTH, 4096), "text_embedding.2": (WIDTH, WIDTH), "time_embedding.0": (WIDTH, 256)}
    layers |= {"time_embedding.2": (WIDTH, WIDTH), "time_projection.1": (6 * WIDTH, WIDTH)}
    layers |= {f"blocks.{block}.{part}": size for block in range(BLOCKS) for part, size in MATRICES.items()}
    for name, size in layers.items():
        tensors |= {**pair_of(f"diffusion_model.{name}", size, "BF16"), f"diffusion_model.{name}.diff_b": ("BF16", size[:1])}
    for block in range(BLOCKS):
        path = f"diffusion_model.blocks.{block}"
        tensors |= {f"{path}.{a}.{norm}.diff": ("BF16", (WIDTH,)) for a in ("self_attn", "cross_attn") for norm in ("norm_q", "norm_k")}
        tensors |= {f"{path}.norm3.diff": ("BF16", (WIDTH,)), f"{path}.norm3.diff_b": ("BF16", (WIDTH,))}
        tensors |= {f"{path}.diff_m": ("BF16", (1, 6, WIDTH))}
    tensors |= {"diffusion_model.head.head.diff": ("BF16", (64, WIDTH)), "diffusion_model.head.head.diff_b": ("BF16", (64,))}
    tensors |= {"diffusion_model.head.diff_m": ("BF16", (1, 2, WIDTH)), "diffusion_model.patch_embedding.diff_b": ("BF16", (WIDTH,))}
    tensors |= {"diffusion_model.patch_embedding.diff": ("BF16", (WIDTH, 36, 1, 2, 2))}
    of_wan_21 = {
        "diffusion_model.img_emb.proj.0.diff": ("BF16", (1280,)),
        "diffusion_model.blocks.0.cross_attn.norm_k_img.diff": ("BF16", (WIDTH,)),
    }
    of_wan_21 |= pair_of("diffusion_model.blocks.0.cross_attn.k_img", (WIDTH, WIDTH), "BF16")
    lora = open_lora_file(write_header(tmp_path / "a.safetensors", {**tensors, **of_wan_21}))
    assert set(lora.unmatched) == set(of_wan_21)
    assert {pair.factor for pair in lora.low_rank.values()} == {1.0}
    # All parameters that there are: 10 matrices a block and 5 outside, the rest as a whole.
    assert len(lora.low_rank) == 405
    assert {f"{module}.weight" for module in lora.low_rank} | set(lora.differences) == set(real_shapes())
    check_fits(lora, real_shapes(), EXPERT)


def real_shapes() -> dict[str, tuple[int, ...]]:
    """The parameters of a real expert, from diffusers."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        expert = WanTransformer3DModel(in_channels=36)
    return {name: tuple(parameter.shape) for name, parameter in expert.named_parameters()}


def test_one_that_changes_only_a_weight_of_other_channels(tmp_path: Path) -> None:
    """Of a LoRA for text to video nothing would be left."""
    shapes = real_shapes()
    path = write_header(tmp_path / "a.safetensors", {"diffusion_model.patch_embedding.diff": ("BF16", (WIDTH, 16, 1, 2, 2))})
    with pytest.raises(CheckpointError, match=r"a.safetensors is for a model that takes 16 channels"):
        fitted(open_lora_file(path), shapes, EXPERT)
    more = {
        "diffusion_model.patch_embedding.diff": ("BF16", (WIDTH, 16, 1, 2, 2)),
        "diffusion_model.blocks.0.norm3.diff": ("BF16", (WIDTH,)),
    }
    assert fitted(open_lora_file(write_header(path, more)), shapes, EXPERT).unmatched == ("diffusion_model.patch_embedding.diff",)
