"""What a checkpoint holds, as its headers say, whichever format it has: names in diffusers' spelling, and where the bytes are.

Made by the readers of the formats; used by whoever loads weights. Holds no tensors.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HIGH_NOISE, LOW_NOISE = "transformer", "transformer_2"
EXPERT_WORDS = {HIGH_NOISE: "high noise expert", LOW_NOISE: "low noise expert"}
LATENT_CHANNELS = 16
# Noise, the picture's latents, and four channels that say which frames are given.
INPUT_CHANNELS = 2 * LATENT_CHANNELS + 4
# GGUF's types are named like this, with the format's own name behind it: "GGUF:Q4_K".
GGUF_PREFIX = "GGUF:"
# Safetensors' names of what stays in few bits.
FEW_BITS = frozenset({"F8_E4M3", "F8_E5M2", "I8"})


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        file: that holds it.
        key: its name there.
        dtype: safetensors' name ("BF16", "F8_E4M3", "I8", ...), or "GGUF:" and the GGUF type ("GGUF:Q8_0").
        shape: of the values; a GGUF tensor's are those it has once it is widened.
        offset: where in the file its first byte is.
        size_bytes: how many bytes it takes there.
        scale: what the values must be multiplied by, a tensor of one value, or of one per row ([out] or [out, 1]).
        modified_ns: when the file was last modified; 0 where that is not known. Its bytes mean this only as long as that stays.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int
    scale: "StoredTensor | None" = None
    modified_ns: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def few_bits(self) -> bool:
        return is_few_bits(self.dtype)

    @property
    def gguf_type(self) -> str | None:
        """GGUF's name of the type, for a tensor of such a file."""
        return self.dtype.removeprefix(GGUF_PREFIX) if self.dtype.startswith(GGUF_PREFIX) else None


def is_few_bits(dtype: str) -> bool:
    """Whether a stored dtype is one of few bits."""
    return dtype in FEW_BITS or dtype.startswith(GGUF_PREFIX)


def _most(tensors: Iterable[StoredTensor]) -> str:
    """The dtype that most of the elements have."""
    counts: dict[str, int] = {}
    for stored in tensors:
        counts[stored.dtype] = counts.get(stored.dtype, 0) + stored.elements
    return max(counts, key=lambda name: counts[name])


@dataclass(frozen=True)
class ComponentFiles:
    """The weights of one expert.

    Attributes:
        name: for messages: "folder/transformer", or the file's name.
        config: of the ``WanTransformer3DModel`` that they belong to.
        tensors: diffusers' parameter name -> what is stored.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def stored_dtype(self) -> str:
        """What the blocks' matrices have in few bits, where some of them do; else the dtype most of the elements have."""
        few = [stored for name, stored in self.tensors.items() if name.startswith("blocks.") and len(stored.shape) == 2 and stored.few_bits]
        return _most(few or self.tensors.values())

    @property
    def wide_dtype(self) -> str | None:
        """The dtype most of the elements have, if that is none of few bits."""
        most = _most(self.tensors.values())
        return None if is_few_bits(most) else most


@dataclass(frozen=True)
class ModelFiles:
    """A checked Wan 2.2 image-to-video model.

    Attributes:
        name: what people call it.
        experts: the weights of "transformer" and "transformer_2".
        text_encoder: a folder in transformers format, or a single file; ``None`` where there is none.
        tokenizer: its folder; ``None`` where the text encoder's file has it inside.
        vae: a folder in diffusers format, or a single file; ``None`` where there is none.
        fingerprint: changes when a file of the model does; with ``name`` the identity of what is loaded.
        boundary_ratio: where the high noise expert hands over, as the model's own configuration says.
        notes: sentences for people, such as which files were found by themselves.
    """

    name: str
    experts: Mapping[str, ComponentFiles]
    text_encoder: Path | None
    tokenizer: Path | None
    vae: Path | None
    fingerprint: str
    boundary_ratio: float | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)


def fingerprint_of(files: list[Path]) -> str:
    """Changes when one of the files does."""
    stats = [(file, file.stat()) for file in files]
    return "|".join(f"{file.parent.name}/{file.name}:{stat.st_size}:{stat.st_mtime_ns}" for file, stat in stats)
