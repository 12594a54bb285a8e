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


def choose_vae_stage(shape: VideoShape, budgets: tuple[Budget, ...], *, decode: bool, fragmentation: float) -> VaeStage:
    """The best way that fits: float32 whole, then bf16 whole, then bf16 in tiles, on the roomiest device.

    Where even tiles don't fit on a GPU the last way is returned all the same; it is what has the best chance.
    """
    roomiest = max(budgets, key=lambda budget: budget.usable_bytes)
    word = "decodes" if decode else "encodes"
    ways = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
    if not roomiest.device.is_gpu:
        ways = [(torch.float32, False), (torch.float32, True)]
    needed = 0
    for dtype, tiled in ways:
        needed = vae_bytes(shape, decode=decode, element_bytes=dtype.itemsize, tiled=tiled, fragmentation=fragmentation)
        if needed <= roomiest.usable_bytes:
            break
    else:
        dtype, tiled = ways[-1]
    notes = []
    if dtype != torch.float32 or tiled:
        how = " ".join(filter(None, ("in bf16" if dtype != torch.float32 else "", "in tiles" if tiled else "")))
        whole = vae_bytes(shape, decode=decode, element_bytes=4, tiled=False)
        notes.append(f"The VAE {word} {how}: in float32 it would take {gib(whole)}, {roomiest.device.label} has {gib(roomiest.usable_bytes)}.")
    return VaeStage(roomiest, dtype, tiled, needed, tuple(notes))
