"""Files that are no LoRA for Wan 2.2, damaged, of a kind that cannot be added, or that do not fit: each gets the pack's own error."""

import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_loras import expert_shapes
from wan_sharded.engine.checkpoints.lora import check_fits, fitted, open_lora_file
from wan_sharded.engine.checkpoints.safetensors_header import MAX_HEADER_BYTES
from wan_sharded.engine.errors import CheckpointError

EXPERT = "high noise expert"
Q = "diffusion_model.blocks.0.self_attn.q"
PAIR = {f"{Q}.lora_down.weight": torch.ones(4, 48), f"{Q}.lora_up.weight": torch.ones(48, 4)}
WAN_14B = {
    "blocks.0.attn1.to_q.weight": (5120, 5120),
    "patch_embedding.weight": (5120, 36, 1, 2, 2),
    "patch_embedding.bias": (5120,),
}


def refused(tensors: Mapping[str, torch.Tensor], path: Path) -> str:
    save_file(dict(tensors), path)
    with pytest.raises(CheckpointError) as caught:
        open_lora_file(path)
    message = str(caught.value)
    assert path.name in message
    return message


UNSUPPORTED = {
    "LoHa": ["hada_w1_a", "hada_w2_b", "hada_t1"],
    "LoKr": ["lokr_w1", "lokr_w2_a", "lokr_t2"],
    "DoRA": ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"],
    "GLoRA": ["a1.weight", "b2.weight"],
    "OFT or BOFT": ["oft_blocks", "oft_R.weight"],
    "lora_mid": ["lora_mid.weight"],
    "lora_B.bias": ["lora_B.bias", "lora_B.default.bias"],
    "scaled fp8": ["lora_down.scale_weight", "lora_up.weight_scale"],
    "w_norm": ["w_norm", "b_norm"],
    "reshape_weight": ["reshape_weight"],
    "set_weight": ["set_weight"],
}


@pytest.mark.parametrize(("kind", "end"), [(kind, end) for kind, ends in UNSUPPORTED.items() for end in ends])
@pytest.mark.parametrize("name", [Q, "lora_unet_blocks_0_self_attn_q"])
@pytest.mark.parametrize("others", [PAIR, {}], ids=["beside a pair", "alone"])
def test_kinds_that_cannot_be_added(kind: str, end: str, name: str, others: dict, tmp_path: Path) -> None:
    message = refused({**others, f"{name}.{end}": torch.ones(4, 4)}, tmp_path / "a.safetensors")
    assert kind in message and f"{name}.{end}" in message and "plain matrices" in message


