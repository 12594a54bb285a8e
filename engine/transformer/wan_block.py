"""A Wan block's arithmetic as plain functions of tensors and weights. Knows no devices, no modules, no weights' homes.

Everything in a block but the softmax of self-attention works token by token. So a block is two halves with the attention
between them: :meth:`BlockMath.project` for any of the tokens (or :meth:`BlockMath.keys_into`, then :meth:`BlockMath.query`),
attention of those tokens over everybody's keys and values, and :meth:`BlockMath.finish` for the same tokens. Which tokens, on
which device, compiled or not, is the caller's business.

Weights come as a mapping of names inside the block ("attn1.to_q.weight") to tensors, so that they may live in a buffer that
holds another block a moment later, and so that one compiled function serves all blocks. Beside a layer's "weight" and "bias" there may be

- "weight_scale": the weight is int8 or float8, and each row is to be multiplied by its scale (low_precision.py);
- "weight.gguf": the weight is GGUF's bytes, of this type, a string;
- "multiply_few_bits", for the whole block: the device multiplies int8 or float8 as they are;
- "lora_A" [rank, in] and "lora_B" [out, rank]: what LoRAs add to the layer, strengths included.

Shapes: B batch, L tokens, D width, N heads. Source: WanTransformerBlock and WanAttnProcessor in diffusers 0.42.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .fused_gelu import can_fuse, linear_gelu
from .low_precision import MULTIPLIED, multiplied_rows, widened_gguf, widened_rows

Weights = Mapping[str, Any]
Modulation = tuple[torch.Tensor, ...]
TextKeys = tuple[torch.Tensor, ...]
# (query [B, l, N, head], key [B, L, N, head], value likewise) -> [B, l, N, head]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# So many of the cross-attention's tokens are text, the last ones; image tokens come before them (hard-coded in Wan too).
TEXT_TOKENS = 512
# Layers of one input. Where their weights lie one behind the other, a weight named "a+b" stands for all of them.
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
KV = QKV[1:]
TEXT_KV = ("attn2.to_k", "attn2.to_v")
FUSED = (QKV, KV, TEXT_KV)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Softmax attention by torch's own choice of kernel; [B, tokens, N, head width] in and out."""
    return F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)


