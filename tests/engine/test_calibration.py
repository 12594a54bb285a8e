"""Measuring without a model, on the CPU; and plans for the 14B shape on imagined machines."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from example_report import GPUS, published_checkpoint
from imagined_machine import gpu, machine
from wan_sharded.engine import calibration, probe
from wan_sharded.engine.calibration import Calibration, calibrate, main, model_shape
from wan_sharded.engine.checkpoints.stored import HIGH_NOISE
from wan_sharded.engine.errors import BusyError, InvalidRequestError
from wan_sharded.engine.owner import ModelOwner
from wan_sharded.engine.parallel.measure import CPU_SHAPE, measure_block, measure_link
from wan_sharded.engine.planning.devices import GIB, DeviceInfo, Links, Machine

CPU = torch.device("cpu")
CPU_DEVICE = DeviceInfo(0, "CPU", "cpu", 64 * GIB, 56 * GIB, is_gpu=False)


def planned(monkeypatch: pytest.MonkeyPatch, where: Machine, **options: object) -> Calibration:
    """A plan for an imagined machine, none of which can be measured."""
    monkeypatch.setattr(probe, "probe_machine", lambda: where)
    return calibrate(ModelOwner(), measure=False, **options)


def test_a_block_is_timed_by_a_run_s_own_code() -> None:
    speed = measure_block(CPU_DEVICE)
    assert speed.tokens == CPU_SHAPE.tokens and speed.width == 512
    assert speed.seconds > 0 and speed.tflops > 0


def test_a_link_is_timed() -> None:
    assert measure_link(CPU, CPU) > 1e6


def test_everything_on_the_cpu() -> None:
    owner = ModelOwner()
    found = calibrate(owner, width=650, height=640, length=33)
    (device,) = found.devices
    assert device.block is not None and found.links == ()
    assert "650x640 is no multiple of 16; made 640x640 instead." in found.text
    assert "planned for 640x640x33" in found.plan and found.text.endswith(found.plan)
    assert owner.loaded is None and owner.lock.acquire(blocking=False)


def test_what_gpus_copy_together_is_said_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    where = machine(gpu(0), gpu(1))
    words = "all GPUs from and to system memory at once: 110.0 GB/s"
    assert words in planned(monkeypatch, replace(where, links=Links(together_bytes_per_s=110e9))).text.splitlines()
    assert "at once: " not in planned(monkeypatch, where).text


def test_the_text_names_nothing_personal() -> None:
    import getpass
    import platform

    text = calibrate(ModelOwner()).text
    personal = (getpass.getuser(), platform.node(), str(Path.home()), str(Path.cwd()))
    assert [word for word in personal if len(word) > 3 and word in text] == []


def test_the_shape_is_that_of_the_published_model() -> None:
    made, published = model_shape().experts[HIGH_NOISE], published_checkpoint().experts[HIGH_NOISE]
    assert {name: tensor.shape for name, tensor in made.tensors.items()} == {name: t.shape for name, t in published.tensors.items()}
    assert {name: value for name, value in made.config.items() if not name.startswith("_")}.items() <= published.config.items()


def test_a_precision_that_a_gpu_cannot_compute_in_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    old = replace(GPUS[1], compute_capability=(7, 5))
    found = planned(monkeypatch, Machine((GPUS[0], old), 56 * GIB), weight_dtype="bf16")
    assert found.plan.startswith(f"weight_dtype is bf16, which {old.label} cannot compute in.") and found.bars == ()
    assert old.label in found.text, "what was measured is there all the same"


def test_gpus_links_and_the_plan_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = replace(GPUS[0], speed_tflops=88.0, compute_capability=(12, 0))
    found = planned(monkeypatch, Machine((timed, GPUS[1]), 56 * GIB, ("One GPU is hidden.",)), max_memory_gib={0: 15, 1: 11})
    lines = found.text.splitlines()
    assert "GPU 0 · RTX 5060 Ti 16 GB: 15.9 GiB, 15.0 GiB free, compute capability 12.0, matrix products 88.0 TFLOP/s" in lines
    assert "One GPU is hidden." in lines
    assert [line for line in lines if line.endswith("not measured")] == [
        "system memory to GPU 0: not measured", "GPU 0 to system memory: not measured", "system memory to GPU 1: not measured",
        "GPU 1 to system memory: not measured", "GPU 0 to GPU 1: not measured", "GPU 1 to GPU 0: not measured",
    ]  # fmt: skip
    assert [bar.label for bar in found.bars] == [GPUS[0].label, GPUS[1].label, "system memory"]


def test_what_does_not_fit_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(monkeypatch, machine(gpu(0, 4), host_gib=8))
    assert found.bars == () and found.plan.startswith("832x480x81 would not fit: ")


def test_a_full_gpu_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is loaded is let go before that is said."""
    released = []
    owner = ModelOwner()
    monkeypatch.setattr(owner, "release", lambda: released.append(True))
    monkeypatch.setattr(probe, "probe_machine", lambda: machine(gpu(0, 16, 2)))
    monkeypatch.setattr(calibration, "_link_speed", lambda source, target: None)  # there is no such device to copy to
    found = calibrate(owner)
    assert released and "not measured: that takes 3.0 GiB" in found.text


@pytest.mark.parametrize("wrong", [{"width": 3}, {"length": 100_000}, {"weight_dtype": "fp4"}, {"execution": "fast"}], ids=str)
def test_bad_values_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=str(next(iter(wrong.values())))):
        calibrate(ModelOwner(), **wrong)


def test_not_beside_a_run() -> None:
    owner = ModelOwner()
    begun, done = threading.Event(), threading.Event()

    def run() -> None:
        with owner.lock:
            begun.set()
            done.wait(60)

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait(60)
    try:
        with pytest.raises(BusyError, match="being made"):
            calibrate(owner)
    finally:
        done.set()
        thread.join()


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--length", "17", "--weight-dtype", "int8"])
    assert "int8 (computing in bf16), planned for 832x480x17" in capsys.readouterr().out
