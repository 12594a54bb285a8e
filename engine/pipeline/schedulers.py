"""The solvers by the names on the node, and where the high noise expert hands over."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from ..errors import InvalidRequestError

TRAIN_TIMESTEPS = 1000


class _FromTheFirstStep:
    """Starts at the first noise level, instead of looking for it by its timestep.

    Timesteps are whole numbers; several hundred steps have some of them twice, and diffusers then starts at the second one, so that the
    last step has no noise level left.
    """

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)  # type: ignore[misc]
        self.set_begin_index(0)  # type: ignore[attr-defined]


class WanUniPCScheduler(_FromTheFirstStep, UniPCMultistepScheduler):  # type: ignore[misc]
    """diffusers' UniPC for any number of steps."""


class WanDPMSolverScheduler(_FromTheFirstStep, DPMSolverMultistepScheduler):  # type: ignore[misc]
    """diffusers' DPM-Solver++ for any number of steps."""


class WanEulerScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler over Wan's own noise levels: ``linspace(1, 0, steps + 1)[:-1]``, shifted once.

    diffusers' default spacing ends at the smallest trained noise level and shifts twice, which spends one of four steps
    of a 4-step LoRA on almost no noise.
    Source: get_sampling_sigmas in Wan-Video/Wan2.2 (wan/utils/fm_solvers.py).
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None, **kwargs) -> None:  # type: ignore[override]
        sigmas = np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1]
        super().set_timesteps(sigmas=sigmas.tolist(), device=device, **kwargs)  # type: ignore[arg-type]


def _unipc(shift: float):
    return WanUniPCScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=TRAIN_TIMESTEPS, flow_shift=shift)


def _euler(shift: float):
    return WanEulerScheduler(num_train_timesteps=TRAIN_TIMESTEPS, shift=shift)


def _dpmpp(shift: float):
    return WanDPMSolverScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=TRAIN_TIMESTEPS, flow_shift=shift
    )


_MAKERS: dict[str, Callable[[float], UniPCMultistepScheduler | FlowMatchEulerDiscreteScheduler | DPMSolverMultistepScheduler]] = {
    "unipc": _unipc,
    "euler": _euler,
    "dpm++": _dpmpp,
}
SAMPLER_NAMES = tuple(_MAKERS)


def make_scheduler(sampler_name: str, shift: float):
    """A fresh diffusers scheduler.

    Args:
        sampler_name: one of ``SAMPLER_NAMES``.
        shift: flow shift, above 0.

    Raises:
        InvalidRequestError: the name is unknown.
    """
    if sampler_name not in _MAKERS:
        raise InvalidRequestError(f"sampler_name is {sampler_name!r}; choose one of {', '.join(SAMPLER_NAMES)}.")
    return _MAKERS[sampler_name](shift)


def boundary_after(scheduler: Any, steps: int, switch_step: int) -> float:
    """The boundary ratio at which exactly the first ``switch_step`` of ``steps`` steps go to the high noise expert.

    Among several hundred steps some have the same whole-numbered timestep as their neighbour: such steps stay together.
    """
    scheduler.set_timesteps(steps)
    timesteps = [float(t) for t in scheduler.timesteps]
    if switch_step >= len(timesteps):
        return 0.0
    return (timesteps[switch_step - 1] + timesteps[switch_step]) / 2 / TRAIN_TIMESTEPS
