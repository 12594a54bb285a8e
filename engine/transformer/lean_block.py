"""A Wan block's forward in half the memory: the same operations as diffusers', token range by token range.

Everything in a block but self-attention's softmax works token by token. diffusers computes each step for all tokens at
once, with copies in float32: over ten tensors of the hidden state's size at the peak. Here only the hidden state, Q, K, V and
the attention's result ever stand whole, five.

Shapes: B batch, L tokens, D width, N heads. Source: WanTransformerBlock and WanAttnProcessor in diffusers 0.42.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformer3DModel, WanTransformerBlock

from ..planning.footprint import range_tokens

Rotary = tuple[torch.Tensor, torch.Tensor]
Modulation = tuple[torch.Tensor, ...]


def use_lean_blocks(model: WanTransformer3DModel) -> int:
    """Let a model's blocks compute leanly; blocks with an attention processor of somebody else's keep their forward.

    Returns:
        How many blocks do.
    """
    blocks: Any = model.blocks
    plain: Any = [b for b in blocks if type(b) is WanTransformerBlock and type(_processor(b)) is WanAttnProcessor]
    for block in plain:
        block.forward = partial(lean_forward, block)
    return len(plain)


def _processor(block: Any) -> Any:
    return block.attn1.processor


def lean_forward(
    block: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: Rotary,
) -> torch.Tensor:
    """As ``WanTransformerBlock.forward``.

    Args:
        block: a ``WanTransformerBlock``, whose weights are used.
        hidden_states: [B, L, D]; not changed.
        encoder_hidden_states: [B, text tokens, D], after image tokens where the model has them.
        temb: [B, 6, D], or [B, L, 6, D] with a timestep per token.
        rotary_emb: cosines and sines, [1, L, 1, head width] each.

    Returns:
        [B, L, D].
    """
    whole = None if temb.ndim == 4 else _modulation(block, temb)
    attended = _self_attention(block, hidden_states, temb, whole, rotary_emb)
    output = torch.empty_like(hidden_states)
    for tokens in token_ranges(hidden_states.shape[1]):
        _, _, gate, shift, scale, ffn_gate = whole or _modulation(block, temb[:, tokens])
        x = attended[:, tokens]
        for layer in block.attn1.to_out:
            x = layer(x)
        x = (hidden_states[:, tokens].float() + x * gate).type_as(hidden_states)
        normed = block.norm2(x.float()).type_as(x)
        x = x + block.attn2(normed, encoder_hidden_states, None, None)
        normed = (block.norm3(x.float()) * (1 + scale) + shift).type_as(x)
        output[:, tokens] = (x.float() + block.ffn(normed).float() * ffn_gate).type_as(x)
    return output


def token_ranges(tokens: int) -> Iterator[slice]:
    """Equal ranges that cover the tokens."""
    size = range_tokens(tokens)
    return (slice(begin, min(begin + size, tokens)) for begin in range(0, tokens, size))


def _modulation(block: Any, temb: torch.Tensor) -> Modulation:
    """Shift, scale and gate of attention, then of the feed-forward; float32 [B, 1 or L, D] each."""
    if temb.ndim == 4:
        return tuple(part.squeeze(2) for part in (block.scale_shift_table.unsqueeze(0) + temb.float()).chunk(6, dim=2))
    return (block.scale_shift_table + temb.float()).chunk(6, dim=1)


def _self_attention(
    block: Any, hidden_states: torch.Tensor, temb: torch.Tensor, whole: Modulation | None, rotary_emb: Rotary
) -> torch.Tensor:
    """Attention over all tokens, before its output projection: [B, L, D]."""
    attn = block.attn1
    batch, length, _ = hidden_states.shape
    query, key, value = (hidden_states.new_empty(batch, length, attn.heads, attn.inner_dim // attn.heads) for _ in range(3))
    for tokens in token_ranges(length):
        shift, scale, *_ = whole or _modulation(block, temb[:, tokens])
        normed = (block.norm1(hidden_states[:, tokens].float()) * (1 + scale) + shift).type_as(hidden_states)
        q, k, v = _project(attn, normed)
        rotary = (rotary_emb[0][:, tokens], rotary_emb[1][:, tokens])
        _rotate(attn.norm_q(q).unflatten(2, (attn.heads, -1)), rotary, query[:, tokens])
        _rotate(attn.norm_k(k).unflatten(2, (attn.heads, -1)), rotary, key[:, tokens])
        value[:, tokens] = v.unflatten(2, (attn.heads, -1))
    backend = attn.processor._attention_backend
    attended = dispatch_attention_fn(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, backend=backend)
    return attended.flatten(2, 3).type_as(query)


def _project(attn: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if getattr(attn, "fused_projections", False):
        return attn.to_qkv(hidden_states).chunk(3, dim=-1)
    return attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)


def _rotate(x: torch.Tensor, rotary_emb: Rotary, out: torch.Tensor) -> None:
    """Rotary embedding of [B, tokens, N, head width] into ``out``; pairs are neighbours."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
