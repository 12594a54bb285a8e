"""Noise levels, and the step at which the high noise expert hands over."""

import pytest
import torch
from wan_sharded.engine.errors import InvalidRequestError
from wan_sharded.engine.pipeline.schedulers import SAMPLER_NAMES, boundary_after, make_scheduler


def wan_sigmas(steps: int, shift: float) -> torch.Tensor:
    """Wan's own: evenly spaced from 1, shifted once."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    return shift * even / (1 + (shift - 1) * even)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20, 50])
def test_euler_has_wans_noise_levels(steps: int, shift: float) -> None:
    scheduler = make_scheduler("euler", shift)
    scheduler.set_timesteps(steps)
    assert torch.allclose(scheduler.sigmas[:-1].double(), wan_sigmas(steps, shift), atol=1e-6)
    assert float(scheduler.sigmas[-1]) == 0
    assert torch.allclose(scheduler.timesteps.double(), 1000 * wan_sigmas(steps, shift), atol=1e-3)


def test_a_4_step_lora_at_shift_5() -> None:
    """What the 4-step LoRAs were made for; the switch belongs after the second."""
    scheduler = make_scheduler("euler", 5.0)
    scheduler.set_timesteps(4)
    assert [round(float(t), 1) for t in scheduler.timesteps] == [1000.0, 937.5, 833.3, 625.0]
    assert 0.8333 < boundary_after(make_scheduler("euler", 5.0), 4, 2) <= 0.9375


@pytest.mark.parametrize("sampler_name", SAMPLER_NAMES)
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 20, 40, 100])
def test_exactly_so_many_steps_before_the_switch(sampler_name: str, shift: float, steps: int) -> None:
    for switch_step in {1, 2, steps // 2, steps - 1, steps, steps + 5} - {0}:
        scheduler = make_scheduler(sampler_name, shift)
        boundary = boundary_after(scheduler, steps, switch_step)
        scheduler.set_timesteps(steps)
        assert sum(float(t) >= boundary * 1000 for t in scheduler.timesteps) == min(switch_step, steps), (switch_step, boundary)


@pytest.mark.parametrize("sampler_name", SAMPLER_NAMES)
def test_as_many_steps_as_asked(sampler_name: str) -> None:
    for steps in (1, 4, 20, 1000):
        scheduler = make_scheduler(sampler_name, 5.0)
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps


@pytest.mark.parametrize("sampler_name", SAMPLER_NAMES)
@pytest.mark.parametrize("steps", [4, 400, 1000])
def test_many_steps_arrive_where_the_flow_ends(sampler_name: str, steps: int) -> None:
    """Several hundred steps have some whole-numbered timesteps twice."""
    scheduler = make_scheduler(sampler_name, 1.0)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(steps)
    picture, noise = torch.randn(2, 1, 16, 2, 3, 3, generator=generator)
    sample = noise
    for timestep in scheduler.timesteps:
        sample = scheduler.step(noise - picture, timestep, sample, return_dict=False)[0]
    assert torch.allclose(sample, picture, atol=1e-2)


def test_unknown_names() -> None:
    with pytest.raises(InvalidRequestError, match="sampler_name is 'ddim'; choose one of unipc, euler"):
        make_scheduler("ddim", 5.0)
