"""FlashAttention 3 on a real Hopper GPU, where it is installed (pip install fa3-fwd): near torch's result, in any stream, the same bits twice, in runs."""

import importlib.util

import pytest
import torch
from wan_sharded.engine import ImageToVideoRequest, open_model
from wan_sharded.engine.owner import ModelOwner
from wan_sharded.engine.pipeline.image_to_video import ImageToVideo
from wan_sharded.engine.transformer import self_attention as flash
from wan_sharded.engine.transformer.self_attention import choose
from wan_sharded.engine.transformer.wan_block import attend

INSTALLED = any(importlib.util.find_spec(name) is not None for name in flash.MODULES)
HOPPER = torch.cuda.is_available() and all(
    torch.cuda.get_device_capability(index) == flash.HOPPER for index in range(torch.cuda.device_count())
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (INSTALLED and HOPPER), reason="needs Hopper GPUs and FlashAttention 3")]
MILLISECOND_CYCLES = 1_500_000


@pytest.fixture(scope="module", params=range(torch.cuda.device_count() or 1))
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cuda", request.param)


@pytest.fixture(autouse=True)
def chosen_if_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast: other work on the GPU would decide."""
    monkeypatch.setattr(flash, "FASTER_BY", float("inf"))
    monkeypatch.setattr(flash, "_choices", {})


def drawn(device: torch.device, queries: int, keys: int, heads: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16):
    """Some heads of a query, and keys and values side by side, as a forward has them."""
    key, value = torch.randn(batch, keys, 2, heads, 128, device=device, dtype=dtype).unbind(2)
    return torch.randn(batch, queries, heads + 2, 128, device=device, dtype=dtype)[:, :, 1:-1], key, value


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def test_it_is_right_for_half_precision_of_wans_heads(device):
    assert choose(device, torch.bfloat16, 128).flash
    assert not choose(device, torch.float32, 128).flash


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "batch"),
    [(1, 1, 1, 1), (7, 512, 3, 2), (1560, 32760, 4, 1), (5000, 5001, 5, 2), (75600, 129, 2, 1), (128, 75600, 40, 1)],
)
def test_as_near_to_the_exact_result_as_torch(device, queries, keys, heads, batch):
    attention = choose(device, torch.bfloat16, 128).attention
    with torch.inference_mode():
        given = drawn(device, queries, keys, heads, batch)
        got, usual = attention(*given), attend(*given)
        some = slice(None, None, max(1, queries // 500))
        exact = attend(*(tensor.double() for tensor in (given[0][:, some], *given[1:])))
    assert got.shape == usual.shape and got.dtype == usual.dtype
    assert error(got[:, some], exact) <= 1.1 * error(usual[:, some], exact) + 1e-4


def test_in_any_stream_the_same_bits(device):
    """Inputs come late in a stream of its own, and what they stand in is handed on meanwhile."""
    attention = choose(device, torch.bfloat16, 128).attention
    stream = torch.cuda.Stream(device)
    with torch.inference_mode(), torch.cuda.device(device):
        for _ in range(20):
            kept = [tensor.clone() for tensor in drawn(device, 3000, 3000, 5)]
            expected = attention(*kept)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(3 * MILLISECOND_CYCLES)
                moved = [tensor + 0 for tensor in kept]
                got = attention(*moved)
                del moved
                torch.full((3, 1, 3000, 5, 128), float("nan"), device=device, dtype=torch.bfloat16)
            stream.synchronize()
            assert torch.equal(got, expected)


@pytest.mark.parametrize("execution", ["parallel", "sequential"])
def test_a_run_uses_it_and_says_so(make_checkpoint, execution):
    folder = make_checkpoint(num_heads=2, head_dim=128)
    picture = torch.rand(96, 128, 3, generator=torch.Generator().manual_seed(3))
    request = ImageToVideoRequest(image=picture, prompt="a boat on a lake", width=128, height=96, num_frames=17, num_inference_steps=2)
    notes = ImageToVideo(ModelOwner())(open_model(folder, max_memory_gib={}, execution=execution), request).notes
    said = [note for note in notes if "FlashAttention 3" in note]
    assert len(said) == 1 and "computed attention by FlashAttention 3" in said[0], notes
