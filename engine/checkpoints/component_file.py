"""What the readers of a text encoder's and a VAE's single file have in common: which formats they take, and how others are refused."""

from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointError
from .safetensors_header import read_header_and_metadata
from .stored import StoredTensor

_PICKLED = frozenset({".pth", ".pt", ".bin", ".ckpt", ".pkl"})


def read_component_file(path: Path, remedy: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file, by its own names, and the texts its author put beside them.

    Args:
        path: of the file.
        remedy: what to choose instead of a file of another format, as a sentence.

    Raises:
        CheckpointError: a pickled or a GGUF file, or missing, damaged or truncated.
    """
    suffix = path.suffix.lower()
    if suffix in _PICKLED:
        raise CheckpointError(f"{path.name} holds pickled weights ({suffix}), which can run code when they are loaded. {remedy}")
    if suffix == ".gguf":
        raise CheckpointError(f"{path.name} is a GGUF file; this pack reads GGUF for the experts only. {remedy}")
    return read_header_and_metadata(path)


def check_tensors(name: str, tensors: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], dtypes: tuple[str, ...]) -> None:
    """Check that everything is there, in the right shape and readable.

    Args:
        name: of the file, for messages.
        tensors: what it holds.
        expected: the shapes it should have; what else it holds is not looked at.
        dtypes: safetensors' names of those that can be read.

    Raises:
        CheckpointError: with the first tensor that is wrong.
    """
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise CheckpointError(f"{name} lacks {len(missing)} tensors, such as {missing[0]}. Download it again.")
    for key, shape in expected.items():
        stored = tensors[key]
        if stored.shape != shape:
            raise CheckpointError(f"{name}: tensor {stored.key} is {list(stored.shape)}, but should be {list(shape)}. Download it again.")
        if stored.dtype not in dtypes:
            raise CheckpointError(
                f"{name}: tensor {stored.key} is stored as {stored.dtype}, which can't be read here. Choose a file in one of {', '.join(dtypes)}."
            )
