"""In which precision an expert's weights are kept, and which of its tensors are exceptions.

The exceptions are diffusers' own (``_keep_in_fp32_modules``), so that results equal ``from_pretrained(torch_dtype=...)``.
Quantized weights are torchao's: one scale per output row, widened next to the matmul.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import InvalidRequestError, UnsupportedError

# fp32 is for comparisons; the node does not offer it.
WEIGHT_DTYPES = ("default", "bf16", "fp16", "fp8_e4m3fn", "int8", "fp32")

_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float32}
_PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """How weights are kept.

    Attributes:
        dtype: of plain weights and of computing.
        storage_dtype: of the blocks' matrices: ``dtype``, ``torch.int8`` or ``torch.float8_e4m3fn``.
    """

    dtype: torch.dtype
    storage_dtype: torch.dtype

    @property
    def quantized(self) -> bool:
        return self.storage_dtype != self.dtype

    def __str__(self) -> str:
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}
        storage = names.get(self.storage_dtype, "fp8_e4m3fn")
        return f"{storage} (computing in {names[self.dtype]})" if self.quantized else storage


def resolve_precision(choice: str, stored: str, *, on_gpu: bool) -> tuple[Precision, tuple[str, ...]]:
    """The precision a choice means for a checkpoint on a kind of device, and notes for people.

    Args:
        choice: one of ``WEIGHT_DTYPES``.
        stored: safetensors' name of the checkpoint's dtype ("F32", "BF16", ...).
        on_gpu: whether GPUs compute.

    Raises:
        InvalidRequestError: the choice is unknown.
        UnsupportedError: the stored dtype can't be widened here, or torchao is missing.
    """
    if choice not in WEIGHT_DTYPES:
        raise InvalidRequestError(f"weight_dtype is {choice!r}; choose one of {', '.join(WEIGHT_DTYPES)}.")
    if stored not in _STORED:
        raise UnsupportedError(f"This checkpoint is stored as {stored}, which this version does not read. Use a bf16, fp16 or fp32 one.")
    stored_dtype = _STORED[stored]
    compute = torch.bfloat16 if on_gpu and stored_dtype == torch.float32 else stored_dtype
    if choice in _PLAIN:
        return Precision(_PLAIN[choice], _PLAIN[choice]), ()
    if choice == "default":
        notes = ("The checkpoint is stored in fp32; it is kept in bf16, as Wan was trained.",) if compute != stored_dtype else ()
        return Precision(compute, compute), notes
    _quantizer(choice)
    return Precision(compute, torch.int8 if choice == "int8" else torch.float8_e4m3fn), ()


def parameter_dtypes(model: nn.Module, precision: Precision) -> dict[str, torch.dtype]:
    """The dtype of every parameter in memory, by name; quantized matrices count as their storage dtype."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    matrices = quantizable_weights(model) if precision.quantized else frozenset()
    dtypes = {}
    for name, _ in model.named_parameters():
        if kept.intersection(name.split(".")):
            dtypes[name] = torch.float32
        else:
            dtypes[name] = precision.storage_dtype if name in matrices else precision.dtype
    return dtypes


def quantizable_weights(model: nn.Module) -> frozenset[str]:
    """The matrices of the transformer blocks. What comes before and after them is small and sensitive, so it stays."""
    return frozenset(
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith("blocks.")
    )


def quantized_weight(weight: torch.Tensor, storage_dtype: torch.dtype) -> torch.Tensor:
    """A layer's weight [out, in] quantized, on the device it is on.

    Raises:
        UnsupportedError: torchao can't do that on this device.
    """
    from torchao.quantization import quantize_

    choice = "int8" if storage_dtype == torch.int8 else "fp8_e4m3fn"
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    try:
        quantize_(linear, _quantizer(choice))
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UnsupportedError(f"weight_dtype {choice} does not work on {weight.device} ({error}). Choose bf16 or int8.") from error
    return linear.weight.data


def _quantizer(choice: str):
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise UnsupportedError(
            f"weight_dtype {choice} needs the package torchao in a version that suits this torch ({torch.__version__}): {error}. "
            "Install it with `pip install torchao`, or choose bf16."
        ) from error
    # torchao's default also changes settings of the whole process (matmul precision, compiler flags).
    return Int8WeightOnlyConfig(set_inductor_config=False) if choice == "int8" else Float8WeightOnlyConfig(set_inductor_config=False)