K = "diffusion_model.blocks.0.self_attn.k"
DOWN_KEY, UP_KEY = f"{K}.lora_down.weight", f"{K}.lora_up.weight"
DAMAGED = {
    "down without up": ({DOWN_KEY: torch.ones(4, 48)}, [DOWN_KEY, "lora_up"]),
    "up without down": ({UP_KEY: torch.ones(48, 4)}, [UP_KEY, "lora_down"]),
    "halves of two forms": ({DOWN_KEY: torch.ones(4, 48), f"{K}.lora_A.weight": torch.ones(4, 48)}, ["twice", DOWN_KEY, "lora_A"]),
    "other ranks": ({DOWN_KEY: torch.ones(4, 48), UP_KEY: torch.ones(48, 5)}, [DOWN_KEY, UP_KEY, "4 x 48", "48 x 5", "rank"]),
    "rank 0": ({DOWN_KEY: torch.ones(0, 48), UP_KEY: torch.ones(48, 0)}, [DOWN_KEY, "0 x 48"]),
    "rows": ({DOWN_KEY: torch.ones(48), UP_KEY: torch.ones(48)}, [DOWN_KEY, "no matrix"]),
    "an image's convolution": ({DOWN_KEY: torch.ones(4, 48, 3, 3), UP_KEY: torch.ones(48, 4, 1, 1)}, [DOWN_KEY, "no matrix"]),
    "an up matrix with a kernel": (
        {DOWN_KEY: torch.ones(4, 3, 1, 2, 2), UP_KEY: torch.ones(48, 4, 1, 2, 2)},
        [UP_KEY, "48 x 4 x 1 x 2 x 2"],
    ),
    "alpha nan": ({f"{Q}.alpha": torch.tensor(math.nan)}, [f"{Q}.alpha", "nan"]),
    "alpha inf": ({f"{Q}.alpha": torch.tensor(math.inf, dtype=torch.bfloat16)}, [f"{Q}.alpha", "inf"]),
    "many alphas": ({f"{Q}.alpha": torch.ones(4)}, [f"{Q}.alpha", "one number"]),
    "no alpha": ({f"{Q}.alpha": torch.ones(0)}, [f"{Q}.alpha", "one number"]),
    "alpha of a strange dtype": ({f"{Q}.alpha": torch.tensor(True)}, [f"{Q}.alpha", "BOOL"]),
    "int8": ({DOWN_KEY: torch.ones(4, 48, dtype=torch.int8), UP_KEY: torch.ones(48, 4)}, [DOWN_KEY, "I8", "BF16"]),
    "the other fp8": ({f"{K}.diff_b": torch.ones(48).to(torch.float8_e5m2)}, [f"{K}.diff_b", "F8_E5M2"]),
    "a pair and a difference": ({f"{Q}.diff": torch.ones(48, 48)}, [f"{Q}.diff", f"{Q}.lora_down.weight"]),
    "two spellings of one weight": (
        {"lora_unet_blocks_0_self_attn_q.lora_down.weight": torch.ones(4, 48)},
        ["twice", "lora_unet_blocks_0", Q],
    ),
    "two adapters": (
        {f"blocks.1.self_attn.q.lora_A.{name}.weight": torch.ones(4, 48) for name in ("one", "two")},
        ["twice", "lora_A.one", "lora_A.two"],
    ),
    "modulation twice": (
        {key: torch.ones(1, 6, 48) for key in ("diffusion_model.blocks.0.diff_m", "diffusion_model.blocks.0.modulation.diff")},
        ["twice", "diff_m", "modulation.diff"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files(damage: str, tmp_path: Path) -> None:
    tensors, words = DAMAGED[damage]
    message = refused({**PAIR, **tensors}, tmp_path / "a.safetensors")
    assert [word for word in words if word not in message] == []
    assert "Download it again" in message or "Choose another" in message, "and the remedy"


def test_an_alpha_without_matrices_says_nothing(tmp_path: Path) -> None:
    save_file({**PAIR, f"{K}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    assert open_lora_file(tmp_path / "a.safetensors").unmatched == (f"{K}.alpha",)


FLUX = "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
OTHER_FILES = {
    "a Stable Diffusion LoRA": (
        ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"],
        "Stable Diffusion",
    ),
    "a Flux LoRA": ([FLUX], "Flux"),
    "a Flux LoRA of diffusers": (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "Flux"),
    "a Flux control LoRA": (["double_blocks.0.img_attn.norm.key_norm.scale", "img_in.lora_A.weight"], "Flux"),
    "a Qwen-Image LoRA": (["transformer_blocks.0.attn.to_q.lora_A.default.weight"], "Qwen-Image"),
    "Wan 2.1's image layers": (["diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight"], "Wan 2.1"),
    "a Wan expert": (["blocks.0.self_attn.q.weight", "blocks.0.self_attn.q.scale_weight", "patch_embedding.weight"], "whole Wan model"),
    "a Wan expert of diffusers": (["blocks.0.attn1.to_q.weight"], "whole Wan model"),
    "a Wan expert of ComfyUI": (["model.diffusion_model.blocks.0.self_attn.q.weight"], "whole Wan model"),
    "UMT5": (["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"], "text encoder"),
    "Wan's own UMT5": (["token_embedding.weight", "blocks.0.attn.q.weight", "blocks.0.norm2.weight"], "text encoder"),
    "a VAE": (["decoder.middle.0.residual.0.gamma", "encoder.conv1.weight"], "VAE"),
    "an embedding": (["emb_params"], "emb_params"),
    "only alphas": ([f"{Q}.alpha"], Q),
    "no tensors": ([], "no tensors"),
}


@pytest.mark.parametrize("what", OTHER_FILES)
def test_other_files_are_named(what: str, tmp_path: Path) -> None:
    keys, word = OTHER_FILES[what]
    message = refused({key: torch.ones(4, 4) for key in keys}, tmp_path / "a.safetensors")
    assert word in message and ("Choose" in message or "Download" in message)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl", ".PT"])
def test_pickles_are_never_opened(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(CheckpointError, match=f"bad{suffix} is a pickled file.* safetensors"):
        open_lora_file(tmp_path / f"bad{suffix}")


def test_other_endings(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lora.gguf is no safetensors file"):
        open_lora_file(tmp_path / "lora.gguf")
    save_file(PAIR, tmp_path / "short.sft")
    assert open_lora_file(tmp_path / "short.sft").low_rank.keys() == {"blocks.0.attn1.to_q"}


BROKEN: dict[str, Callable[[Path], object]] = {
    "zero bytes": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "only half the header": lambda file: file.write_bytes(file.read_bytes()[:40]),
    "a huge header": lambda file: file.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + file.read_bytes()[8:]),
    "a pickle in disguise": lambda file: torch.save({}, file),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", BROKEN)
def test_broken_files(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(PAIR, file)
    BROKEN[damage](file)
    with pytest.raises(CheckpointError, match="a.safetensors.*ownload it again"):
        open_lora_file(file)


def test_a_lora_for_a_smaller_wan(tmp_path: Path) -> None:
    save_file({f"{Q}.lora_down.weight": torch.ones(4, 1536), f"{Q}.lora_up.weight": torch.ones(1536, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(
        CheckpointError, match=r"a.safetensors is for a model of width 1536, as Wan 2.1 1.3B has, the low noise expert has 5120\."
    ):
        check_fits(open_lora_file(tmp_path / "a.safetensors"), WAN_14B, "low noise expert")
    save_file({f"{Q}.diff_b": torch.ones(3072)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"width 3072, as Wan 2.2 5B has"):
        check_fits(open_lora_file(tmp_path / "b.safetensors"), WAN_14B, "low noise expert")


@pytest.fixture(scope="module")
def shapes(tiny_checkpoint: Path) -> dict[str, tuple[int, ...]]:
    return expert_shapes(tiny_checkpoint / "transformer")


MISFITS = {
    "text to video": ({"patch_embedding.diff": torch.ones(48, 16, 1, 2, 2)}, "takes 16 channels.* takes 36"),
    "text to video, low rank": (
        {"patch_embedding.lora_down.weight": torch.ones(2, 16, 1, 2, 2), "patch_embedding.lora_up.weight": torch.ones(48, 2, 1, 1, 1)},
        "takes 16 channels.* takes 36",
    ),
    "another kernel": (
        {"patch_embedding.lora_down.weight": torch.ones(2, 36, 1, 1, 4), "patch_embedding.lora_up.weight": torch.ones(48, 2)},
        "48 x 36 x 1 x 1 x 4, there it is 48 x 36 x 1 x 2 x 2",
    ),
    "more blocks": ({"blocks.5.self_attn.q.diff_b": torch.ones(48)}, r"changes blocks\.5\.attn1\.to_q\.bias, which .* does not have"),
    "wider inside": (
        {"blocks.0.ffn.0.lora_down.weight": torch.ones(2, 48), "blocks.0.ffn.0.lora_up.weight": torch.ones(97, 2)},
        "97 x 48, there it is 96 x 48",
    ),
    "transposed": ({"blocks.0.ffn.0.diff": torch.ones(48, 96)}, "48 x 96, there it is 96 x 48"),
    "a single row of the modulation": ({"blocks.0.diff_m": torch.ones(6, 48)}, "6 x 48, there it is 1 x 6 x 48"),
    "a pair for a norm": (
        {"blocks.0.norm3.lora_down.weight": torch.ones(2, 48), "blocks.0.norm3.lora_up.weight": torch.ones(48, 2)},
        "48 x 48, there it is 48",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit(misfit: str, shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    tensors, words = MISFITS[misfit]
    save_file(tensors, tmp_path / "a.safetensors")
    lora = open_lora_file(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"a.safetensors .*{words}.* Choose a LoRA made for Wan 2.2 I2V"):
        check_fits(lora, shapes, EXPERT)


PATCH = "diffusion_model.patch_embedding"


@pytest.mark.parametrize(
    "added",
    [
        {f"{PATCH}.diff": (5120, 16, 1, 2, 2)},
        {f"{PATCH}.lora_down.weight": (4, 16, 1, 2, 2), f"{PATCH}.lora_up.weight": (5120, 4, 1, 1, 1)},
    ],
    ids=["difference", "pair"],
)
def test_a_text_to_video_lora_is_taken_but_for_its_patch_embedding(tmp_path: Path, added: dict[str, tuple[int, ...]]) -> None:
    """People use them with image to video; only that one weight takes other channels."""
    tensors = {f"{Q}.lora_down.weight": torch.ones(4, 5120), f"{Q}.lora_up.weight": torch.ones(5120, 4)}
    save_file({**tensors, **{key: torch.ones(shape) for key, shape in added.items()}}, tmp_path / "a.safetensors")
    lora = open_lora_file(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="takes 16 channels|patch_embedding"):
        check_fits(lora, WAN_14B, "low noise expert")
    taken = fitted(lora, WAN_14B, "low noise expert")
    assert set(taken.low_rank) == {"blocks.0.attn1.to_q"} and not taken.differences
    assert set(taken.unmatched) == set(added)


def test_a_lora_that_fits_is_taken_whole(tmp_path: Path) -> None:
    tensors = {f"{PATCH}.lora_down.weight": torch.ones(4, 36, 1, 2, 2), f"{PATCH}.lora_up.weight": torch.ones(5120, 4, 1, 1, 1)}
    save_file({**tensors, f"{PATCH}.diff_b": torch.ones(5120)}, tmp_path / "a.safetensors")
    lora = open_lora_file(tmp_path / "a.safetensors")
    assert fitted(lora, WAN_14B, "high noise expert") == lora
