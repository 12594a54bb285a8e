"""The UMT5 text encoder from a single file, read to where there is room.

Everything is as ``from_pretrained`` would have it, so the same weights give the same embeddings. An encoder in fp8 has no such
counterpart: its matrices stay as they are in memory, half of what they would take in 16 bits, and each is widened to float32 next to its
product, as ComfyUI does. In float32 nothing overflows, which UMT5 does in float16. Called by :mod:`.text`.

Shapes: B prompts, L tokens.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sentencepiece
import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from ..checkpoints.stored import StoredTensor
from ..checkpoints.umt5_file import CHOOSE_TEXT_ENCODER, Umt5File, read_stored_bytes
from ..errors import CheckpointError
from ..planning.devices import GIB
from ..weights.reading import TensorReader
from .text_encoder import ACTIVATION_BYTES, DTYPES, CheckCancelled, LoadedTextEncoder, Room, folder_tokenizer, kept_dtype

# As ACTIVATION_BYTES, but in float32 and with the largest matrix widened.
WIDE_ACTIVATION_BYTES = int(1.25 * GIB)
_TABLE = "shared.weight"


class FileTextEncoder:
    """Read tensor by tensor from the file, each straight to its device and in the dtype it is kept in."""

    def __init__(self, file: Umt5File, tokenizer: Path | None, *, narrow: bool):
        self.name = file.path.name
        self._file, self._tokenizer = file, tokenizer
        if tokenizer is None and file.tokenizer is None:
            raise CheckpointError(
                f"{self.name} has no tokenizer inside (the tensor spiece_model), as ComfyUI's own files have. {CHOOSE_TEXT_ENCODER}"
            )
        wide = DTYPES[file.wide_dtype]
        self._dtype = torch.float32 if file.has_fp8 else torch.bfloat16 if narrow and wide == torch.float32 else wide
        self.weight_bytes = sum(parameter.numel() * parameter.itemsize for parameter in self._skeleton().parameters())
        self.activation_bytes = WIDE_ACTIVATION_BYTES if file.has_fp8 else ACTIVATION_BYTES

    def load(self, room: Room, check_cancelled: CheckCancelled) -> LoadedTextEncoder:
        tokenizer = self._load_tokenizer()
        model = self._skeleton()
        places = _places(model, room)
        # Not mapped: Windows wants page file for all of a mapped file.
        reader = TensorReader()
        try:
            for name, parameter in list(model.named_parameters()):
                check_cancelled()
                owner, _, leaf = name.rpartition(".")
                value = _read(reader, self._file.tensors[f"{owner}.weight"], parameter, scale=leaf == "scale")
                setattr(model.get_submodule(owner), leaf, nn.Parameter(value.to(_place(name, places)), requires_grad=False))
        finally:
            reader.close()
        if len(set(places.values())) > 1:
            model = dispatch_model(model, device_map=places, skip_keys="past_key_values")
        return LoadedTextEncoder(tokenizer, model, self._dtype)

    def _load_tokenizer(self) -> Any:
        if self._tokenizer is not None:
            return folder_tokenizer(self._tokenizer)
        assert self._file.tokenizer is not None
        try:
            tokenizer = SentencePieceTokenizer(read_stored_bytes(self._file.tokenizer))
        except (RuntimeError, ValueError) as error:  # what sentencepiece makes of bytes that are none
            raise CheckpointError(f"The tokenizer inside {self.name} could not be read ({error}). Download the file again.") from error
        if tokenizer.size > self._file.config["vocab_size"]:
            raise CheckpointError(
                f"The tokenizer inside {self.name} knows {tokenizer.size} tokens, its encoder {self._file.config['vocab_size']}. "
                "Download the file again."
            )
        return tokenizer

    def _skeleton(self) -> Any:
        """The encoder without its weights, each in the dtype it will be kept in."""
        with init_empty_weights():
            model: Any = UMT5EncoderModel(UMT5Config(**self._file.config)).eval().requires_grad_(False)
            model.set_input_embeddings(model.shared)  # one table; newer versions of transformers make two and tie them
            for name, module in list(model.named_modules()):
                if self._file.has_fp8 and isinstance(module, nn.Linear):
                    owner, _, leaf = name.rpartition(".")
                    setattr(model.get_submodule(owner), leaf, WidenedLinear(self._file.tensors[f"{name}.weight"]))
        for name, parameter in model.named_parameters():
            if name == _TABLE and self._file.has_fp8:
                parameter.data = parameter.data.to(_table_dtype(self._file.tensors[name]))
            elif not name.endswith((".stored", ".scale")):
                parameter.data = parameter.data.to(kept_dtype(name, self._dtype))
        if self._file.has_fp8:
            model.shared.register_forward_hook(lambda module, args, rows: rows.float())
        return model


class WidenedLinear(nn.Module):
    """A matrix product whose matrix stays in memory as it is stored; it is widened, and scaled, for the moment of the product.

    The result is that of ``nn.Linear`` with the widened matrix, to the last bit.
    """

    # Instead of a parameter of this name: transformers gives hidden states the dtype of ``wo.weight``, which fp8 ones do not survive.
    weight = None

    def __init__(self, stored: StoredTensor):
        super().__init__()
        self._dtype = DTYPES[stored.dtype]
        # As bytes, because not every function of torch and accelerate takes fp8.
        kept = torch.uint8 if self._dtype.itemsize == 1 else self._dtype
        self.stored = nn.Parameter(torch.empty(stored.shape, dtype=kept), requires_grad=False)
        self.scale = None
        if stored.scale is not None:
            self.scale = nn.Parameter(torch.empty(stored.scale.elements, 1, dtype=torch.float32), requires_grad=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, L, in] -> [B, L, out], in the dtype of ``hidden_states``."""
        matrix = self.stored.view(self._dtype).to(hidden_states.dtype, copy=True)
        if self.scale is not None:
            matrix.mul_(self.scale)
        return nn.functional.linear(hidden_states, matrix)


