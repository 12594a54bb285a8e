"""README.md says what is true: its scripts run as they stand there, its links lead somewhere, its example is what the planner says."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import av
import example_report
import pytest
import torch
from PIL import Image
from tiny_checkpoint import make_text_encoder, make_tokenizer, make_vae
from tiny_encoder_files import write_umt5_file, write_vae_file
from tiny_loras import write_pair
from tiny_single_files import file_names

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/TROUBLESHOOTING.md",
    *(file.relative_to(ROOT).as_posix() for file in sorted((ROOT / "js" / "docs").rglob("*.md"))),
]


def code_blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def code_block(language: str) -> str:
    """The one fenced block of a language."""
    (block,) = code_blocks(language)
    return block


def with_changes(script: str, changes: dict[str, str]) -> str:
    """The script with some of its words replaced; each must be there exactly once."""
    for old, new in changes.items():
        assert script.count(old) == 1, f"{old} is in the script {script.count(old)} times"
        script = script.replace(old, new)
    return script


def link(folder: Path, target: Path) -> None:
    try:
        folder.symlink_to(target, target_is_directory=True)
    except OSError as error:
        pytest.skip(f"no symbolic links here: {error}")


def run_script(script: str, folder: Path) -> None:
    """Run a script in a folder, on the CPU and without the Hub."""
    (folder / "script.py").write_text(script, encoding="utf-8")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    result = subprocess.run([sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def make_video(script: str, folder: Path) -> None:
    """Run a script that makes a video of 9 frames of 64x48 of boat.jpg, and look at what it wrote."""
    link(folder / "wan_sharded", ROOT)  # in the place of what `pip install .` copies
    Image.linear_gradient("L").resize((96, 64)).save(folder / "boat.jpg")
    run_script(script, folder)
    with av.open(str(folder / "video.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (64, 48, 16)
        assert len(list(container.decode(stream))) == 9


def test_the_python_script_makes_a_video(tmp_path: Path, tiny_checkpoint: Path) -> None:
    changes = {
        '"Wan-AI/Wan2.2-I2V-A14B-Diffusers"': repr(str(tiny_checkpoint)),
        "num_frames=81, num_inference_steps=20": "num_frames=9, num_inference_steps=2, width=64, height=48",
    }
    make_video(with_changes(code_blocks("python")[0], changes), tmp_path)


def test_the_python_script_with_files_makes_a_video(tmp_path: Path, tiny_single_files: Path) -> None:
    """With tiny files of the same kinds, under the names and in the folders that it has."""
    script = code_blocks("python")[1]
    named = {Path(name).name: tmp_path / name for name in re.findall(r'"(models/[^"]+)"', script)}
    assert named.keys() == four_step_files()
    for target in named.values():
        target.parent.mkdir(parents=True, exist_ok=True)
    generator, spiece = torch.Generator().manual_seed(0), tmp_path / "spiece.model"
    encoder = make_text_encoder(len(make_tokenizer(spiece)), generator)
    for name, target in named.items():
        if "/diffusion_models/" in target.as_posix():
            part = "transformer" if "high" in name else "transformer_2"
            shutil.copy(tiny_single_files / file_names("fp8_scaled_old")[part], target)
        elif "umt5" in name:
            write_umt5_file(target, encoder, spiece.read_bytes(), "fp8_scaled_old")
        elif "vae" in name:
            write_vae_file(target, make_vae(generator, num_res_blocks=2))
    loras = write_pair(tiny_single_files / "diffusers", tmp_path / "models" / "loras")
    assert {file.name for file in loras} < named.keys()
    changes = {"num_inference_steps=4": "num_inference_steps=4, num_frames=9, width=64, height=48"}
    make_video(with_changes(script, changes), tmp_path)


def four_step_files() -> set[str]:
    """The files that the example with the LoRAs asks for."""
    prompt = json.loads((ROOT / "example_workflows" / "api" / "wan_i2v_lightx2v_4steps.json").read_text(encoding="utf-8"))
    values = [value for node in prompt.values() for value in node["inputs"].values()]
    return {value for value in values if isinstance(value, str) and value.endswith(".safetensors")}


def test_the_files_of_the_example_are_named() -> None:
    assert len(four_step_files()) == 6
    assert [name for name in four_step_files() if f"`{name}`" not in README] == []


@cache
def planned(weight_dtype: str) -> str:
    return example_report.example_report(weight_dtype)


def test_the_example_placement_is_what_the_planner_says() -> None:
    assert code_block("text").strip() == planned("default"), "copy what `python tests/support/example_report.py` prints into README.md"


def test_bf16_needs_system_memory_there_and_quantized_weights_do_not() -> None:
    waiting = {choice: "system memory" in planned(choice) for choice in ("default", "fp8_e4m3fn", "int8")}
    assert waiting == {"default": True, "fp8_e4m3fn": False, "int8": False}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'src="([^"]+)"', text)
    # ComfyUI's page looks for a translated help page's pictures beside the English one.
    pictures = ROOT / "js" / "docs" if page.startswith("js/docs/") else (ROOT / page).parent
    places = [pictures if target.endswith(".jpg") else (ROOT / page).parent for target in targets]
    missing = [target for target, place in zip(targets, places, strict=True) if "://" not in target and not (place / target).exists()]
    assert missing == []


def test_pictures_are_shown_and_small() -> None:
    pictures = sorted((ROOT / "docs" / "images").iterdir())
    assert pictures
    for picture in pictures:
        assert f"docs/images/{picture.name}" in README
        assert picture.stat().st_size < 150_000, picture.name
