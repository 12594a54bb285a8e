"""The same single file, loaded by ComfyUI and by this pack, gives the same output, with LoRAs too. ComfyUI's model of Wan is an
independent implementation. Both compute in float32.

ComfyUI takes for granted that texts are 4096 wide, so the experts here are: two heads of 128, three blocks.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

cli_args = pytest.importorskip("comfy.cli_args", reason="put a ComfyUI folder on PYTHONPATH to run this")
if not torch.cuda.is_available():
    cli_args.args.cpu = True  # before comfy.model_management looks for a GPU

import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
from crews import expert_of, on_cpu, relative  # noqa: E402
from diffusers import WanTransformer3DModel  # noqa: E402
from expert_reference import TinyLora, Values, diffusers_model, merged, output, tiny_lora, values_in  # noqa: E402
from tiny_checkpoint import randomize  # noqa: E402
from tiny_single_files import original_name, write_expert_file  # noqa: E402
from wan_sharded.engine.checkpoints.single_file import open_expert_file  # noqa: E402
from wan_sharded.engine.weights.expert import Expert  # noqa: E402
from wan_sharded.engine.weights.precision import Precision, resolve_precision  # noqa: E402

F32, FP8 = torch.float32, torch.float8_e4m3fn
# Where the timestep's sines are computed exactly, only the order of sums differs. At large timesteps both round their arguments, to 3e-5,
# in another order. Measured: 5e-7 and 6e-6.
BOUNDS = {1.0: 2e-6, 700.0: 1e-5}
READ_BY_CORE = [
    "original_fp32",
    "original_fp16",
    "original_bf16",
    "prefixed_bf16",
    "fp8",
    "fp8_e5m2",
    "fp8_scaled_old",
    "fp8_scaled_metadata",
]
# ComfyUI 0.3.75 reads neither Diffusers' names in one file, nor int8, nor (without ComfyUI-GGUF) GGUF.


def given(timestep: float = 700.0) -> dict[str, torch.Tensor]:
    """Noise and condition, a timestep, a text, as both models name and order them."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 36, 3, 6, 8, generator=generator),
        "timestep": torch.full((2,), timestep),
        "encoder_hidden_states": torch.randn(2, 20, 4096, generator=generator),
    }


@pytest.fixture(scope="module")
def expert_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A file of a form. ComfyUI keeps the biases of old scaled files in fp8, so they are such numbers here, unless asked otherwise."""
    folder = tmp_path_factory.mktemp("experts")

    def make(form: str, level: str = "high", *, any_biases: bool = False) -> Path:
        path = folder / f"wan2.2_i2v_{level}_noise_14B_{form}{'_any' if any_biases else ''}.safetensors"
        if not path.exists():
            model = WanTransformer3DModel(
                num_attention_heads=2, in_channels=36, out_channels=16, text_dim=4096, ffn_dim=512, num_layers=3, rope_max_seq_len=1024
            )
            randomize(model, torch.Generator().manual_seed(len(level)))
            for module in model.modules():
                if isinstance(module, torch.nn.Linear) and not any_biases:
                    module.bias.data = module.bias.data.to(FP8).float()
            write_expert_file(path, model, form)
        return path

    return make


def ours_in(path: Path) -> Expert:
    files = open_expert_file(path)
    return on_cpu(expert_of(files, Precision(F32, F32, resolve_precision("default", files.stored_dtype, on_gpu=False)[0].as_stored)))


def cores_in(path: Path, metadata: dict[str, str] | None = None) -> Any:
    """What core's Load Diffusion Model gives, computing in float32; it is on the CPU as long as nobody samples with it."""
    tensors, own_metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    patcher = comfy.sd.load_diffusion_model_state_dict(tensors, model_options={"dtype": F32}, metadata=metadata or own_metadata)
    if patcher.model.manual_cast_dtype not in (None, F32):
        pytest.skip("ComfyUI computes this form in 16 bits on this machine")
    return patcher


def cores_output(patcher: Any, timestep: float = 700.0) -> torch.Tensor:
    with torch.inference_mode():
        return patcher.model.diffusion_model(*given(timestep).values())


@pytest.mark.parametrize("level", ["high", "low"])
@pytest.mark.parametrize("form", READ_BY_CORE)
def test_the_output_is_cores(expert_file: Callable[..., Path], form: str, level: str) -> None:
    ours, core = ours_in(expert_file(form, level)), cores_in(expert_file(form, level))
    for timestep, bound in BOUNDS.items():
        assert relative(output(ours.model, given(timestep)), cores_output(core, timestep)) < bound


