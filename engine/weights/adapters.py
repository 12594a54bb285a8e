"""What LoRAs add to one expert. A block's matrices get theirs next to the product, so that changing a strength touches no large weight;
everything else they change is small, and is merged when it is read.

Shapes: R rank, of all LoRAs together.
"""

from collections.abc import Iterator, Sequence

import torch

from ..checkpoints.lora import LoraChoice, LowRank
from ..checkpoints.stored import StoredTensor
from .packing import Spec

DOWN, UP = "lora_A", "lora_B"


class Adapters:
    """The LoRAs of one expert, in order.

    Args:
        choices: the files and their strengths.
        matrices: names of the weights that get theirs next to the product.
    """

    def __init__(self, choices: Sequence[LoraChoice] = (), matrices: frozenset[str] = frozenset()):
        self._choices = tuple(choice for choice in choices if choice.strength)
        self._matrices = matrices
        self.key = tuple((choice.file.path, choice.file.fingerprint, choice.strength) for choice in self._choices)

    def merged(self, weight: str) -> bool:
        """Whether a parameter's own values are changed."""
        if not self._choices:
            return False  # asked several times for each of a model's parameters
        return any(True for _ in self._differences(weight)) or (weight not in self._matrices and any(True for _ in self._low_ranks(weight)))

    def specs(self, weight: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """What stands beside a block's matrix, by the names of its layer's parameters; nothing where no LoRA touches it."""
        rank = sum(low.rank for low, _ in self._low_ranks(weight)) if weight in self._matrices else 0
        return {DOWN: Spec((rank, shape[1]), dtype), UP: Spec((shape[0], rank), dtype)} if rank else {}

    def low_rank_sources(self, weight: str) -> list[StoredTensor]:
        """What must be read for :meth:`low_rank`."""
        return [tensor for low, _ in self._low_ranks(weight) for tensor in (low.down, low.up)]

    def low_rank(self, weight: str, dtype: torch.dtype, raws: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of :meth:`specs`, of those that were read: [R, in], and [out, R] with strengths and factors."""
        pairs = list(zip(raws[::2], raws[1::2], self._low_ranks(weight), strict=True))
        downs = [_wide(down) for down, _, _ in pairs]
        ups = [_wide(up) * (strength * low.factor) for _, up, (low, strength) in pairs]
        return {DOWN: torch.cat(downs).to(dtype), UP: torch.cat(ups, dim=1).to(dtype)}

    def merged_sources(self, weight: str) -> list[StoredTensor]:
        """What must be read for :meth:`merge`."""
        differences = [stored for stored, _ in self._differences(weight)]
        return differences if weight in self._matrices else [*differences, *self.low_rank_sources(weight)]

    def merge(self, weight: str, values: torch.Tensor, raws: Sequence[torch.Tensor]) -> torch.Tensor:
        """A parameter with what is added to its own values, which are changed: float32, contiguous."""
        left = list(raws)
        for _, strength in self._differences(weight):
            values.add_(_wide(left.pop(0)).reshape(values.shape), alpha=strength)
        if weight not in self._matrices:
            for low, strength in self._low_ranks(weight):
                down, up = _wide(left.pop(0)), _wide(left.pop(0))
                values.view(values.shape[0], -1).addmm_(up, down, alpha=strength * low.factor)
        return values

    def _differences(self, weight: str) -> Iterator[tuple[StoredTensor, float]]:
        for choice in self._choices:
            if weight in choice.file.differences:
                yield choice.file.differences[weight], choice.strength

    def _low_ranks(self, weight: str) -> Iterator[tuple[LowRank, float]]:
        module = weight.removesuffix(".weight")
        for choice in self._choices:
            if module != weight and module in choice.file.low_rank:
                yield choice.file.low_rank[module], choice.strength


def _wide(values: torch.Tensor) -> torch.Tensor:
    """A LoRA's matrix in float32; a convolution's as one, its kernel in the rows. Vectors stay what they are."""
    values = values.float()
    return values.flatten(1) if values.ndim > 2 else values