class SentencePieceTokenizer:
    """A SentencePiece model, called as diffusers' pipeline calls transformers' tokenizers.

    Not one of theirs: making one of a bare SentencePiece model needs another package and forgets the model's byte fallback.

    Raises:
        RuntimeError, ValueError: the bytes are no such model.
    """

    def __init__(self, model: bytes):
        self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size: int = self._processor.get_piece_size()
        self._end: int = self._processor.eos_id()
        self._padding = max(0, self._processor.pad_id())
        if self._end < 0:
            raise ValueError("it has no token for the end of a text")

    def __call__(self, texts: list[str], *, max_length: int, **_: Any) -> SimpleNamespace:
        """``input_ids`` and ``attention_mask``, int64 [B, max_length]; what is too long is cut before its end token."""
        ids = torch.full((len(texts), max_length), self._padding)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            tokens = [*self._processor.encode(text)[: max_length - 1], self._end]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return SimpleNamespace(input_ids=ids, attention_mask=mask)


def _table_dtype(stored: StoredTensor) -> torch.dtype:
    """Of the embedding table beside fp8 matrices: as stored, for it is a third of all and only looked up in. bfloat16 holds every fp8 value."""
    if stored.scale is not None:
        return torch.float32
    dtype = DTYPES[stored.dtype]
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def _read(reader: TensorReader, stored: StoredTensor, kept: torch.Tensor, *, scale: bool) -> torch.Tensor:
    """One parameter's values, or the scale of them, on the CPU, in the shape and dtype of ``kept``."""
    if scale:
        assert stored.scale is not None
        return reader.read(stored.scale).to(kept.dtype).view(kept.shape)
    value = reader.read(stored)
    if kept.dtype == torch.uint8:
        return value.view(torch.uint8)
    if stored.scale is not None:  # no matrix of a product: those have theirs beside them
        value = value.float() * reader.read(stored.scale).float().view(-1, *[1] * (value.ndim - 1))
    return value.to(kept.dtype)


def _places(model: Any, room: Room) -> dict[str, Any]:
    """Module -> device, for :func:`dispatch_model`."""
    if not room:
        return {"": "cpu"}
    places = infer_auto_device_map(model, max_memory=dict(room), no_split_module_classes=["UMT5Block"])
    return {name: "cpu" if place == "disk" else place for name, place in places.items()}


def _place(name: str, places: Mapping[str, Any]) -> Any:
    return next(places[prefix] for prefix in _prefixes(name) if prefix in places)


def _prefixes(name: str) -> Iterator[str]:
    """The name, then what it lies in, from the inside out, and last the model."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""
