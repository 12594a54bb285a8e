"""A part's weights in one piece of memory, so that bringing a block somewhere is one copy.

Knows names, shapes and bytes; not files, homes or devices' budgets.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

# What kernels read at a time.
ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor that need not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Spec":
        return cls(tuple(tensor.shape), tensor.dtype)


@dataclass(frozen=True)
class _Piece:
    offset: int
    spec: Spec

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        return tuple(math.prod(self.spec.shape[i + 1 :]) for i in range(len(self.spec.shape)))

    def view(self, typed: torch.Tensor) -> torch.Tensor:
        """Its view of the whole memory, as which it is seen in this piece's dtype."""
        begin = typed.storage_offset() + self.offset // self.spec.dtype.itemsize
        return typed.as_strided(self.spec.shape, self._strides, begin)


class Layout:
    """Where each tensor of a part stands in its one piece of memory. Equal for blocks that hold the same things.

    Args:
        specs: name -> what stands there.
        together: groups of names to lie one behind the other without a gap, each with the name of the whole. Where the members are of
            one dtype and differ in their first dimension only, :meth:`bind` gives the whole as well. A group may be part of one before it.
        kinds: what :meth:`bind` gives besides tensors (wan_block.py); members of ``together`` that have one are not joined.
    """

    def __init__(
        self, specs: Mapping[str, Spec], together: Iterable[tuple[str, tuple[str, ...]]] = (), kinds: Mapping[str, str] | None = None
    ):
        self.specs, self.kinds = dict(specs), dict(kinds or {})
        self._pieces: dict[str, _Piece] = {}
        self._wholes: dict[str, _Piece] = {}
        self.total_bytes = 0
        for whole, names in together:
            members = [specs[name] for name in names if name in specs]
            if len(members) == len(names) and _stack(members) and not any(f"{name}.gguf" in self.kinds for name in names):
                if not any(name in self._pieces for name in names):
                    self._align()
                    for name, spec in zip(names, members, strict=True):
                        self._add(name, spec, align=False)
                if not self._lie_together(names):
                    continue
                begin = self._pieces[names[0]].offset
                shape = (sum(spec.shape[0] for spec in members), *members[0].shape[1:])
                self._wholes[whole] = _Piece(begin, Spec(shape, members[0].dtype))
        for name, spec in specs.items():
            if name not in self._pieces:
                self._add(name, spec, align=True)
        self._align()

    def _lie_together(self, names: Sequence[str]) -> bool:
        """One behind the other, as members of a longer group do, too."""
        pieces = [self._pieces.get(name) for name in names]
        return all(a and b and a.offset + a.spec.size_bytes == b.offset for a, b in pairwise(pieces))

    def _align(self) -> int:
        self.total_bytes = -(-self.total_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return self.total_bytes

    def _add(self, name: str, spec: Spec, *, align: bool) -> None:
        offset = self._align() if align else self.total_bytes
        self._pieces[name] = _Piece(offset, spec)
        self.total_bytes = offset + spec.size_bytes

    def bind(self, flat: torch.Tensor, views: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
        """The tensors, by name, as views of ``flat``: uint8 [total_bytes] on any device; and the kinds.

        Args:
            flat: the memory.
            views: of it, where :meth:`views` made them before.
        """
        return {**(self.views(flat) if views is None else views), **_views(self._wholes, flat), **self.kinds}

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that were asked for, by name, as views of ``flat``."""
        return _views({name: self._pieces[name] for name in self.specs}, flat)

    def view(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """One of the tensors, as a view of ``flat``."""
        return self._pieces[name].view(flat.view(self.specs[name].dtype))

    def span(self, name: str) -> slice:
        """The bytes of ``flat`` in which a tensor stands."""
        piece = self._pieces[name]
        return slice(piece.offset, piece.offset + piece.spec.size_bytes)

    def fill(self, flat: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors of this layout into ``flat``, from wherever they are."""
        for name, view in self.views(flat).items():
            view.copy_(tensors[name], non_blocking=True)

    def same_as(self, other: "Layout") -> bool:
        """Whether memory of one can hold the other's tensors at the same places."""
        return self._pieces == other._pieces and self.kinds == other.kinds


def _views(pieces: Mapping[str, _Piece], flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """One call of torch's for each: while others read files, it is those that take time."""
    typed = {dtype: flat.view(dtype) for dtype in {piece.spec.dtype for piece in pieces.values()}}
    return {name: piece.view(typed[piece.spec.dtype]) for name, piece in pieces.items()}


def _stack(specs: list[Spec]) -> bool:
    first = specs[0]
    return all(spec.dtype == first.dtype and spec.shape[1:] == first.shape[1:] and len(spec.shape) > 0 for spec in specs)
