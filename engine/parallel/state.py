"""What one worker holds in the course of one forward.

Shapes: B batch, L tokens, l a worker's tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..transformer.lean_block import token_ranges as ranges_of
from .crew import Exchange, Share
from .fetching import Fetcher
from .workers import Mark, Moment, Worker


@dataclass
class Inputs:
    """What one worker needs of a forward's inputs, on its device."""

    temb: torch.Tensor
    text: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    out_shift: torch.Tensor
    out_scale: torch.Tensor
    out_weight: torch.Tensor
    out_bias: torch.Tensor


@dataclass
class State:
    """One worker in one forward."""

    share: Share
    tokens: slice
    x: torch.Tensor
    inputs: Inputs
    fetcher: Fetcher
    exchange: Exchange | None = None
    query: torch.Tensor | None = None
    weights: Any = None
    text_keys: Any = None
    projected: Mark = None
    attended: Mark = None
    pulled: list[Mark] = field(default_factory=list)
    arrived: list[list[Mark]] = field(default_factory=list)
    timed: list[list[Moment]] = field(default_factory=list)
    out: torch.Tensor | None = None

    @property
    def worker(self) -> Worker:
        return self.share.worker

    @property
    def count(self) -> int:
        return self.tokens.stop - self.tokens.start

    def lap(self) -> None:
        """Work begins or ends here, by turns; what is between an end and the next beginning is waiting."""
        self.timed[-1].append(self.worker.now())

    def ranges(self) -> list[slice]:
        """The worker's tokens in the ranges it works on at a time, counted from its first."""
        return list(ranges_of(self.count, self.share.range_tokens or None))

    def forget_tensors(self) -> None:
        """Keep what was timed only."""
        del self.x, self.inputs, self.fetcher
        self.exchange = self.out = None


@dataclass(frozen=True)
class Timing:
    """What a forward took of one worker: its tokens, and the seconds it was busy with one block."""

    tokens: int
    seconds: float


def placed(whole: torch.Tensor | None, piece: torch.Tensor, span: slice, count: int) -> torch.Tensor:
    """A range's result in the tensor of all ranges, which the first of several makes."""
    if piece.shape[1] == count:
        return piece
    if whole is None:
        whole = piece.new_empty(piece.shape[0], count, *piece.shape[2:])
    whole[:, span] = piece
    return whole


def joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pieces of the tokens, one behind the other."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=1)


def busy_seconds(blocks: Sequence[Sequence[Moment]]) -> float:
    """Median over blocks of the time a worker computed, waiting for the others left out.

    Args:
        blocks: of each timed block, moments in pairs: work began, work ended.
    """
    totals = [sum(begin.seconds_until(end) for begin, end in zip(moments[::2], moments[1::2], strict=True)) for moments in blocks]
    return sorted(totals)[len(totals) // 2] if totals else 0.0