@dataclass(frozen=True)
class BlockMath:
    """The arithmetic of one model's blocks.

    Attributes:
        heads: N.
        eps: of all norms.
        cross_norm: whether a norm stands before cross-attention.
        image_tokens: whether cross-attention has keys of its own for image tokens (Wan 2.1 I2V).
    """

    heads: int
    eps: float
    cross_norm: bool
    image_tokens: bool

    @classmethod
    def of(cls, config: Any) -> "BlockMath":
        """From a ``WanTransformer3DModel``'s config."""
        return cls(config.num_attention_heads, config.eps, config.cross_attn_norm, config.added_kv_proj_dim is not None)

    # ---- the two halves

    def keys_into(
        self, weights: Weights, x: torch.Tensor, temb: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rooms: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Keys and values as of :meth:`project`, written where others will read them, before there is a query.

        Args:
            rooms: one tensor [B, l, 2, some heads, head width] per group of heads, in the order of the heads: keys, then values; none of
                them may share memory with another.

        Returns:
            What :meth:`query` is made of, [B, l, D].
        """
        shift, scale, *_ = self.modulation(weights, temb)
        modulated = self._modulated(x, scale, shift)
        key, value = _fused(weights, KV, modulated)
        key, value = self._rotated(weights, "norm_k", key, cos, sin), self._heads(value)
        first = 0
        for room in rooms:
            last = first + room.shape[3]
            room[:, :, 0].copy_(key[:, :, first:last])
            room[:, :, 1].copy_(value[:, :, first:last])
            first = last
        return modulated

    def query(self, weights: Weights, modulated: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The query as of :meth:`project`, [B, l, N, head width], of what :meth:`keys_into` returned."""
        return self._rotated(weights, "norm_q", _linear(weights, QKV[0], modulated), cos, sin)

    def project(
        self, weights: Weights, x: torch.Tensor, temb: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of self-attention, rotated.

        Args:
            weights: of the block.
            x: hidden states [B, l, D] of some tokens.
            temb: [B, 6, D], or [B, l, 6, D] with a timestep per token.
            cos, sin: of the same tokens, [1, l, 1, head width], from :func:`rotary_tables`.

        Returns:
            Three of [B, l, N, head width].
        """
        shift, scale, *_ = self.modulation(weights, temb)
        q, k, v = _fused(weights, QKV, self._modulated(x, scale, shift))
        q = self._rotated(weights, "norm_q", q, cos, sin)
        k = self._rotated(weights, "norm_k", k, cos, sin)
        return q, k, self._heads(v)

    def text_keys(self, weights: Weights, text: torch.Tensor) -> TextKeys:
        """Keys and values of cross-attention: of the text, then of the image tokens where the model has them.

        Args:
            weights: of the block.
            text: [B, 512, D], after image tokens where the model has them.

        Returns:
            Two or four of [B, tokens, N, head width].
        """
        image = text.shape[1] - TEXT_TOKENS if self.image_tokens else 0
        k, v = _fused(weights, TEXT_KV, text[:, image:])
        found = [self._heads(self._rms(weights, "attn2.norm_k", k)), self._heads(v)]
        if self.image_tokens:
            seen = text[:, :image]
            k = self._rms(weights, "attn2.norm_added_k", _linear(weights, "attn2.add_k_proj", seen))
            found += [self._heads(k), self._heads(_linear(weights, "attn2.add_v_proj", seen))]
        return tuple(found)

    def finish(
        self, weights: Weights, x: torch.Tensor, attended: torch.Tensor, temb: torch.Tensor, keys: TextKeys, attention: Attention = attend
    ) -> torch.Tensor:
        """The rest of the block, from self-attention's result on.

        Args:
            weights: of the block.
            x: hidden states [B, l, D] that entered the block.
            attended: self-attention's result for the same tokens, [B, l, N, head width].
            temb: as for :meth:`project`.
            keys: from :meth:`text_keys`.
            attention: for cross-attention.

        Returns:
            Hidden states [B, l, D] that leave the block.
        """
        _, _, gate, shift, scale, ffn_gate = self.modulation(weights, temb)
        x = _gated(x, _linear(weights, "attn1.to_out.0", attended.flatten(2, 3).type_as(x)), gate)
        x = x + self._cross_attention(weights, self._cross_normed(weights, x), keys, attention)
        hidden = _linear_gelu(weights, "ffn.net.0.proj", self._modulated(x, scale, shift))
        return _gated(x, _linear(weights, "ffn.net.2", hidden), ffn_gate)

    # ---- their pieces

    @staticmethod
    def modulation(weights: Weights, temb: torch.Tensor) -> Modulation:
        """Shift, scale and gate of attention, then of the feed-forward; float32 [B, 1 or l, D] each."""
        table = weights["scale_shift_table"]
        if temb.ndim == 4:
            return tuple(part.squeeze(2) for part in (table.unsqueeze(0) + temb.float()).chunk(6, dim=2))
        return (table + temb.float()).chunk(6, dim=1)

    def _modulated(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(x.float(), (x.shape[-1],), eps=self.eps)
        # In place: of uncompiled float32 copies, each that stands less is memory for weights.
        return normed.mul_(1 + scale).add_(shift).type_as(x)

    def _cross_normed(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        if not self.cross_norm:
            return x
        weight, bias = weights["norm2.weight"].float(), weights["norm2.bias"].float()
        return F.layer_norm(x.float(), (x.shape[-1],), weight, bias, self.eps).type_as(x)

    def _cross_attention(self, weights: Weights, x: torch.Tensor, keys: TextKeys, attention: Attention) -> torch.Tensor:
        query = self._heads(self._rms(weights, "attn2.norm_q", _linear(weights, "attn2.to_q", x)))
        result = attention(query, keys[0], keys[1]).flatten(2, 3).type_as(x)
        if len(keys) == 4:
            result = attention(query, keys[2], keys[3]).flatten(2, 3).type_as(x) + result
        return _linear(weights, "attn2.to_out.0", result)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.heads, -1))

    def _rms(self, weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weights[f"{name}.weight"], self.eps)

    def _rotated(self, weights: Weights, norm: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Norm over all heads, then rotary embedding; pairs are neighbours, and ``sin`` is negative at the first of each pair.

        Exchanging the pair's halves, rather than splitting them into even and odd, keeps every load of the compiled kernel in its row.
        """
        rotated = self._heads(self._rms(weights, f"attn1.{norm}", x)).float()
        exchanged = rotated.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        rotated = rotated * cos
        return rotated.add_(exchanged.mul_(sin)).type_as(x)


def rotary_tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What :meth:`BlockMath.project` takes, from diffusers' tables [1, L, 1, head width]: sines negative at the first of each pair."""
    pairs = sin.unflatten(-1, (-1, 2))
    return cos, torch.stack((-pairs[..., 0], pairs[..., 1]), dim=-1).flatten(-2)


def _gated(x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """``x + update * gate`` in float32, as ``x``'s dtype."""
    return (update * gate).add_(x).type_as(x)


def fused_name(names: tuple[str, ...]) -> str:
    """What several layers together are called."""
    return "+".join(names)


def _linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return _product(weights, name, (name,), x)


def _linear_gelu(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    bias = weights.get(f"{name}.bias")
    if can_fuse(x) and bias is not None and not _is_multiplied(weights, name):
        return linear_gelu(x, widened(weights, name, x.dtype), bias)
    return F.gelu(_linear(weights, name, x), approximate="tanh")


def _is_multiplied(weights: Weights, name: str) -> bool:
    """Whether the device's own product of few bits is to be used."""
    return f"{name}.weight_scale" in weights and "multiply_few_bits" in weights and weights[f"{name}.weight"].dtype in MULTIPLIED


def _product(weights: Weights, name: str, layers: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
    """``linear`` with the weights of one layer, or of several that lie one behind the other."""
    bias, scale = weights.get(f"{name}.bias"), weights.get(f"{name}.weight_scale")
    if scale is not None and _is_multiplied(weights, name):
        return _with_low_rank(weights, layers, x, multiplied_rows(x, weights[f"{name}.weight"], scale, bias))
    return F.linear(x, widened(weights, name, x.dtype, layers), bias)


def widened(weights: Weights, name: str, dtype: torch.dtype, layers: tuple[str, ...] = ()) -> torch.Tensor:
    """A matrix [out, in], made wide if it is kept in few bits, with what LoRAs add to it, or to the ``layers`` it is made of.

    Adding to the matrix costs the same for any number of tokens (benchmarks/precision.py), and is rounded as LoRAs are elsewhere.
    """
    weight, scale = weights[f"{name}.weight"], weights.get(f"{name}.weight_scale")
    gguf_type = weights.get(f"{name}.weight.gguf")
    layers, kept = layers or (name,), False
    if gguf_type is not None:
        wide = widened_gguf(weight, gguf_type, dtype)
    elif scale is not None:
        wide = widened_rows(weight, scale, dtype)
    else:
        wide, kept = weight, True
    if not any(f"{layer}.lora_A" in weights for layer in layers):
        return wide
    wide, first = wide.clone() if kept else wide, 0
    for layer in layers:
        rows = weights[f"{layer}.weight"].shape[0]
        if f"{layer}.lora_A" in weights:
            wide[first : first + rows].addmm_(weights[f"{layer}.lora_B"], weights[f"{layer}.lora_A"])
        first += rows
    return wide


def _with_low_rank(weights: Weights, layers: tuple[str, ...], x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """The layers' results side by side, with what LoRAs add to them: for a matrix that is never wide."""
    for layer, part in zip(layers, result.chunk(len(layers), dim=-1), strict=True):
        if f"{layer}.lora_A" in weights:
            part.flatten(0, -2).addmm_(F.linear(x, weights[f"{layer}.lora_A"]).flatten(0, -2), weights[f"{layer}.lora_B"].t())
    return result


def _fused(weights: Weights, names: tuple[str, ...], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Several layers of one input: as one matrix product where their weights lie one behind the other."""
    together = fused_name(names)
    if f"{together}.weight" in weights:
        return _product(weights, together, names, x).chunk(len(names), dim=-1)
    return tuple(_linear(weights, name, x) for name in names)
