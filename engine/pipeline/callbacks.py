"""How a run talks to whoever started it. Every call may raise to stop the run."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepReport:
    """A finished denoising step.

    Attributes:
        step: 1-based.
        steps: in all.
        expert: who worked, "high noise expert" or "low noise expert".
        seconds: how long the step took, loading and the expert switch included.
        loading_seconds: what of that went into bringing the expert's weights to their homes.
        forwards: how many forwards the step was: 2 with guidance, else 1.
        forwards_left: how many the steps after this one are.
        expert_to_come: who has not worked yet and will, or "".
        denoised: the expected clean latents, [B, C, F, H, W], normalised, on the main device.
    """

    step: int
    steps: int
    expert: str
    seconds: float
    loading_seconds: float
    forwards: int
    forwards_left: int
    expert_to_come: str
    denoised: torch.Tensor


@dataclass(frozen=True)
class Callbacks:
    """All optional.

    Attributes:
        check_cancelled: called often (between blocks, VAE chunks and parts being loaded).
        on_stage: a sentence on what is being done now.
        on_load: parts done, parts in all, what is being loaded.
        on_step: after each denoising step.
    """

    check_cancelled: Callable[[], None] = lambda: None
    on_stage: Callable[[str], None] = lambda words: None
    on_load: Callable[[int, int, str], None] = lambda done, total, what: None
    on_step: Callable[[StepReport], None] = lambda report: None
