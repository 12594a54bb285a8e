"""What would make a run fit: the numbers in and after an error message. Pure."""

from collections.abc import Callable
from dataclasses import replace

from ..errors import PlacementError
from .budgets import Budget
from .devices import GIB, gib
from .footprint import VideoShape, host_bytes

# What the sliders on the node move by.
SLIDER_STEP_GIB = 0.5

Fits = Callable[[tuple[Budget, ...]], bool]


def slider_remedy(budgets: tuple[Budget, ...], fits: Fits) -> str:
    """One sentence: the sliders that would do, or that none would. Arguments as for :func:`enough_sliders`."""
    found = enough_sliders(budgets, fits)
    return f"It fits with {found}." if found else "No position of the sliders is enough for it, with what is free on these GPUs now."


def enough_sliders(budgets: tuple[Budget, ...], fits: Fits) -> str | None:
    """The slider that would do alone and its smallest value, or all of them, in words; ``None`` if no position would.

    Args:
        budgets: which do not fit.
        fits: whether others would.
    """
    for budget in sorted(budgets, key=lambda budget: budget.limit_bytes - budget.ceiling_bytes):
        value = smallest_slider_gib(budgets, budget.device.index, fits)
        if value is not None:
            return f"the slider of {budget.device.label} at {value:g} or more"
    highest = tuple(_with_slider(budget, _highest_gib(budget)) for budget in budgets)
    if fits(highest):
        values = ", ".join(f"{budget.device.label}: {_highest_gib(budget):g}" for budget in budgets)
        return f"the sliders at {values}"
    return None


def smallest_slider_gib(budgets: tuple[Budget, ...], index: int, fits: Fits) -> float | None:
    """The smallest slider value of one GPU, in the node's steps, that fits while the others stay; ``None`` if none does."""
    budget = next(b for b in budgets if b.device.index == index)

    def enough(steps: int) -> bool:
        return fits(tuple(_with_slider(b, steps * SLIDER_STEP_GIB) if b is budget else b for b in budgets))

    low, high = int(budget.limit_bytes / GIB / SLIDER_STEP_GIB), int(_highest_gib(budget) / SLIDER_STEP_GIB)
    if high <= low or not enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high * SLIDER_STEP_GIB


def check_host_memory(shape: VideoShape, available_bytes: int, *, vae_on_host: bool) -> None:
    """Refuse a size whose frames alone overflow system memory; the operating system would end the whole program.

    Raises:
        PlacementError: they would.
    """
    needed = host_bytes(shape, vae_on_host=vae_on_host)
    if needed > available_bytes:
        raise PlacementError(
            f"{shape} needs {gib(needed)} of system memory for its frames, and {gib(available_bytes)} are free. "
            "Make the video smaller or shorter, or batch_size lower."
        )


def length_remedy(shape: VideoShape, place: Callable[[VideoShape], object]) -> str:
    """A sentence with the longest video of this width and height that fits, or nothing if the length is not what matters.

    Args:
        shape: which does not fit.
        place: raises ``PlacementError`` for sizes that don't.
    """

    def fits(latent_frames: int) -> bool:
        try:
            place(replace(shape, num_frames=4 * latent_frames - 3))
        except PlacementError:
            return False
        return True

    low, high = 0, shape.latent_frames
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return f" At {shape.width}x{shape.height}, length {4 * low - 3} fits." if low else ""


def _with_slider(budget: Budget, slider_gib: float) -> Budget:
    return replace(budget, limit_bytes=min(int(slider_gib * GIB), budget.ceiling_bytes), automatic=False)


def _highest_gib(budget: Budget) -> float:
    """The highest position of a slider that gives more than the one before it."""
    return -(-budget.ceiling_bytes // int(SLIDER_STEP_GIB * GIB)) * SLIDER_STEP_GIB
