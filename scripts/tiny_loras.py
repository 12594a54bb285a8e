"""Write tiny, random LoRA files for a Wan 2.2 expert, in every form of keys that programs write.

    python scripts/tiny_loras.py CHECKPOINT FOLDER [--form lightx2v] [--rank 4] [--seed 0]

writes one for each expert of a checkpoint in diffusers format (scripts/tiny_checkpoint.py makes one), named like those that ComfyUI's Wan 2.2
template uses. The same seed means the same LoRA in every form. Used by the tests.
"""

import argparse
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_single_files import original_name

HIGH_NOISE_NAME = "wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors"
LOW_NOISE_NAME = "wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors"
# alpha / rank in the forms that have an alpha, as lightx2v's 8 / 64; in the others the up matrix has it inside.
FACTOR = 1 / 8

_TABLE = "scale_shift_table"


@dataclass(frozen=True)
class Form:
    """How a program spells keys.

    Attributes:
        prefix: before every name.
        down: behind the name of a module, for the down matrix; ``up`` for the other one.
        wan_names: Wan's names, else diffusers'.
        flat: underscores instead of dots.
        alpha: whether it writes alphas.
        differences: whether it writes, besides matrices, what changes biases, norms, modulations and the small layers as a whole.
    """

    prefix: str
    down: str = "lora_down.weight"
    up: str = "lora_up.weight"
    wan_names: bool = True
    flat: bool = False
    alpha: bool = True
    differences: bool = False

    def name(self, module: str) -> str:
        """How diffusers' module is called here."""
        name = wan_name(module) if self.wan_names else module
        return self.prefix + (name.replace(".", "_") if self.flat else name)

    def difference(self, parameter: str) -> str:
        """The key of what is added to diffusers' parameter as a whole."""
        if parameter.endswith(_TABLE):
            path = parameter.removesuffix(_TABLE).removesuffix(".")
            if not self.wan_names:
                return f"{self.name(parameter)}.diff"
            return f"{self.name(path) if path else f'{self.prefix}head'}.diff_m"
        module, _, kind = parameter.rpartition(".")
        return f"{self.name(module)}.{'diff_b' if kind == 'bias' else 'diff'}"


_PEFT = {"down": "lora_A.weight", "up": "lora_B.weight", "alpha": False}
FORMS = {
    "lightx2v": Form("diffusion_model.", differences=True),
    "lightning": Form("diffusion_model."),  # lightx2v's first ones for Wan 2.2
    "checkpoint": Form("model.diffusion_model."),  # as whole checkpoints have it
    "diffusion-pipe": Form("diffusion_model.", **_PEFT),
    "peft": Form("base_model.model.", **_PEFT),
    "diffsynth": Form("", down="lora_A.default.weight", up="lora_B.default.weight", alpha=False),
    "diffusers": Form("transformer.", **_PEFT, wan_names=False),
    "diffusers, old": Form("transformer.", down="lora.down.weight", up="lora.up.weight", wan_names=False, alpha=False),
    "kohya": Form("lora_unet_", flat=True),
    "wan fun": Form("lora_unet__", flat=True),
    "kohya, diffusers' names": Form("lora_unet_", wan_names=False, flat=True),
}


def wan_name(diffusers_name: str) -> str:
    """A module's or modulation's name in Wan's own code."""
    if diffusers_name == _TABLE:
        return original_name(diffusers_name)
    return original_name(f"{diffusers_name}.").removesuffix(".")


def expert_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The parameters of an expert in diffusers format, from its files' headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
        shapes.update({name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"})
    return shapes


def make_lora(
    shapes: Mapping[str, tuple[int, ...]], *, rank: int = 4, seed: int = 0, gain: float = 0.3, differences: bool = False
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, torch.Tensor]]:
    """A LoRA for all weights of an expert, by diffusers' names.

    Args:
        shapes: of the expert's parameters.
        rank: of the matrices.
        seed: what it is drawn from; each weight's part depends on this and on its place in the list only.
        gain: how large the change is, as a part of weights that keep a signal's size.
        differences: whether to change biases, norms, modulations, the patch embedding and the head as a whole too.

    Returns:
        module -> (down, up), of which ``FACTOR * up @ down`` is added; parameter -> what is added.
    """
    generator = torch.Generator().manual_seed(seed)
    low_rank: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        is_matrix = len(shape) in (2, 5) and name.endswith(".weight")
        if is_matrix and not (differences and name.startswith(("proj_out", "patch_embedding"))):
            down = torch.randn(rank, *shape[1:], generator=generator) / math.sqrt(math.prod(shape[1:]))
            up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) * (gain / FACTOR / math.sqrt(rank))
            low_rank[name.removesuffix(".weight")] = (down, up)
        elif differences:
            size = math.sqrt(math.prod(shape[1:])) if is_matrix else 10.0
            whole[name] = torch.randn(shape, generator=generator) * (gain / size)
    return low_rank, whole


def write_lora(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    form: str = "lightx2v",
    rank: int = 4,
    seed: int = 0,
    *,
    gain: float = 0.3,
    differences: bool | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write :func:`make_lora`'s LoRA with the keys of one of ``FORMS``.

    Args:
        differences: as there; the form's habit where not given.
        dtype: of matrices and differences. Alphas are whole numbers where they are whole, as in lightx2v's files.
    """
    spelling = FORMS[form]
    low_rank, whole = make_lora(
        shapes, rank=rank, seed=seed, gain=gain, differences=spelling.differences if differences is None else differences
    )
    tensors: dict[str, torch.Tensor] = {}
    for module, (down, up) in low_rank.items():
        name = spelling.name(module)
        tensors[f"{name}.{spelling.down}"] = down.to(dtype)
        tensors[f"{name}.{spelling.up}"] = (up if spelling.alpha else up * FACTOR).to(dtype)
        if spelling.alpha:
            alpha = rank * FACTOR
            tensors[f"{name}.alpha"] = torch.tensor(int(alpha) if alpha.is_integer() else alpha)
    tensors.update({spelling.difference(parameter): value.to(dtype) for parameter, value in whole.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def write_pair(
    checkpoint: Path, folder: Path, form: str = "lightx2v", rank: int = 4, seed: int = 0, **options: object
) -> tuple[Path, Path]:
    """One LoRA for each expert of a checkpoint in diffusers format: the high noise expert's, the low noise expert's."""
    parts = {"transformer": HIGH_NOISE_NAME, "transformer_2": LOW_NOISE_NAME}
    high, low = (
        write_lora(folder / name, expert_shapes(checkpoint / part), form, rank, seed + index, **options)  # type: ignore[arg-type]
        for index, (part, name) in enumerate(parts.items())
    )
    return high, low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--form", choices=FORMS, default="lightx2v")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    for file in write_pair(**vars(parser.parse_args())):
        print(f"{file}: {file.stat().st_size / 2**10:.0f} KiB")


if __name__ == "__main__":
    main()