def test_the_newest_spelling_of_scales(expert_file: Callable[..., Path]) -> None:
    """ComfyUI 0.3.75 takes no notice of the marks that lie among the tensors, as newer ones write them; told what they say, it reads the
    file. Without, it computes with values hundreds of times too large."""
    path = expert_file("fp8_scaled_new")
    modules = [key.removesuffix(".comfy_quant") for key in load_file(path) if key.endswith(".comfy_quant")]
    told = json.dumps({"format_version": "1.0", "layers": {module: {"format": "float8_e4m3fn"} for module in modules}})
    core = cores_in(path, metadata={"_quantization_metadata": told})
    ours = ours_in(path)
    for timestep, bound in BOUNDS.items():
        assert relative(output(ours.model, given(timestep)), cores_output(core, timestep)) < bound


def test_biases_that_are_no_fp8_numbers(expert_file: Callable[..., Path]) -> None:
    """ComfyUI rounds them, where a file is of the old scaled form; this pack has them as the file does."""
    path = expert_file("fp8_scaled_old", any_biases=True)
    config, core = open_expert_file(path).config, cores_in(path)
    values = values_in(path, config)
    biases = {name for name in values if name.endswith(".bias") and "norm" not in name and "patch_embedding" not in name}
    assert all(core.model.diffusion_model.get_parameter(original_name(name)).dtype == FP8 for name in biases)
    rounded = {name: value.to(FP8).float() if name in biases else value for name, value in values.items()}
    assert relative(output(diffusers_model(config, rounded), given()), cores_output(core)) < BOUNDS[700.0]
    exact = output(diffusers_model(config, values), given())
    assert relative(output(ours_in(path).model, given()), exact) < 2e-6 < 5e-3 < relative(cores_output(core), exact) < 2e-2


# ---- LoRAs


@pytest.fixture(scope="module")
def loras(expert_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyLora]:
    """For each expert: "high" and "low" with low rank everywhere; "high, whole" and "low, whole" with differences of everything small too,
    but for the tables of modulations (see below); "tables" with these alone, under the one of their two names that ComfyUI knows."""
    folder = tmp_path_factory.mktemp("loras")
    found: dict[str, TinyLora] = {}
    shapes = {name: stored.shape for name, stored in open_expert_file(expert_file("original_fp32")).tensors.items()}
    for seed, level in enumerate(("high", "low")):
        found[level] = tiny_lora(folder / f"{level}.safetensors", shapes, "lightning", 4, seed)
        whole = tiny_lora(folder / f"{level}_whole.safetensors", shapes, "lightx2v", 4, seed)
        tensors = load_file(whole.path)
        save_file({key: value for key, value in tensors.items() if not key.endswith(".diff_m")}, whole.path)
        added = {name: value for name, value in whole.added.items() if not name.endswith("scale_shift_table")}
        found[f"{level}, whole"] = TinyLora(whole.path, added)
    tables = {name: value for name, value in whole.added.items() if name not in added}
    renamed = {key.replace(".diff_m", ".modulation.diff"): value for key, value in tensors.items() if key.endswith(".diff_m")}
    save_file(renamed, folder / "tables.safetensors")
    return {**found, "tables": TinyLora(folder / "tables.safetensors", tables)}


def with_lora(patcher: Any, lora: TinyLora, strength: float) -> Any:
    """What core's LoraLoaderModelOnly gives, its weights changed as for sampling."""
    changed, _ = comfy.sd.load_lora_for_models(patcher, None, load_file(lora.path), strength, 0)
    with torch.no_grad():
        changed.patch_model()
    return changed


@pytest.mark.parametrize("strength", [1.0, -0.7])
@pytest.mark.parametrize("whole", ["", ", whole"], ids=["low rank", "with differences"])
@pytest.mark.parametrize("level", ["high", "low"])
def test_loras_in_float32_are_cores(
    expert_file: Callable[..., Path], loras: dict[str, TinyLora], level: str, whole: str, strength: float
) -> None:
    path, lora = expert_file("original_fp32", level), loras[level + whole]
    core, ours = with_lora(cores_in(path), lora, strength), ours_in(path)
    without = output(ours.model, given())
    ours.use_loras([lora.choice(strength)])
    for timestep, bound in BOUNDS.items():
        assert relative(output(on_cpu(ours).model, given(timestep)), cores_output(core, timestep)) < bound
    assert relative(cores_output(core), without) > 0.1
    core.unpatch_model()
    ours.use_loras([])
    assert torch.equal(output(on_cpu(ours).model, given()), without)
    assert relative(cores_output(core), without) < BOUNDS[700.0]


