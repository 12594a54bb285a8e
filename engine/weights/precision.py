"""In which precision an expert's weights are kept, and which of its tensors are exceptions.

The exceptions are diffusers' own (``_keep_in_fp32_modules``), so that results equal ``from_pretrained(torch_dtype=...)``. Only the
blocks' matrices are ever kept in few bits (transformer/low_precision.py has the forms): what comes before and after the blocks is small
and sensitive.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..checkpoints.stored import StoredTensor, is_few_bits
from ..errors import InvalidRequestError, UnsupportedError
from .packing import Spec

# fp32 is for comparisons; the node does not offer it.
WEIGHT_DTYPES = ("default", "bf16", "fp16", "fp8_e4m3fn", "int8", "fp32")

_WIDE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float32}
_FEW_BITS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8}
_STORED = {**_WIDE, **_FEW_BITS, "F64": torch.float64, "U8": torch.uint8}
_PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8", torch.float8_e4m3fn: "fp8_e4m3fn",
    torch.float8_e5m2: "fp8_e5m2",
}  # fmt: skip


@dataclass(frozen=True)
class Precision:
    """How weights are kept.

    Attributes:
        dtype: of plain weights and of computing.
        storage_dtype: of the blocks' matrices: ``dtype``, ``torch.int8`` or ``torch.float8_e4m3fn``.
        as_stored: what files have in few bits stays as they have it; what most of them have, "F8_E4M3" or "GGUF:Q4_K". Else empty.
    """

    dtype: torch.dtype
    storage_dtype: torch.dtype
    as_stored: str = ""

    @property
    def quantized(self) -> bool:
        return bool(self.as_stored) or self.storage_dtype != self.dtype

    def __str__(self) -> str:
        if not self.quantized:
            return _NAMES[self.dtype]
        few = _FEW_BITS.get(self.as_stored)
        storage = _NAMES[few or self.storage_dtype] if few or not self.as_stored else self.as_stored.replace(":", " ")
        return f"{storage} (computing in {_NAMES[self.dtype]})"


@dataclass(frozen=True)
class Form:
    """How one parameter is kept.

    Attributes:
        dtype: of its values in memory; uint8 for GGUF's bytes.
        scaled: a scale per row stands beside it.
        gguf_type: of GGUF's bytes.
    """

    dtype: torch.dtype
    scaled: bool = False
    gguf_type: str | None = None

    @property
    def few_bits(self) -> bool:
        return self.scaled or self.gguf_type is not None

    def specs(self, name: str, stored: StoredTensor) -> dict[str, Spec]:
        """The tensors it takes, by name."""
        if self.gguf_type is not None:
            return {name: Spec((stored.shape[0], stored.size_bytes // stored.shape[0]), torch.uint8)}
        if self.scaled:
            return {name: Spec(stored.shape, self.dtype), scale_name(name): Spec((stored.shape[0], 1), torch.float32)}
        return {name: Spec(stored.shape, self.dtype)}


def scale_name(weight: str) -> str:
    """What the scale of a weight is called."""
    return f"{weight}_scale"


def resolve_precision(
    choice: str, *stored: str, on_gpu: bool, without_bf16: Sequence[str] = (), beside: Sequence[str] = ()
) -> tuple[Precision, tuple[str, ...]]:
    """The precision a choice means for a model's experts on a kind of device, and notes for people.

    Args:
        choice: one of ``WEIGHT_DTYPES``.
        stored: the dtype of each expert's matrices in few bits ("F8_E4M3", "GGUF:Q4_K", ...), or of most of it ("F32", "BF16", ...).
        on_gpu: whether GPUs compute.
        beside: what most of experts with some few bits have, where that is wide.
        without_bf16: those of them, as people know them, that can't compute in bf16: attention would need many times the memory.

    Raises:
        InvalidRequestError: the choice is unknown.
        UnsupportedError: a stored dtype can't be widened here, or a GPU can't compute in bf16.
    """
    if choice not in WEIGHT_DTYPES:
        raise InvalidRequestError(f"weight_dtype is {choice!r}; choose one of {', '.join(WEIGHT_DTYPES)}.")
    few_bits = [dtype for dtype in stored if is_few_bits(dtype)]
    wide = [dtype for dtype in stored if dtype not in few_bits]
    for dtype in wide:
        if dtype not in _WIDE:
            raise UnsupportedError(f"This checkpoint is stored as {dtype}, which this version does not read. Use a bf16, fp16 or fp8 one.")
    compute = _WIDE.get([*wide, *beside, "F32"][0], torch.float32)
    compute = torch.bfloat16 if on_gpu and compute == torch.float32 else compute
    if without_bf16:
        names = " and ".join(without_bf16)
        if choice == "bf16":
            raise UnsupportedError(
                f"weight_dtype is bf16, which {names} cannot compute in. Choose default, fp16, int8 or fp8_e4m3fn, or leave that GPU out (slider "
                "below 0)."
            )
        if compute == torch.bfloat16 and choice not in _PLAIN:
            note = (
                f"{names} cannot compute in bf16, so the model computes in fp16 on all GPUs. For bf16, leave that GPU out (slider below 0)."
            )
            few = torch.int8 if choice == "int8" else torch.float8_e4m3fn if choice != "default" else torch.float16
            return Precision(torch.float16, few, as_stored=few_bits[0] if few_bits and choice == "default" else ""), (note,)
    if choice in _PLAIN:
        return Precision(_PLAIN[choice], _PLAIN[choice]), ()
    if choice != "default":
        return Precision(compute, torch.int8 if choice == "int8" else torch.float8_e4m3fn), ()
    notes: list[str] = []
    for dtype in sorted({_WIDE[dtype] for dtype in wide} - {compute}, key=str):
        why = "as Wan was trained" if dtype == torch.float32 else "as the other expert's are"
        notes.append(f"Weights stored in {_NAMES[dtype]} are kept in {_NAMES[compute]}, {why}.")
    if few_bits and wide:
        notes.append("One expert's file has few bits and the other's has not; each is kept as it is.")
    return Precision(compute, compute, as_stored=few_bits[0] if few_bits else ""), tuple(notes)


def parameter_forms(model: nn.Module, tensors: Mapping[str, StoredTensor], precision: Precision) -> dict[str, Form]:
    """How every parameter of a transformer is kept, by name."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    matrices = block_matrices(model)
    forms: dict[str, Form] = {}
    for name, _ in model.named_parameters():
        if kept.intersection(name.split(".")):
            forms[name] = Form(torch.float32)
        elif name in matrices and precision.quantized:
            forms[name] = _few_bits(tensors[name], precision)
        else:
            forms[name] = Form(precision.dtype)
    return forms


def _few_bits(stored: StoredTensor, precision: Precision) -> Form:
    if not precision.as_stored:
        return Form(precision.storage_dtype, scaled=True)
    if stored.gguf_type is not None:
        return Form(torch.uint8, gguf_type=stored.gguf_type)
    dtype = _FEW_BITS.get(stored.dtype)
    return Form(precision.dtype) if dtype is None else Form(dtype, scaled=True)


def block_matrices(model: nn.Module) -> frozenset[str]:
    """The names of the transformer blocks' matrices."""
    return frozenset(
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith("blocks.")
    )


def stored_dtype(stored: StoredTensor) -> torch.dtype:
    """torch's dtype of a tensor in its file; uint8 for GGUF's bytes.

    Raises:
        UnsupportedError: no such dtype here.
    """
    if stored.gguf_type is not None:
        return torch.uint8
    found = _STORED.get(stored.dtype)
    if found is None:
        raise UnsupportedError(f"Tensor {stored.key} of {stored.file.name} is stored as {stored.dtype}, which this version does not read.")
    return found
