"""The example workflows as they are in the clone, and tiny models under the names that they ask for."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from setup_env import ROOT
from tiny_checkpoint import make_text_encoder, make_tokenizer, make_vae
from tiny_encoder_files import write_umt5_file, write_vae_file
from tiny_loras import write_pair
from tiny_single_files import file_names

FOLDER = ROOT / "example_workflows"
FOUR_STEPS = "wan_i2v_lightx2v_4steps"
CORE, LONG = "wan_i2v_core_text_vae", "wan_i2v_long"
NAMES = ["wan_i2v", "wan_first_last_frame", FOUR_STEPS, CORE, LONG]
EXPERTS = {"model", "high_noise_model", "low_noise_model"}
FILES = {*EXPERTS, "text_encoder", "vae", "high_noise_lora", "low_noise_lora"}


def ui_workflow(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def api_workflow(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def of_type(prompt: dict[str, Any], class_type: str) -> list[dict[str, Any]]:
    """The inputs of every node of a type."""
    return [node["inputs"] for node in prompt.values() if node["class_type"] == class_type]


def inputs_of(prompt: dict[str, Any], class_type: str) -> dict[str, Any]:
    (inputs,) = of_type(prompt, class_type)
    return inputs


@contextmanager
def named_model_files(models: Path, tiny_single_files: Path) -> Iterator[dict[str, str]]:
    """Put tiny models of the right kinds, under the names that the examples ask for, into ComfyUI's model folders, and take them away again.

    Gives:
        name -> folder.
    """
    chosen = inputs_of(api_workflow(FOUR_STEPS), "WanShardedLoader")
    with tempfile.TemporaryDirectory() as folder:
        made, generator = Path(folder), torch.Generator().manual_seed(0)
        spiece = made / "spiece.model"
        encoder = make_text_encoder(len(make_tokenizer(spiece)), generator)
        write_umt5_file(made / chosen["text_encoder"], encoder, spiece.read_bytes(), "fp8_scaled_old")
        write_vae_file(made / chosen["vae"], make_vae(generator, num_res_blocks=2))
        for part, level in (("transformer", "high"), ("transformer_2", "low")):
            shutil.copy(tiny_single_files / file_names("fp8_scaled_old")[part], made / chosen[f"{level}_noise_model"])
        loras = [file.name for file in write_pair(tiny_single_files / "diffusers", made)]
        placed = {chosen["text_encoder"]: "text_encoders", chosen["vae"]: "vae", **dict.fromkeys(loras, "loras")}
        placed |= {chosen[f"{level}_noise_model"]: "diffusion_models" for level in ("high", "low")}
        targets = [models / folder / name for name, folder in placed.items()]
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(made / target.name, target)
    yield placed
    for target in targets:
        target.unlink()
