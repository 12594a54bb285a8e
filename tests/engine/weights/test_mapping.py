"""Tensors that are pages of files: how many are open, and files that are written to meanwhile."""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from read_files import any_bytes, stored_in
from wan_sharded.engine.checkpoints.stored import StoredTensor
from wan_sharded.engine.errors import CheckpointError
from wan_sharded.engine.weights.mapping import MappedFiles
from wan_sharded.engine.weights.pieces import GAP_BYTES


@pytest.fixture
def many(tmp_path: Path) -> list[StoredTensor]:
    """Neighbours in one file, and one far behind them."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(range(256)) * (GAP_BYTES // 128))
    near = [StoredTensor(path, f"{n}.weight", "U8", (16,), 100 + 20 * n, 16, modified_ns=path.stat().st_mtime_ns) for n in range(200)]
    return [*near, StoredTensor(path, "far.weight", "U8", (16,), 100 + 20 * 200 + GAP_BYTES, 16)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts open files")
def test_neighbours_keep_one_file_open(many: list[StoredTensor]) -> None:
    """An expert has a thousand tensors, and many systems let a process open 1024 files."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    found = MappedFiles().tensors(many[::-1])
    assert len(os.listdir("/proc/self/fd")) == before + 2
    assert all(found[stored].tolist() == [(stored.offset + n) % 256 for n in range(16)] for stored in many)
    del found
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_written_to_meanwhile(many: list[StoredTensor]) -> None:
    files, path = MappedFiles(), many[0].file
    found = files.tensors(many)
    files.check()
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(b"another model")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match=r"a\.safetensors was changed after it was chosen"):
        files.check()
    found.clear()
    gc.collect()
    files.check()  # nobody's any more


@pytest.mark.skipif(os.name == "nt", reason="a mapped file can't be deleted there")
def test_deleted_and_replaced_files_stay_as_they_were(tmp_path: Path) -> None:
    content, files = any_bytes(64), MappedFiles()
    stored = stored_in(tmp_path / "a.safetensors", content)
    tensor = files.tensors([stored])[stored]
    stored.file.unlink()
    files.check()
    stored.file.write_bytes(bytes(1000))
    files.check()
    assert torch.equal(tensor, content)
