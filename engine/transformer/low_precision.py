"""Matrices kept in few bits, and what makes them wide again next to the product. Plain tensors in, plain tensors out.

Two forms. *Scaled rows*: int8 or float8 values [out, in] and one float32 scale per row, [out, 1]; files with one scale for all rows have it
repeated. *GGUF*: the format's own blocks of bytes, uint8 [out, bytes of a row], widened by diffusers' functions.
"""

import torch

# So many values of a GGUF matrix are widened at a time: what stands beside them is several times as large.
GGUF_CHUNK_VALUES = 16 * 1024**2
GGUF_CHUNK_BYTES = 20 * GGUF_CHUNK_VALUES
# What some GPUs multiply as it is, with activations rounded to the same type, a scale per token.
MULTIPLIED = (torch.int8, torch.float8_e4m3fn)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def quantized_rows(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in few bits, each row scaled so that its largest value is the largest of the type.

    Args:
        weight: [out, in], floating point.
        dtype: ``torch.int8``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.

    Returns:
        The values [out, in], and their scales float32 [out, 1].
    """
    wide = weight.float()
    largest = LARGEST[dtype]
    if torch.compiler.is_compiling():
        highest = wide.abs().amax(dim=1, keepdim=True)
    else:  # the same without a matrix of absolute values; compiled, there is none, and this would take a fifth longer
        highest = torch.maximum(-wide.amin(dim=1, keepdim=True), wide.amax(dim=1, keepdim=True))
    # A row of zeros stays one.
    scale = (highest / largest).clamp_min(torch.finfo(torch.float32).tiny)
    values = wide.div_(scale) if wide is not weight else wide / scale
    if dtype == torch.int8:
        values = values.round_()
    return values.clamp_(-largest, largest).to(dtype), scale


def widened_rows(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, in] that scaled rows stand for.

    Args:
        weight: int8 or float8 [out, in].
        scale: float32 [out, 1], or of one value.
        dtype: of the result.
    """
    # int8 and float8 values are exact in any wider type; the product is rounded once.
    return weight.to(dtype).mul_(scale)


def multiplied_rows(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``linear`` with a matrix of scaled rows, by the GPU's own products of few bits: activations are rounded too.

    Args:
        x: [..., in], bf16 or fp16.
        weight: int8 or float8_e4m3fn [out, in]; both sizes multiples of 16.
        scale: float32 [out, 1].
        bias: [out], or none.

    Returns:
        [..., out], as wide as ``x``.
    """
    values, x_scale = quantized_rows(x.flatten(0, -2), weight.dtype)
    if weight.dtype == torch.int8:
        product = torch._int_mm(values, weight.t())
        result = (product * x_scale * scale.t()).to(x.dtype)
        result = result if bias is None else result + bias
    else:
        result = torch._scaled_mm(values, weight.t(), scale_a=x_scale, scale_b=scale.t(), bias=bias, out_dtype=x.dtype)
    return result.unflatten(0, x.shape[:-1])


def widened_gguf(weight: torch.Tensor, gguf_type: str, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, in] that a GGUF tensor stands for.

    Args:
        weight: uint8 [out, bytes of a row].
        gguf_type: the format's name of the type, "Q8_0".
        dtype: of the result.
    """
    from diffusers.quantizers.gguf.utils import dequantize_functions
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[gguf_type]
    values, size_bytes = GGML_QUANT_SIZES[kind]
    rows, blocks = weight.shape[0], weight.shape[1] // size_bytes
    result = torch.empty(rows, blocks * values, dtype=dtype, device=weight.device)
    step = max(1, GGUF_CHUNK_VALUES // max(1, blocks * values))
    for begin in range(0, rows, step):
        chunk = weight[begin : begin + step].reshape(-1, size_bytes)
        wide = dequantize_functions[kind](chunk, values, size_bytes, torch.float32)
        result[begin : begin + step] = wide.reshape(-1, blocks * values)
    return result
