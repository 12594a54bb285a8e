"""What the tests of the writer share: frames and sound to write."""

from collections.abc import Callable

import pytest
import torch


@pytest.fixture
def frames() -> torch.Tensor:
    """[12, 48, 64, 3]: a gradient that moves, so that every frame differs."""
    x = torch.linspace(0, 1, 64)[None, None, :].expand(12, 48, 64)
    y = torch.linspace(0, 1, 48)[None, :, None].expand(12, 48, 64)
    t = torch.linspace(0, 1, 12)[:, None, None].expand(12, 48, 64)
    return torch.stack([x, y, t], dim=-1).contiguous()


@pytest.fixture(scope="session")
def clip() -> Callable[..., dict]:
    """``clip(seconds, rate=44_100, channels=2)``: an AUDIO that is silent but for one click at 0.5 s."""

    def make(seconds: float, rate: int = 44_100, channels: int = 2) -> dict:
        waveform = torch.zeros(1, channels, int(seconds * rate))
        waveform[..., rate // 2 : rate // 2 + 32] = 0.9
        return {"waveform": waveform, "sample_rate": rate}

    return make
