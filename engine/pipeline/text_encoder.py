"""The UMT5 text encoder and its tokenizer from folders in transformers format, and what is the same for every way to load them.

Called by :mod:`.text`; single files are :mod:`.text_encoder_file`'s.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoTokenizer, UMT5EncoderModel

from ..checkpoints.diffusers_folder import weight_files
from ..checkpoints.safetensors_header import read_header
from ..checkpoints.stored import StoredTensor
from ..checkpoints.umt5_file import CHOOSE_TEXT_ENCODER
from ..errors import CheckpointError
from ..memory_errors import is_out_of_memory
from ..planning.devices import GIB

# accelerate's ``max_memory``: torch index of a GPU or "cpu" -> bytes. ``None`` is the CPU alone.
Room = Mapping[int | str, int] | None
CheckCancelled = Callable[[], None]

DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
# Besides weights, for two prompts of 512 tokens: activations and the workspaces of a first matmul, in 16 bits.
ACTIVATION_BYTES = int(0.75 * GIB)


@dataclass(frozen=True)
class LoadedTextEncoder:
    """What encodes prompts.

    Attributes:
        tokenizer: called as transformers' are.
        model: a ``UMT5EncoderModel``.
        dtype: of its embeddings.
    """

    tokenizer: Any
    model: Any
    dtype: torch.dtype


class TextEncoderSource(Protocol):
    """A text encoder that is not loaded yet.

    Attributes:
        name: for messages.
        weight_bytes: what it takes once it is loaded.
        activation_bytes: what it takes beside that while it works.
    """

    name: str
    weight_bytes: int
    activation_bytes: int

    def load(self, room: Room, check_cancelled: CheckCancelled) -> LoadedTextEncoder:
        """Read it to where there is room.

        Raises:
            CheckpointError: it or its tokenizer can't be loaded.
        """
        ...


class FolderTextEncoder:
    """Loaded by transformers."""

    activation_bytes = ACTIVATION_BYTES

    def __init__(self, folder: Path, tokenizer: Path | None, *, narrow: bool):
        self.name = f"{folder.parent.name}/{folder.name}"
        if tokenizer is None:
            raise CheckpointError(f"{self.name} is a text encoder without a tokenizer beside it. {CHOOSE_TEXT_ENCODER}")
        self._folder, self._tokenizer = folder, tokenizer
        stored = [pair for file in weight_files(folder) for pair in read_header(file).items()]
        self._narrow = narrow and any(entry.dtype == "F32" for _, entry in stored)
        self.weight_bytes = sum(self._bytes(name, entry) for name, entry in stored)

    def _bytes(self, name: str, entry: StoredTensor) -> int:
        if entry.dtype == "F32" and self._narrow:
            return entry.size_bytes // 2
        return entry.elements * kept_dtype(name, DTYPES[entry.dtype]).itemsize if entry.dtype in DTYPES else entry.size_bytes

    def load(self, room: Room, check_cancelled: CheckCancelled) -> LoadedTextEncoder:
        check_cancelled()
        spread: Any = {"device_map": "sequential", "max_memory": dict(room)} if room else {}
        try:
            tokenizer = folder_tokenizer(self._tokenizer)
            loaded: Any = UMT5EncoderModel.from_pretrained(
                self._folder,
                dtype=torch.bfloat16 if self._narrow else "auto",
                local_files_only=True,
                output_loading_info=True,
                **spread,
            )
            model, loading = loaded
        except CheckpointError:
            raise
        except Exception as error:  # transformers raises many kinds; the cause is kept
            if is_out_of_memory(error):
                raise
            raise CheckpointError(f"The text encoder {self.name} could not be loaded: {error}. Download it again.") from error
        if loading["missing_keys"]:  # transformers would go on with random ones
            raise CheckpointError(
                f"The text encoder {self.name} lacks {len(loading['missing_keys'])} tensors, such as {min(loading['missing_keys'])}. "
                "Download it again."
            )
        return LoadedTextEncoder(tokenizer, model.eval(), model.dtype)


def folder_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds; the cause is kept
        raise CheckpointError(
            f"The tokenizer in {folder.parent.name}/{folder.name} could not be loaded: {error}. Download it again."
        ) from error


def kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What ``from_pretrained`` would keep a parameter in: in a float16 encoder, what overflows there stays float32."""
    wide: Any = UMT5EncoderModel._keep_in_fp32_modules or ()
    return torch.float32 if dtype == torch.float16 and not set(wide).isdisjoint(name.split(".")) else dtype
