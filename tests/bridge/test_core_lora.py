"""LoRA files as ComfyUI itself reads them: the same weights are changed, by the same values. On ComfyUI's own model of Wan, tiny."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_loras import FORMS, expert_shapes, wan_name, write_lora

cli_args = pytest.importorskip("comfy.cli_args", reason="put a ComfyUI folder on PYTHONPATH to run this")
if not torch.cuda.is_available():
    cli_args.args.cpu = True  # before comfy.model_management looks for a GPU

import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.ops  # noqa: E402
from comfy.ldm.wan.model import WanModel  # noqa: E402
from wan_sharded.engine.checkpoints.lora import LoraFile, check_fits, open_lora_file  # noqa: E402
from wan_sharded.engine.checkpoints.stored import StoredTensor  # noqa: E402

# ComfyUI 0.3.75 knows these; the others it leaves out key by key, with a line in the log each.
KNOWN_TO_CORE = ("lightx2v", "lightning", "diffusion-pipe", "kohya", "wan fun")
PREFIX = "diffusion_model."


class CoreModel(torch.nn.Module):
    """As much of ComfyUI's model of a Wan 2.2 I2V expert as its LoRA code asks for."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        width, channels = shapes["patch_embedding.weight"][:2]
        self.diffusion_model = WanModel(
            model_type="t2v",  # what ComfyUI calls every Wan without image layers
            in_dim=channels,
            dim=width,
            ffn_dim=shapes["blocks.0.ffn.net.0.proj.weight"][0],
            text_dim=shapes["condition_embedder.text_embedder.linear_1.weight"][1],
            num_heads=width // 16,
            num_layers=sum(name.endswith("attn1.to_q.weight") for name in shapes),
            operations=comfy.ops.disable_weight_init,
        )
        self.model_config = SimpleNamespace(unet_config={})


@pytest.fixture(scope="module")
def shapes(tiny_checkpoint: Path) -> dict[str, tuple[int, ...]]:
    return expert_shapes(tiny_checkpoint / "transformer")


@pytest.fixture(scope="module")
def core(shapes: dict[str, tuple[int, ...]]) -> CoreModel:
    return CoreModel(shapes)


def added_by_core(core: CoreModel, file: Path, strength: float = 1.0) -> dict[str, torch.Tensor]:
    """What ComfyUI adds to which weight, by Wan's names."""
    parameters = core.state_dict()
    key_map = comfy.lora.model_lora_keys_unet(core, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(load_file(file)), key_map)
    return {
        name.removeprefix(PREFIX): comfy.lora.calculate_weight(
            [(strength, patch, 1.0, None, None)], torch.zeros(parameters[name].shape), name
        )
        for name, patch in patches.items()
        if name in parameters  # as ModelPatcher.add_patches
    }


def read(stored: StoredTensor) -> torch.Tensor:
    with safe_open(stored.file, "pt") as file:
        return file.get_tensor(stored.key).float()


def added_by_us(lora: LoraFile, shapes: dict[str, tuple[int, ...]], strength: float = 1.0) -> dict[str, torch.Tensor]:
    """What our description says, by Wan's names."""
    added = {
        f"{module}.weight": pair.factor * (read(pair.up).flatten(1) @ read(pair.down).flatten(1)) for module, pair in lora.low_rank.items()
    }
    added |= {name: read(stored) for name, stored in lora.differences.items()}
    return {wan_parameter(name): strength * value.reshape(shapes[name]) for name, value in added.items()}


def wan_parameter(name: str) -> str:
    if name.endswith("scale_shift_table"):
        return wan_name(name)
    module, _, kind = name.rpartition(".")
    return f"{wan_name(module)}.{kind}"


def test_the_models_have_the_same_weights(core: CoreModel, shapes: dict[str, tuple[int, ...]]) -> None:
    there = {name.removeprefix(PREFIX): tuple(value.shape) for name, value in core.state_dict().items()}
    assert there == {wan_parameter(name): shape for name, shape in shapes.items()}


