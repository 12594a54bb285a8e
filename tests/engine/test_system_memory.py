"""How much system memory a process in a container may use, and which errors say that there is none left."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from wan_sharded.engine import system_memory
from wan_sharded.engine.errors import CheckpointError
from wan_sharded.engine.system_memory import cgroup_limits, is_out_of_system_memory, out_of_system_memory_words

GIB = 1024**3


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def own_group(folder: Path, words: str) -> Path:
    (folder / "own").write_text(words)
    return folder / "own"


def test_version_2_in_a_container(tmp_path: Path) -> None:
    """It sees its own group as the root. The model's file in the page cache is no memory in use."""
    stat = f"anon {5 * GIB}\nactive_file {GIB}\ninactive_file {2 * GIB}\nfile_mapped 7"
    write(tmp_path / "fs", memory__max=16 * GIB, memory__current=9 * GIB, memory__stat=stat)
    assert cgroup_limits(tmp_path / "fs", own_group(tmp_path, "0::/\n")) == [(16 * GIB, 6 * GIB)]


def test_version_2_with_limits_on_the_way(tmp_path: Path) -> None:
    """systemd's MemoryMax of a slice holds for all below."""
    root = tmp_path / "fs"
    write(root / "a.slice" / "b.scope", memory__max="max", memory__current=GIB)
    write(root / "a.slice", memory__max=8 * GIB, memory__current=3 * GIB)
    assert cgroup_limits(root, own_group(tmp_path, "0::/a.slice/b.scope\n")) == [(8 * GIB, 3 * GIB)]


def test_version_1(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    write(root / "memory", memory__limit_in_bytes=12 * GIB, memory__usage_in_bytes=5 * GIB, memory__stat=f"total_inactive_file {GIB}")
    own = own_group(tmp_path, "12:cpu,cpuacct:/docker/1\n11:memory:/docker/1\n")
    assert cgroup_limits(root, own) == [(12 * GIB, 4 * GIB)]


def test_without_limits_or_groups(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path, tmp_path / "none") == []
    write(tmp_path / "fs", memory__max="max", memory__current=GIB)
    assert cgroup_limits(tmp_path / "fs", own_group(tmp_path, "0::/\n")) == []


def test_the_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=50 * GIB))
    # Version 1's "no limit" is a number beyond any memory.
    for limits, total, available in (
        ([], 64, 50), ([(2**63 - 4096, GIB)], 64, 50), ([(16 * GIB, 6 * GIB)], 16, 10), ([(60 * GIB, GIB), (8 * GIB, 9 * GIB)], 8, 0),
    ):  # fmt: skip
        monkeypatch.setattr(system_memory, "cgroup_limits", lambda limits=limits: limits)
        found = system_memory.system_memory()
        assert (found.total, found.available) == (total * GIB, available * GIB)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError("Unable to allocate 675. MiB for an array"), True),
        (OSError("[WinError 1455] 页面文件太小"), True),
        (CheckpointError("a could not be read (The paging file is too small. (os error 1455)). Download it again."), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (OSError(28, "No space left on device"), False),
        (CheckpointError("14550 is no number (os error 14551)"), False),
    ],
)  # fmt: skip
def test_no_system_memory_in_all_its_forms(error: Exception, memory: bool) -> None:
    assert is_out_of_system_memory(error) is memory


def test_the_page_file_is_named_on_windows_only() -> None:
    error = OSError("[WinError 1455] too small")
    assert "page file" in out_of_system_memory_words(error, windows=True)
    assert "page file" not in out_of_system_memory_words(error, windows=False)
    assert str(error) in out_of_system_memory_words(error, windows=False)
