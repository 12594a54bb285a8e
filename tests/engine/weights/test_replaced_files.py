"""Another file under the same name, after it was chosen: an error, and not its bytes taken for those that were there."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crews import on_cpu
from tiny_loras import expert_shapes, write_lora
from tiny_single_files import file_names
from wan_sharded.engine.checkpoints.diffusers_folder import open_diffusers_folder
from wan_sharded.engine.checkpoints.lora import LoraChoice, open_lora_file
from wan_sharded.engine.checkpoints.single_file import open_expert_file
from wan_sharded.engine.checkpoints.stored import HIGH_NOISE, StoredTensor
from wan_sharded.engine.errors import CheckpointError
from wan_sharded.engine.weights import pieces
from wan_sharded.engine.weights.expert import CPU, Expert
from wan_sharded.engine.weights.precision import Precision
from wan_sharded.engine.weights.reading import TensorReader

F32 = Precision(torch.float32, torch.float32)


def touched(file: Path) -> None:
    """As if written again: same size, later."""
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))


@pytest.mark.parametrize("form", ["original_bf16", "gguf_q8_0"])
@pytest.mark.parametrize("packed", [True, False])
def test_an_experts_file(tiny_single_files: Path, tmp_path: Path, form: str, packed: bool) -> None:
    name = file_names(form)[HIGH_NOISE]
    file = tmp_path / name
    file.write_bytes((tiny_single_files / name).read_bytes())
    expert = Expert("high noise expert", open_expert_file(file), F32)
    expert.bring("blocks.0", CPU, CPU, packed=packed)
    touched(file)
    with pytest.raises(CheckpointError, match=f"{name} was changed after it was chosen. Run again"):
        expert.bring("blocks.1", CPU, CPU, packed=packed)
    again = Expert("high noise expert", open_expert_file(file), F32)
    again.bring("blocks.1", CPU, CPU, packed=packed)


def test_a_loras_file(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(num_blocks=2)
    expert = on_cpu(Expert("high noise expert", open_diffusers_folder(checkpoint).experts[HIGH_NOISE], F32), packed=True)
    before = {name: tensor.clone() for name, tensor in expert.block_weights("blocks.0").items()}
    file = tmp_path / "lora.safetensors"
    lora = open_lora_file(write_lora(file, expert_shapes(checkpoint / "transformer")))
    write_lora(file, expert_shapes(checkpoint / "transformer"), rank=8)
    touched(file)
    expert.use_loras([LoraChoice(lora, 1.0)])
    with pytest.raises(CheckpointError, match="lora.safetensors was changed after it was chosen"):
        on_cpu(expert, packed=True)
    expert.use_loras([])
    on_cpu(expert, packed=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in expert.block_weights("blocks.0").items()), "the model still works"


@pytest.mark.parametrize("still_open", [True, False], ids=["open from before", "opened after the check"])
def test_a_file_that_is_replaced_under_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, still_open: bool) -> None:
    """By renaming: whoever has the old one open goes on reading it, and whoever opens it gets the new one."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    file, size = tmp_path / "a.safetensors", 8000

    def stored(value: int) -> StoredTensor:
        new = tmp_path / "new"
        new.write_bytes(bytes([value]) * size)
        os.utime(new, ns=(0, 10**18 + value))
        new.replace(file)
        return StoredTensor(file, "t", "U8", (size,), 0, size, modified_ns=10**18 + value)

    reader, target = TensorReader(), torch.zeros(size, dtype=torch.uint8)
    old = stored(1)
    if still_open:
        reader.read_into([(old, target)])
        new = stored(2)
        reader.read_into([(new, target)])
        assert target.unique().tolist() == [2]
    else:
        open_file = Path.open

        def replaced_first(path: Path, *arguments: Any, **options: Any) -> Any:
            monkeypatch.setattr(Path, "open", open_file)
            stored(2)
            return open_file(path, *arguments, **options)

        monkeypatch.setattr(Path, "open", replaced_first)
        with pytest.raises(CheckpointError, match=r"a\.safetensors was changed after it was chosen"):
            reader.read_into([(old, target)])
    reader.close()


def test_each_of_several_files_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads still have the old one open, which would be read."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    size, wanted = 8000, []
    for name in ("a", "b"):
        file = tmp_path / name
        file.write_bytes(bytes(size))
        wanted.append(
            (StoredTensor(file, "t", "U8", (size,), 0, size, modified_ns=file.stat().st_mtime_ns), torch.ones(size, dtype=torch.uint8))
        )
    reader = TensorReader()
    reader.read_into(wanted)
    (tmp_path / "new").write_bytes(bytes(size))
    os.utime(tmp_path / "new", ns=(0, 10**18))
    (tmp_path / "new").replace(tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"b was changed after it was chosen"):
        reader.begin(wanted)
    reader.stop()
    reader.close()
