"""A block's weights in one piece of memory, so that bringing a block somewhere is one copy.

Knows tensors and bytes; not files, homes or devices' budgets. Quantized tensors (torchao's) are taken apart into the plain tensors
inside them and put together again over other memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

# What kernels read at a time.
ALIGNMENT_BYTES = 16
Rebuild = Callable[[Iterator[torch.Tensor]], torch.Tensor]


def take_apart(tensor: torch.Tensor) -> tuple[list[torch.Tensor], Rebuild]:
    """The plain tensors inside a tensor, and what makes one like it of others of the same shapes."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor], next
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = [take_apart(getattr(tensor, name)) for name in names]
    kind, size, stride = type(tensor), tensor.size(), tensor.stride()

    def rebuild(pieces: Iterator[torch.Tensor]) -> torch.Tensor:
        inner = {name: again(pieces) for name, (_, again) in zip(names, parts, strict=True)}
        return kind.__tensor_unflatten__(inner, context, size, stride)  # type: ignore[attr-defined]

    return [piece for pieces, _ in parts for piece in pieces], rebuild


@dataclass(frozen=True)
class _Piece:
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        return _view(flat, self.offset, self.shape, self.dtype)


@dataclass(frozen=True)
class _Entry:
    pieces: tuple[_Piece, ...]
    rebuild: Rebuild

    @property
    def plain(self) -> bool:
        return self.rebuild is next


class Layout:
    """Where each tensor of a block stands in its one piece of memory. Equal for all blocks of a model.

    Args:
        tensors: name -> tensor, whose shapes and dtypes count.
        together: groups of names to lie one behind the other without a gap, each with the name of the whole. Where the members are
            plain, of one dtype and differ in their first dimension only, :meth:`bind` gives the whole as well.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], together: Iterable[tuple[str, tuple[str, ...]]] = ()):
        self._entries: dict[str, _Entry] = {}
        self._wholes: dict[str, _Piece] = {}
        self.total_bytes = 0
        for whole, names in together:
            members = [tensors[name] for name in names if name in tensors]
            if len(members) == len(names) and _stack(members):
                begin = self._align()
                for name, tensor in zip(names, members, strict=True):
                    self._add(name, tensor, align=False)
                shape = torch.Size([sum(t.shape[0] for t in members), *members[0].shape[1:]])
                self._wholes[whole] = _Piece(begin, shape, members[0].dtype)
        for name, tensor in tensors.items():
            if name not in self._entries:
                self._add(name, tensor, align=True)
        self._align()

    def _align(self) -> int:
        self.total_bytes = -(-self.total_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return self.total_bytes

    def _add(self, name: str, tensor: torch.Tensor, *, align: bool) -> None:
        inner, rebuild = take_apart(tensor)
        pieces = []
        for plain in inner:
            offset = self._align() if align else self.total_bytes
            pieces.append(_Piece(offset, plain.shape, plain.dtype))
            self.total_bytes = offset + plain.numel() * plain.dtype.itemsize
        self._entries[name] = _Entry(tuple(pieces), rebuild)

    def bind(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors, by name, as views of ``flat``: uint8 [total_bytes] on any device."""
        bound = {name: entry.rebuild(piece.view(flat) for piece in entry.pieces) for name, entry in self._entries.items()}
        return {**bound, **{name: piece.view(flat) for name, piece in self._wholes.items()}}

    def fill(self, flat: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors of this layout into ``flat``, from wherever they are."""
        for name in self._entries:
            self.fill_one(flat, name, tensors[name])

    def fill_one(self, flat: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
        """Copy one tensor to its place in ``flat``."""
        inner, _ = take_apart(tensor)
        for piece, source in zip(self._entries[name].pieces, inner, strict=True):
            piece.view(flat).copy_(source, non_blocking=True)

    def same_as(self, other: "Layout") -> bool:
        """Whether memory of one can hold the other's tensors at the same places."""
        mine = {name: entry.pieces for name, entry in self._entries.items()}
        theirs = {name: entry.pieces for name, entry in other._entries.items()}
        return mine == theirs


def _stack(tensors: list[torch.Tensor]) -> bool:
    first = tensors[0]
    return all(
        not hasattr(t, "__tensor_flatten__") and t.dtype == first.dtype and t.shape[1:] == first.shape[1:] and t.ndim > 0 for t in tensors
    )


def _view(flat: torch.Tensor, offset: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return flat[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)