@pytest.mark.parametrize("strength", [1.0, -0.7])
@pytest.mark.parametrize("differences", [False, True], ids=["matrices", "with differences"])
@pytest.mark.parametrize("form", KNOWN_TO_CORE)
def test_the_same_weights_by_the_same_values(
    form: str, differences: bool, strength: float, core: CoreModel, shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    file = write_lora(tmp_path / "a.safetensors", shapes, form, differences=differences)
    lora = open_lora_file(file)
    check_fits(lora, shapes, "expert")
    theirs, ours = added_by_core(core, file, strength), added_by_us(lora, shapes, strength)
    # The one thing that ComfyUI leaves out, though lightx2v's own code adds it: ``diff_m``. See below.
    modulations = {name for name in ours if name.endswith("modulation")}
    assert len(modulations) == (6 if differences else 0)
    assert theirs.keys() == ours.keys() - modulations
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in KNOWN_TO_CORE])
def test_forms_that_core_does_not_know_mean_the_same(
    form: str, core: CoreModel, shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    """They are other spellings of a LoRA that it knows. Should a later ComfyUI read one of them, it must mean the same there."""
    ours = added_by_us(open_lora_file(write_lora(tmp_path / "a.safetensors", shapes, form, differences=False)), shapes)
    known = added_by_core(core, write_lora(tmp_path / "b.safetensors", shapes, "diffusion-pipe", differences=False))
    assert ours.keys() == known.keys()
    for name, value in {**known, **added_by_core(core, tmp_path / "a.safetensors")}.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_other_dtypes(dtype: torch.dtype, core: CoreModel, shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    file = write_lora(tmp_path / "a.safetensors", shapes, "lightx2v", dtype=dtype)
    ours = added_by_us(open_lora_file(file), shapes)
    for name, value in added_by_core(core, file).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_diff_m_is_the_modulation(core: CoreModel, shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    """Under its other name ComfyUI adds it."""
    file = write_lora(tmp_path / "a.safetensors", shapes, "lightx2v")
    ours = added_by_us(open_lora_file(file), shapes)
    save_file({key.replace(".diff_m", ".modulation.diff"): value for key, value in load_file(file).items()}, tmp_path / "b.safetensors")
    theirs = added_by_core(core, tmp_path / "b.safetensors")
    assert theirs.keys() == ours.keys() == added_by_us(open_lora_file(tmp_path / "b.safetensors"), shapes).keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7, msg=name)


def test_unmatched_keys_are_those_that_core_does_not_load(
    core: CoreModel, shapes: dict[str, tuple[int, ...]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = [
        f"{PREFIX}blocks.0.cross_attn.k_img.lora_down.weight",
        f"{PREFIX}blocks.0.cross_attn.k_img.lora_up.weight",
        f"{PREFIX}blocks.0.cross_attn.v_img.diff_b",
        f"{PREFIX}blocks.0.cross_attn.norm_k_img.diff",
        f"{PREFIX}img_emb.proj.1.diff_b",
        f"{PREFIX}img_emb.proj.4.diff",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        f"{PREFIX}vace_blocks.0.self_attn.q.lora_down.weight",
        f"{PREFIX}blocks.0.self_attn.q.lora_alpha",
    ]
    file = write_lora(tmp_path / "a.safetensors", shapes, "lightx2v")
    tensors = load_file(file)
    save_file({**tensors, **{key: torch.zeros(4, 4) for key in foreign}}, file)
    with caplog.at_level(logging.WARNING):
        added_by_core(core, file)
    left_out = {message.partition(": ")[2] for message in caplog.messages if message.startswith("lora key not loaded: ")}
    assert set(open_lora_file(file).unmatched) == left_out - {key for key in tensors if key.endswith(".diff_m")} == set(foreign)
