"""LoRA files for Wan's experts: what each adds to which weight, in diffusers' names. Reads headers and scalars, never the matrices."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .stored import StoredTensor


@dataclass(frozen=True)
class LowRank:
    """What a LoRA adds to one module's weight: ``factor * up @ down``.

    Attributes:
        down: [rank, in], or a convolution's [rank, in, t, h, w].
        up: [out, rank], or [out, rank, 1, 1, 1].
        factor: alpha / rank; 1 where the file has no alpha.
    """

    down: StoredTensor
    up: StoredTensor
    factor: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class LoraFile:
    """A checked LoRA file.

    Attributes:
        path: of the file.
        fingerprint: changes when the file does.
        low_rank: diffusers' module name ("blocks.0.attn1.to_q") -> what is added to its weight.
        differences: diffusers' parameter name ("blocks.0.attn1.to_q.bias") -> what is added to it, of its shape.
        unmatched: keys of the file that belong to no weight of a Wan transformer.
    """

    path: Path
    fingerprint: str
    low_rank: Mapping[str, LowRank]
    differences: Mapping[str, StoredTensor]
    unmatched: tuple[str, ...] = ()
