"""Measuring without a model on real GPUs: figures of the right size, within the memory it says, all of it given back."""

import gc

import pytest
import torch
from wan_sharded.engine import OWNER, calibrate, probe
from wan_sharded.engine.parallel.measure import GPU_SHAPE, NEEDED_BYTES, measure_block

KEPT_BY_LIBRARIES = 80 * 2**20

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("index", range(max(1, torch.cuda.device_count())))
def test_a_block_within_its_memory(index: int) -> None:
    device = probe.probe_machine().devices[index]
    gc.collect()
    torch.cuda.empty_cache()
    before, reserved = torch.cuda.memory_allocated(device.torch_device), torch.cuda.memory_reserved(device.torch_device)
    torch.cuda.reset_peak_memory_stats(device.torch_device)
    speed = measure_block(device)
    assert (speed.tokens, speed.width) == (GPU_SHAPE.tokens, 5120)
    assert torch.cuda.max_memory_reserved(device.torch_device) <= reserved + NEEDED_BYTES
    gc.collect()
    # The block and its tokens are gone; what cuBLAS keeps for itself at its first product (tens of MiB) is not ours.
    assert torch.cuda.memory_allocated(device.torch_device) <= before + KEPT_BY_LIBRARIES
    # A block is no faster than its matrix products, and no more than ten times slower.
    assert device.speed_tflops is not None and 0.1 * device.speed_tflops < speed.tflops < 1.2 * device.speed_tflops
    again = measure_block(device)
    assert again.seconds == pytest.approx(speed.seconds, rel=0.5)


def test_everything() -> None:
    count = len(probe.visible_gpus())
    found = calibrate(OWNER)
    assert len(found.devices) == count and all(speed.block for speed in found.devices), found.text
    assert len(found.links) == 2 * count + count * (count - 1)
    assert all(link.bytes_per_s and 1e8 < link.bytes_per_s < 1e13 for link in found.links), found.text
    assert "planned for 832x480x81" in found.plan
    assert len(found.bars) == count + 1
    print(found.text)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_links_between_gpus() -> None:
    machine = probe.probe_machine()
    own = {device.index: device.link_bytes_per_s or 0.0 for device in machine.devices}
    reached = {
        (one.index, other.index)
        for one in machine.devices
        for other in machine.devices
        if one is not other and probe.reach_each_other(torch.device(one.torch_device), torch.device(other.torch_device))
    }
    assert set(machine.links.direct) == reached
    assert all(1e8 < speed < 1e13 for speed in machine.links.direct.values())
    together = machine.links.together_bytes_per_s
    # Copying both ways at once no GPU is slower than one way, nor faster than both.
    assert together is not None and 0.9 * max(own.values()) < together < 2.1 * sum(own.values())
    assert probe.probe_machine().links == machine.links, "measured once"
