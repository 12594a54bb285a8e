"""Asking for hardware: the order of GPUs, hidden ones, and values where there is none."""

import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
import wan_sharded
from wan_sharded.engine import probe, speeds, usable
from wan_sharded.engine.host_memory import PageLocking
from wan_sharded.engine.planning.devices import GIB, DeviceInfo, Links


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """The answers are remembered for the life of a process."""
    probe.visible_gpus.cache_clear()
    probe.installed_gpus.cache_clear()
    probe.unusable_gpus.cache_clear()
    usable._copies_arrive.cache_clear()
    yield
    probe.visible_gpus.cache_clear()
    probe.installed_gpus.cache_clear()
    probe.unusable_gpus.cache_clear()
    usable._copies_arrive.cache_clear()


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put an ``nvidia-smi`` on the PATH that does what a shell script says."""
    if os.name == "nt":
        pytest.skip("the stand-in is a shell script")

    def install(script: str) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have torch answer as on a machine with these GPUs: (name, PCI bus, total GiB, free GiB), in torch's order."""

    def install(
        *gpus: tuple[str, int, float, float], cached_gib: float = 0, capabilities: Mapping[int, tuple[int, int]] = MappingProxyType({})
    ) -> None:
        def properties(index: int) -> SimpleNamespace:
            name, bus, total, _ = gpus[index]
            return SimpleNamespace(name=name, total_memory=int(total * GIB), pci_domain_id=0, pci_bus_id=bus, pci_device_id=0)

        answers = {
            "is_available": lambda: True,
            "device_count": lambda: len(gpus),
            "get_device_properties": properties,
            "mem_get_info": lambda index: (int(gpus[index][3] * GIB), int(gpus[index][2] * GIB)),
            "memory_reserved": lambda index: int((cached_gib + 1) * GIB),
            "memory_allocated": lambda index: GIB,
            "get_device_capability": lambda index: capabilities.get(index, (8, 6)),
            "get_device_name": lambda index: gpus[index][0],
            "get_arch_list": lambda: ["sm_80", "sm_86", "sm_120", "compute_120"],
            "can_device_access_peer": lambda one, other: False,
            "get_allocator_backend": lambda: "cudaMallocAsync",
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    return install


FAST_FIRST = (("NVIDIA GeForce RTX 5060 Ti", 9, 15.9, 15), ("NVIDIA GeForce RTX 3060", 5, 11.8, 11))


def test_pci_order_though_torch_counts_the_fastest_first(cuda: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside ComfyUI CUDA has started before a node pack is imported, so its order is torch's."""
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    cuda(*FAST_FIRST)
    machine = probe.probe_machine()
    assert [(device.index, device.name, device.torch_device) for device in machine.devices] == [
        (0, "RTX 3060", "cuda:1"),
        (1, "RTX 5060 Ti", "cuda:0"),
    ]
    assert [device.label for device in machine.devices] == ["GPU 0 · RTX 3060 12 GB", "GPU 1 · RTX 5060 Ti 16 GB"]
    assert machine.devices[0].compute_capability == (8, 6)


def test_torchs_order_where_it_is_the_buss(cuda: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Or where the user has made another, with CUDA_VISIBLE_DEVICES."""
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    cuda(*FAST_FIRST)
    assert [device.torch_device for device in probe.probe_machine().devices] == ["cuda:0", "cuda:1"]


def test_what_the_allocator_holds_unused_is_free(cuda: Callable[..., None]) -> None:
    cuda(("NVIDIA RTX A6000", 1, 48, 20), cached_gib=7)
    (device,) = probe.probe_machine().devices
    assert device.free_bytes == 27 * GIB and device.total_bytes == 48 * GIB and device.is_gpu


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA GeForce RTX 3060", "RTX 3060"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB HBM3"),
        ("AMD Radeon RX 7900 XTX", "RX 7900 XTX"),
        ("Tesla T4", "Tesla T4"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert probe.short_name(name) == short


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_cpu_computes() -> None:
    machine = probe.probe_machine()
    (device,) = machine.devices
    assert (device.index, device.torch_device, device.is_gpu, device.label) == (0, "cpu", False, "CPU")
    assert 0 < device.free_bytes <= device.total_bytes
    assert machine.host_available_bytes > 0
    for torch_device in ("cpu", "meta", "lazy:1"):
        assert probe.allocated_bytes(torch_device) == probe.peak_bytes(torch_device) == 0
        probe.reset_peak(torch_device)
        probe.synchronize(torch_device)
        probe.release_cached([torch_device])


def test_hidden_gpus_are_told(nvidia_smi: Callable[[str], None], cuda: Callable[..., None]) -> None:
    """On Windows, newer ComfyUI shows only the first GPU unless it is started with --cuda-device all."""
    nvidia_smi("echo 'NVIDIA GeForce RTX 5060 Ti'; echo 'NVIDIA GeForce RTX 3060'")
    cuda(FAST_FIRST[0])
    (warning,) = probe.probe_machine().warnings
    assert "2 GPUs (RTX 5060 Ti, RTX 3060) but only 1 can be used" in warning
    assert "--cuda-device all" in warning and "CUDA_VISIBLE_DEVICES" in warning


def test_nothing_is_told_where_all_are_visible(nvidia_smi: Callable[[str], None], cuda: Callable[..., None]) -> None:
    nvidia_smi("echo 'NVIDIA GeForce RTX 5060 Ti'; echo 'NVIDIA GeForce RTX 3060'")
    cuda(*FAST_FIRST)
    assert probe.probe_machine().warnings == ()


@pytest.mark.parametrize(
    "script",
    ["exit 9", "echo 'NVIDIA-SMI has failed because it could not communicate with the driver.'; exit 9", "true", "echo; echo"],
    ids=["fails", "fails with words", "says nothing", "says empty lines"],
)
def test_an_nvidia_smi_that_does_not_work(nvidia_smi: Callable[[str], None], script: str) -> None:
    nvidia_smi(script)
    assert probe.installed_gpus() == ()
    assert probe.hidden_gpu_warning() == ()


def test_pci_order_is_asked_for_before_torch_is_loaded() -> None:
    """It only counts then; what the user has set stays. And importing the engine alone loads nothing heavy."""
    code = textwrap.dedent(
        """
        import json, os, sys
        from types import ModuleType
        pack = ModuleType("wan_sharded")
        pack.__path__ = [sys.argv[1]]
        sys.modules["wan_sharded"] = pack
        import wan_sharded.engine
        print(json.dumps([os.environ.get("CUDA_DEVICE_ORDER"), "torch" in sys.modules]))
        """
    )

    def run(**environment: str) -> str:
        kept = {name: value for name, value in os.environ.items() if "CUDA" not in name}
        command = [sys.executable, "-c", code, wan_sharded.__path__[0]]
        return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, check=True).stdout

    assert run() == '["PCI_BUS_ID", false]\n'
    assert run(CUDA_DEVICE_ORDER="FASTEST_FIRST") == '["FASTEST_FIRST", false]\n'


TORCH_2_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "built_for", "has"),
    [
        ((8, 6), TORCH_2_13, True),
        ((8, 9), TORCH_2_13, True),  # runs what is made for 8.6
        ((12, 1), TORCH_2_13, True),
        ((12, 0), ["sm_80", "sm_86", "sm_90"], False),  # a new card, an old torch
        ((12, 0), ["sm_80", "sm_90", "compute_90"], True),  # the driver translates
        ((6, 1), TORCH_2_13, False),
        ((7, 0), TORCH_2_13, False),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((9, 0), ["gfx1100", "gfx90a"], True),  # AMD's names, of which this knows nothing
        ((9, 0), [], True),
    ],
)
def test_kernels_for_a_generation(capability: tuple[int, int], built_for: list[str], has: bool) -> None:
    assert usable.has_kernels(capability, built_for) is has


def test_a_gpu_without_kernels_is_left_out_and_named(cuda: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "installed_gpus", lambda: ("GTX 1080", "RTX 3060"))
    cuda(("NVIDIA GeForce GTX 1080", 1, 8, 7), ("NVIDIA GeForce RTX 3060", 2, 12, 11), capabilities={0: (6, 1)})
    machine = probe.probe_machine()
    assert [(device.index, device.name, device.torch_device) for device in machine.devices] == [(0, "RTX 3060", "cuda:1")]
    (warning,) = machine.warnings
    assert warning.startswith("GTX 1080 is left out: torch ") and "no kernels" in warning


@pytest.mark.parametrize("arrives", [True, False])
def test_copies_that_arrive_changed_are_told_and_not_made(
    cuda: Callable[..., None], monkeypatch: pytest.MonkeyPatch, nvidia_smi: Callable[[str], None], arrives: bool
) -> None:
    nvidia_smi("exit 1")
    cuda(("NVIDIA GeForce RTX 3090", 1, 24, 20), ("NVIDIA GeForce RTX 3090", 2, 24, 20))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: True)
    monkeypatch.setattr(usable, "copies_arrive", lambda one, other: arrives or one.index == 1)
    one, other = torch.device("cuda:0"), torch.device("cuda:1")
    assert (probe.reach_each_other(one, other), probe.reach_each_other(other, one)) == (arrives, True)
    warnings = probe.probe_machine().warnings
    assert [warning[:50] for warning in warnings] == ([] if arrives else ["What GPU 0 sends to GPU 1 directly arrives changed"])


def test_copies_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert usable.copies_arrive(cpu, cpu)
    usable._copies_arrive.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", lambda there: there.roll(1))
        assert not usable.copies_arrive(cpu, cpu)
    meta = torch.device("meta")  # from which nothing comes back: a refusal, not a difference
    assert usable.copies_arrive(meta, meta)


def test_other_makers_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable.other_accelerator_warning() == ()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    (warning,) = usable.other_accelerator_warning()
    assert "an Apple GPU" in warning
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert usable.other_accelerator_warning() == ()


def test_on_windows_the_driver_says_what_is_free(nvidia_smi: Callable[[str], None], cuda: Callable[..., None], monkeypatch) -> None:
    nvidia_smi("case $1 in *memory*) printf '00000000:02:00.0, 5120\n00000000:01:00.0, [N/A]\n';; *) printf 'A\nB\n';; esac")
    assert probe.free_by_driver(windows=False) == {}
    found = probe.free_by_driver(windows=True)
    assert found == {2: 5 * GIB}
    monkeypatch.setattr(probe, "free_by_driver", lambda: found)
    cuda(("NVIDIA A", 1, 16, 14), ("NVIDIA B", 2, 12, 11))
    assert [device.free_bytes for device in probe.probe_machine().devices] == [14 * GIB, 5 * GIB]


# ---- links between GPUs


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Have every copy between GPUs go at 300 GB/s, and all together at 100 GB/s; what was asked for, in order."""
    asked: list[object] = []
    monkeypatch.setattr(probe, "measured_copy", lambda source, target: asked.append((str(source), str(target))) or 300e9)
    monkeypatch.setattr(probe, "measured_together", lambda links: asked.append([(str(device), speed) for device, speed in links]) or 100e9)
    return asked


def two(link: float | None = 25e9) -> list[DeviceInfo]:
    """By visible index in another order than torch's."""
    return [DeviceInfo(index, "Imagined", f"cuda:{1 - index}", GIB, GIB, link_bytes_per_s=link) for index in range(2)]


@pytest.mark.parametrize("reached", [True, False])
def test_links_between_gpus_that_reach_each_other(monkeypatch: pytest.MonkeyPatch, copies: list[object], reached: bool) -> None:
    monkeypatch.setattr(probe, "reach_each_other", lambda one, other: reached)
    found = probe.links_between(two())
    assert found.together_bytes_per_s == 100e9
    assert found.direct == ({(0, 1): 300e9, (1, 0): 300e9} if reached else {})
    direct = [("cuda:1", "cuda:0"), ("cuda:0", "cuda:1")] if reached else []
    assert copies == [*direct, [("cuda:1", 25e9), ("cuda:0", 25e9)]]


def test_one_gpu_or_none_has_no_links(copies: list[object]) -> None:
    cpu = DeviceInfo(0, "CPU", "cpu", GIB, GIB, is_gpu=False)
    assert probe.links_between(two()[:1]) == probe.links_between([cpu]) == Links()
    assert not copies


def test_together_is_not_measured_where_a_link_was_not(monkeypatch: pytest.MonkeyPatch, copies: list[object]) -> None:
    monkeypatch.setattr(probe, "reach_each_other", lambda one, other: False)
    gpus = two()
    assert probe.links_between([gpus[0], replace(gpus[1], link_bytes_per_s=None)]) == Links()
    assert not copies


def test_what_cannot_be_measured_now_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, or a torch without CUDA; a plan is made without it."""
    if torch.cuda.is_available():
        pytest.skip("these GPUs can be measured")
    monkeypatch.setattr(probe, "reach_each_other", lambda one, other: True)
    assert probe.links_between(two()) == Links()


def test_no_memory_for_what_is_copied_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(size_bytes: int) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(speeds, "host_buffer", none_left)
    assert speeds.measured_together([(torch.device("cpu"), 1e9)]) is None


@pytest.mark.parametrize("allowed", [True, False])
def test_nothing_is_copied_together_where_memory_is_not_locked(monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    """And a refusal does not keep weights from being locked later."""
    locking, made = PageLocking(windows=False), []
    locking.allowed, locking._refused = allowed, True
    monkeypatch.setattr(speeds, "PAGE_LOCKING", locking)
    monkeypatch.setattr(speeds, "host_buffer", lambda size: made.append(size) or torch.empty(size, dtype=torch.uint8))
    speeds._together.cache_clear()
    assert speeds.measured_together([(torch.device("cpu"), 1e9), (torch.device("cpu", 0), 2e9)]) is None
    assert len(made) == allowed and not locking._refused
    speeds._together.cache_clear()


@pytest.mark.parametrize("gb_s", [0.2, 0.4, 0.85, 3.0, 12.0, 55.0])
def test_slow_links_copy_for_about_as_long(gb_s: float) -> None:
    """What all copy together counts until the last of them is done."""
    wanted = gb_s * 1e9 * speeds.TOGETHER_SECONDS
    size = speeds.piece_bytes(wanted)
    assert speeds.COPIED_BYTES % size == 0
    assert round(wanted / size) * size == pytest.approx(wanted, rel=0.1)


def test_what_the_allocator_has_and_what_is_used_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unused memory is given back only where more is held than may be."""
    held: dict[str, Any] = {"reserved_bytes": {"all": {"current": 7}}, "allocated_bytes": {"all": {"current": 5}}}
    emptied: list[str] = []
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: held if device == "cuda:1" else {})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: emptied.append(device))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("all"))
    assert [probe.allocated_bytes(device) for device in ("cuda:1", "cuda:0", "cpu")] == [5, 0, 0]
    for ceiling in (7, 8):
        probe.trim("cuda:1", ceiling)
        probe.trim("cuda:0", ceiling)
    assert emptied == []
    probe.trim("cuda:1", 6)
    assert emptied == ["cuda:1", "all"]
