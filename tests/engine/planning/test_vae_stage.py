"""How the VAE is run, by what the roomiest device may use."""

import pytest
import torch
from imagined_machine import gpu, machine
from wan_sharded.engine.planning.budgets import budgets_for
from wan_sharded.engine.planning.devices import GIB, DeviceInfo
from wan_sharded.engine.planning.footprint import FRAGMENTATION, VideoShape
from wan_sharded.engine.planning.vae_stage import VaeStage, vae_stages

P480 = VideoShape(832, 480, 81)
P720 = VideoShape(1280, 720, 81)


def stage(shape: VideoShape, *sliders: float, decode: bool = True) -> VaeStage:
    budgets, _ = budgets_for(machine(*(gpu(index, 24) for index in range(len(sliders)))), dict(enumerate(sliders)))
    return vae_stages(shape, budgets, decode=decode, fragmentation=FRAGMENTATION)[0]


@pytest.mark.parametrize("decode", [True, False])
def test_float32_whole_where_it_fits(decode: bool) -> None:
    """The model case: 480p on a 16 GB card with its slider at 15."""
    chosen = stage(P480, 15, 11, decode=decode)
    assert (chosen.dtype, chosen.tiled, chosen.notes) == (torch.float32, False, ())
    assert chosen.bytes_needed <= chosen.budget.usable_bytes


def test_on_the_roomiest_device() -> None:
    assert stage(P480, 11, 15).budget.device.index == 1
    assert stage(P480, 15, 11).budget.device.index == 0


def test_bf16_whole_where_float32_is_too_large() -> None:
    chosen = stage(P720, 15)
    assert (chosen.dtype, chosen.tiled) == (torch.bfloat16, False)
    (note,) = chosen.notes
    assert note.startswith("The VAE decoded in bf16: in float32 and whole it would take ")
    assert "GPU 0 · Imagined 24 GB may use " in note


def test_tiles_where_bf16_is_too_large() -> None:
    chosen = stage(P720, 8)
    assert (chosen.dtype, chosen.tiled) == (torch.bfloat16, True)
    assert "in bf16 in tiles" in chosen.notes[0]
    assert chosen.bytes_needed <= chosen.budget.usable_bytes


def test_720p_on_the_model_case() -> None:
    """15 and 11 GiB: not float32, and whatever is chosen fits."""
    for decode in (True, False):
        chosen = stage(P720, 15, 11, decode=decode)
        assert chosen.dtype == torch.bfloat16
        assert chosen.bytes_needed <= chosen.budget.usable_bytes
        assert chosen.notes


def test_encoding_takes_less_than_decoding() -> None:
    """So the VAE never has to go back from bf16 to float32 within a run."""
    for gib in (2, 4, 6, 8, 10, 12, 15, 20, 24):
        for shape in (P480, P720, VideoShape(64, 48, 5), VideoShape(1920, 1088, 121)):
            encode, decode = stage(shape, gib, decode=False), stage(shape, gib, decode=True)
            assert encode.bytes_needed <= decode.bytes_needed or decode.dtype.itemsize < encode.dtype.itemsize or decode.tiled
            assert encode.dtype.itemsize >= decode.dtype.itemsize


def test_a_smaller_budget_never_takes_more() -> None:
    sizes = [stage(P720, gib / 2).bytes_needed for gib in range(4, 48)]
    assert sizes == sorted(sizes)


def test_the_last_way_where_nothing_fits() -> None:
    chosen = stage(P720, 1)
    assert (chosen.dtype, chosen.tiled) == (torch.bfloat16, True)


@pytest.mark.parametrize(("total_gib", "tiled"), [(64, False), (8, True)])
def test_the_cpu_stays_in_float32(total_gib: int, tiled: bool) -> None:
    cpu = DeviceInfo(0, "CPU", "cpu", total_gib * GIB, total_gib * GIB, is_gpu=False)
    budgets, _ = budgets_for(machine(cpu), {})
    chosen = vae_stages(P480, budgets, decode=True, fragmentation=FRAGMENTATION)[0]
    assert (chosen.dtype, chosen.tiled) == (torch.float32, tiled)


def test_every_way_down() -> None:
    """Should the best way run out of memory after all, the next one is there."""
    budgets, _ = budgets_for(machine(gpu(0, 24)), {0: 15})
    ways = vae_stages(P480, budgets, decode=True, fragmentation=FRAGMENTATION)
    assert [(way.dtype, way.tiled) for way in ways] == [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
    assert [way.bytes_needed for way in ways] == sorted((way.bytes_needed for way in ways), reverse=True)
