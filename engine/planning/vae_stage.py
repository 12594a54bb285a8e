"""Where and how the VAE encodes or decodes. Pure."""

from dataclasses import dataclass

import torch

from .budgets import Budget
from .devices import gib
from .footprint import VideoShape, vae_bytes


@dataclass(frozen=True)
class VaeStage:
    """One encoding or decoding.

    Attributes:
        budget: the device and its limit.
        dtype: of the VAE.
        tiled: whether the picture is worked tile by tile.
        bytes_needed: what the stage is expected to take there.
        notes: sentences for people, where quality is given up for memory.
    """

    budget: Budget
    dtype: torch.dtype
    tiled: bool
    bytes_needed: int
    notes: tuple[str, ...] = ()


def vae_stages(shape: VideoShape, budgets: tuple[Budget, ...], *, decode: bool, fragmentation: float) -> tuple[VaeStage, ...]:
    """The ways that fit on the roomiest device, best first: float32 whole, bf16 whole, bf16 in tiles.

    Where even tiles are not expected to fit on a GPU, they are given all the same; it is what has the best chance.
    """
    roomiest = max(budgets, key=lambda budget: budget.usable_bytes)
    ways = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
    if not roomiest.device.is_gpu:
        ways = [(torch.float32, False), (torch.float32, True)]
    stages = []
    for dtype, tiled in ways:
        needed = vae_bytes(shape, decode=decode, element_bytes=dtype.itemsize, tiled=tiled, fragmentation=fragmentation)
        if needed <= roomiest.usable_bytes or (dtype, tiled) == ways[-1]:
            stages.append(VaeStage(roomiest, dtype, tiled, needed, _notes(shape, roomiest, dtype, tiled, decode, fragmentation)))
    return tuple(stages)


def _notes(shape: VideoShape, budget: Budget, dtype: torch.dtype, tiled: bool, decode: bool, fragmentation: float) -> tuple[str, ...]:
    if dtype == torch.float32 and not tiled:
        return ()
    how = " ".join(filter(None, ("in bf16" if dtype != torch.float32 else "", "in tiles" if tiled else "")))
    whole = vae_bytes(shape, decode=decode, element_bytes=4, tiled=False, fragmentation=fragmentation)
    words = (
        f"The VAE {'decoded' if decode else 'encoded'} {how}: in float32 and whole it would take {gib(whole)}, "
        f"{budget.device.label} may use {gib(budget.usable_bytes)}."
    )
    return (words,)
