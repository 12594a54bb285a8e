"""What an expert's single file stands for, read without the engine; diffusers' own model of it; LoRAs merged into it; who reads what."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from tiny_loras import FACTOR, make_lora, write_lora
from tiny_single_files import original_name
from wan_sharded.engine.checkpoints.lora import LoraChoice, open_lora_file
from wan_sharded.engine.checkpoints.stored import ComponentFiles, StoredTensor
from wan_sharded.engine.transformer.low_precision import widened_gguf, widened_rows
from wan_sharded.engine.weights.expert import NOWHERE, Expert
from wan_sharded.engine.weights.reading import Reading, TensorReader

Values = dict[str, torch.Tensor]
PREFIX = "model.diffusion_model."


def empty_model(config: Mapping[str, Any]) -> WanTransformer3DModel:
    with torch.device("meta"):
        return WanTransformer3DModel.from_config(dict(config)).eval()


def values_in(path: Path, config: Mapping[str, Any]) -> Values:
    """The float32 values of every parameter, by diffusers' names."""
    shapes = {name: parameter.shape for name, parameter in empty_model(config).named_parameters()}
    raw = _gguf_values(path) if path.suffix == ".gguf" else _safetensors_values(path)
    return {name: (raw[name] if name in raw else raw[original_name(name)]).reshape(shape) for name, shape in shapes.items()}


def _gguf_values(path: Path) -> Values:
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).astype("float32")) for t in tensors}


def _safetensors_values(path: Path) -> Values:
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    values: Values = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        scale = next(
            (tensors[key] for key in (f"{module}.scale_weight", f"{module}.weight_scale") if module != name and key in tensors), None
        )
        values[name] = tensor.float() if scale is None else tensor.float() * scale
    return values


def diffusers_model(config: Mapping[str, Any], values: Values, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """Diffusers' model with these weights, as ``from_pretrained(torch_dtype=dtype)`` would give it."""
    model = empty_model(config)
    exceptions = set(model._keep_in_fp32_modules)
    rounded = {name: value if exceptions.intersection(name.split(".")) else value.to(dtype) for name, value in values.items()}
    model.load_state_dict(rounded, assign=True)
    model.rope = type(model.rope)(model.rope.attention_head_dim, model.rope.patch_size, model.rope.max_seq_len)  # its tables were nowhere
    return model.requires_grad_(False)


def output(model: Callable[..., Any], given: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.inference_mode():
        return model(**{k: v.to(dtype) if k != "timestep" else v for k, v in given.items()}, return_dict=False)[0].float()


# ---- what an expert holds


def held(expert: Expert) -> Values:
    """Every parameter that is somewhere, and what stands beside some, with its full name; on the host."""
    return {name: parameter.data.cpu() for name, parameter in expert.model.named_parameters() if parameter.device != NOWHERE}


def in_use(expert: Expert, dtype: torch.dtype) -> Values:
    """Every parameter that is somewhere as a forward without LoRAs uses it."""
    found, parameters = {}, held(expert)
    for name in expert.files.tensors.keys() & parameters.keys():
        part, inside = ".".join(name.split(".")[:2]), name.split(".", 2)[-1]
        weight, scale = parameters[name], parameters.get(f"{name}_scale")
        gguf_type = expert.block_weights(part).get(f"{inside}.gguf") if part.startswith("blocks.") else None
        if gguf_type is not None:
            found[name] = widened_gguf(weight, gguf_type, dtype)
        else:
            found[name] = weight if scale is None else widened_rows(weight, scale, dtype)
    return found


def same_bits(one: Values, other: Values) -> bool:
    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1).contiguous().view(torch.uint8)

    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(bits(tensor), bits(other[name])) for name, tensor in one.items()
    )


# ---- LoRAs


class TinyLora(NamedTuple):
    """A LoRA file of scripts/tiny_loras.py, and what it adds: parameter -> float32 of its shape."""

    path: Path
    added: Values

    def choice(self, strength: float = 1.0) -> LoraChoice:
        return LoraChoice(open_lora_file(self.path), strength)


def tiny_lora(
    path: Path, shapes: Mapping[str, tuple[int, ...]], form: str = "lightx2v", rank: int = 4, seed: int = 0, **options: Any
) -> TinyLora:
    write_lora(path, shapes, form, rank, seed, **options)
    low_rank, whole = make_lora(shapes, rank=rank, seed=seed, differences=options.get("differences", form == "lightx2v"))
    added = {
        f"{m}.weight": (FACTOR * (up.flatten(1) @ down.flatten(1))).reshape(shapes[f"{m}.weight"]) for m, (down, up) in low_rank.items()
    }
    return TinyLora(path, {**added, **whole})


def merged(values: Values, loras: Iterable[tuple[TinyLora, float]]) -> Values:
    """The weights with LoRAs in them, in float32."""
    result = {name: value.clone() for name, value in values.items()}
    for lora, strength in loras:
        for name, added in lora.added.items():
            result[name] += strength * added
    return result


def shapes_of(files: ComponentFiles) -> dict[str, tuple[int, ...]]:
    return {name: stored.shape for name, stored in files.tensors.items()}


# ---- reading


def watch_reads(monkeypatch: pytest.MonkeyPatch) -> list[StoredTensor]:
    """A list that every tensor is added to, each time it is read: as pages of its file (for imagined GPUs too), or into memory."""
    found: list[StoredTensor] = []
    all_mapped, begin = TensorReader.all_mapped, TensorReader.begin

    def watched_mapped(reader: TensorReader, wanted: Sequence[StoredTensor]) -> dict[StoredTensor, torch.Tensor]:
        found.extend(wanted)
        return all_mapped(reader, wanted)

    def watched_begin(reader: TensorReader, wanted: list[tuple[StoredTensor, torch.Tensor]], **options: bool) -> Reading:
        found.extend(stored for stored, target in wanted if target.device.type == "cpu")
        return begin(reader, wanted, **options)

    monkeypatch.setattr(TensorReader, "all_mapped", watched_mapped)
    monkeypatch.setattr(TensorReader, "begin", watched_begin)
    return found
