"""How much system memory this process may use: what the system says, less where a container or Windows allows less."""

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class SystemMemory:
    """Bytes in all, and what can be had now."""

    total: int
    available: int


def system_memory() -> SystemMemory:
    """What this process may use."""
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    if os.name == "nt":
        available = min(available, _windows_commit())
    for limit, used in cgroup_limits():
        total, available = min(total, limit), min(available, max(0, limit - used))
    return SystemMemory(total, available)


def cgroup_limits(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> list[tuple[int, int]]:
    """(limit, used) of the control groups that hold this process, as containers and systemd set them; pages of files don't count as used.

    Inside a container the system's own figures are those of the whole computer.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found: list[tuple[int, int]] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            base, names, files = root, ("memory.max", "memory.current"), ("active_file", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            files = ("total_active_file", "total_inactive_file")
        else:
            continue
        # A container may see its own group as the root, or the whole path.
        folder = base / path.strip("/")
        for group in dict.fromkeys((folder, *folder.parents)):
            if group != base and base not in group.parents:
                break
            limit, used = (_number(group / name) for name in names)
            if limit is not None and used is not None:
                found.append((limit, max(0, used - _of_files(group / "memory.stat", files))))
    return found


def _number(file: Path) -> int | None:
    """The number in a file; none where it says "max" or there is no such file."""
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _of_files(stat: Path, names: tuple[str, ...]) -> int:
    try:
        lines = [line.split() for line in stat.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return 0
    return sum(int(words[1]) for words in lines if len(words) == 2 and words[0] in names)


def _windows_commit() -> int:
    """What Windows still promises this process, bytes: free memory and page file together, which graphics memory counts against as well."""

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong), *((name, ctypes.c_ulonglong) for name in _STATUS)]

    status = Status(length=ctypes.sizeof(Status))
    kernel32 = getattr(ctypes, "windll").kernel32  # noqa: B009 - not there elsewhere
    if not kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return 2**63
    return int(status.available_page_file)


# MEMORYSTATUSEX behind its first two members.
_STATUS = (
    "total_physical",
    "available_physical",
    "total_page_file",
    "available_page_file",
    "total_virtual",
    "available_virtual",
    "available_extended_virtual",
)

# Windows' numbers for "not enough memory", "insufficient resources" and "the paging file is too small"; torch's and Linux's words.
_OUT_OF_MEMORY = re.compile(
    r"\[WinError (8|1450|1455)\]|os error (8|1450|1455)\b|\[Errno 12\]|not enough memory: you tried|can't allocate memory: you tried"
)


def is_out_of_system_memory(error: BaseException) -> bool:
    """Whether an error says that the system has no memory left, also in the words of another that it became."""
    return isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


def out_of_system_memory_words(error: BaseException, *, windows: bool = os.name == "nt") -> str:
    """What to do about it."""
    page_file = (
        "On Windows, let the system manage the size of the page file, on a disk with room for as much as the system memory and the memory "
        "of all GPUs together. "
        if windows
        else ""
    )
    return (
        f"The system has no memory left for this. {page_file}Close other programs, choose a smaller weight_dtype, or a smaller or "
        f"shorter video. ({error})"
    )