def test_loras_chained_are_cores(expert_file: Callable[..., Path], loras: dict[str, TinyLora]) -> None:
    path, chosen = expert_file("original_bf16"), [(loras["high"], 0.8), (loras["low, whole"], -0.4), (loras["high"], 0.1)]
    core, ours = cores_in(path), ours_in(path)
    for lora, strength in chosen:
        core, _ = comfy.sd.load_lora_for_models(core, None, load_file(lora.path), strength, 0)
    with torch.no_grad():
        core.patch_model()
    ours.use_loras([lora.choice(strength) for lora, strength in chosen])
    assert relative(output(on_cpu(ours).model, given()), cores_output(core)) < BOUNDS[700.0]


def test_tables_are_left_out_by_core(expert_file: Callable[..., Path], loras: dict[str, TinyLora]) -> None:
    """It changes only modules that have no modules inside, which blocks are not. lightx2v's own code adds what its files have for them."""
    path = expert_file("original_fp32")
    config, ours = open_expert_file(path).config, ours_in(path)
    without = output(ours.model, given())
    core = with_lora(cores_in(path), loras["tables"], 1.0)
    assert any("modulation" in name for name in core.patches)
    assert relative(cores_output(core), without) < BOUNDS[700.0]
    ours.use_loras([loras["tables"].choice(1.0)])
    wanted = output(diffusers_model(config, merged(values_in(path, config), [(loras["tables"], 1.0)])), given())
    assert relative(output(on_cpu(ours).model, given()), wanted) < 2e-6 < 0.02 < relative(without, wanted)


def fp8_weights(core: Any, names: Values) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of ComfyUI's model, by diffusers' names: what its fp8 matrices stand for, and their scales."""
    found = {}
    for name in names:
        module = core.model.diffusion_model.get_submodule(original_name(name).rpartition(".")[0]) if name.endswith(".weight") else None
        weight = None if module is None else module.weight
        if weight is not None and hasattr(weight, "_layout_params"):
            found[name] = (weight.dequantize().float(), weight._layout_params["scale"].float())
        elif weight is not None and weight.dtype == FP8:
            found[name] = (weight.float() * module.scale_weight, module.scale_weight)
    return found


@pytest.mark.parametrize("level", ["high", "low"])
@pytest.mark.parametrize("form", ["fp8_scaled_old", "fp8_scaled_metadata"])
def test_loras_on_fp8(expert_file: Callable[..., Path], loras: dict[str, TinyLora], form: str, level: str) -> None:
    """ComfyUI adds them in float32, and rounds the sum to fp8 again, up or down by chance: each weight is up to one step of fp8 off, an
    eighth of it (or 1/512 of the scale); what has become too large for the file's scale is cut off. That is all that is between us: with
    those weights, diffusers' model gives ComfyUI's output. This pack leaves the file's values alone, and is as exact as in float32.
    """
    path, lora, strength = expert_file(form, level), loras[level], 0.7
    config = open_expert_file(path).config
    exact = merged(values_in(path, config), [(lora, strength)])
    core, ours = with_lora(cores_in(path), lora, strength), ours_in(path)
    rounded = fp8_weights(core, exact)
    assert len(rounded) == sum(value.ndim == 2 for value in exact.values()) == 36
    for name, (value, scale) in rounded.items():
        wanted = (exact[name] / scale).abs()
        off = wanted.clamp(max=448) / 8 + 2**-9 + (wanted - 448).clamp(min=0)
        assert bool(((value - exact[name]).abs() / scale <= 1.002 * off).all()), name
    cores, correct = cores_output(core), output(diffusers_model(config, exact), given())
    as_cores = diffusers_model(config, {**exact, **{name: value for name, (value, _) in rounded.items()}})
    assert relative(output(as_cores, given()), cores) < BOUNDS[700.0]
    ours.use_loras([lora.choice(strength)])
    # Measured: 6e-7 and 9e-2.
    assert relative(output(on_cpu(ours).model, given()), correct) < 2e-6 < 0.02 < relative(cores, correct) < 0.15
