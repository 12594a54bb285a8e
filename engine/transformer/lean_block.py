"""A whole Wan block in half the memory: diffusers' operations, token range by token range.

diffusers computes each step of a block for all tokens at once, with copies in float32: over ten tensors of the hidden state's
size at the peak. Here only the hidden state, Q, K, V and the attention's result ever stand whole, five.

Shapes: B batch, L tokens, D width.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformer3DModel, WanTransformerBlock

from ..planning.footprint import range_tokens
from .self_attention import self_attention
from .wan_block import BlockMath, rotary_tables

Rotary = tuple[torch.Tensor, torch.Tensor]


def use_lean_blocks(model: WanTransformer3DModel) -> int:
    """Let a model's blocks compute leanly; blocks with an attention processor of somebody else's keep their forward.

    Returns:
        How many blocks do.
    """
    blocks: Any = model.blocks
    plain: Any = [b for b in blocks if type(b) is WanTransformerBlock and type(_processor(b)) is WanAttnProcessor]
    math = BlockMath.of(model.config)
    for block in plain:
        block.forward = partial(lean_forward, math, block)
    return len(plain)


def _processor(block: Any) -> Any:
    return block.attn1.processor


def lean_forward(
    math: BlockMath,
    block: torch.nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: Rotary,
) -> torch.Tensor:
    """As ``WanTransformerBlock.forward``.

    Args:
        math: the model's.
        block: a ``WanTransformerBlock``, whose parameters are used; more than its own ones where they are kept in few bits or LoRAs
            are in use, and ``weight_kinds`` for what is no tensor (see wan_block.py).
        hidden_states: [B, L, D]; not changed.
        encoder_hidden_states: [B, text tokens, D], after image tokens where the model has them.
        temb: [B, 6, D], or [B, L, 6, D] with a timestep per token.
        rotary_emb: cosines and sines, [1, L, 1, head width] each.

    Returns:
        [B, L, D].
    """
    weights = {**dict(block.named_parameters()), **getattr(block, "weight_kinds", {})}
    batch, length, _ = hidden_states.shape
    cos, sin = rotary_tables(*rotary_emb)
    attention = self_attention(hidden_states.device, hidden_states.dtype, cos.shape[-1])
    shape = (batch, length, math.heads, cos.shape[-1])
    query, keys_and_values = hidden_states.new_empty(shape), hidden_states.new_empty(batch, length, 2, *shape[2:])
    for tokens in token_ranges(length):
        arguments = (weights, hidden_states[:, tokens], modulation_of(temb, tokens), cos[:, tokens], sin[:, tokens])
        modulated = math.keys_into(*arguments, (keys_and_values[:, tokens],))
        query[:, tokens] = math.query(weights, modulated, cos[:, tokens], sin[:, tokens])
        del modulated
    attended = attention(query, *keys_and_values.unbind(2))
    del query, keys_and_values
    keys = math.text_keys(weights, encoder_hidden_states)
    output = torch.empty_like(hidden_states)
    for tokens in token_ranges(length):
        output[:, tokens] = math.finish(weights, hidden_states[:, tokens], attended[:, tokens], modulation_of(temb, tokens), keys)
    return output


def token_ranges(tokens: int, size: int | None = None) -> Iterator[slice]:
    """Ranges of ``size`` tokens, or as the memory plan has them, that cover the tokens."""
    size = size or range_tokens(tokens)
    return (slice(begin, min(begin + size, tokens)) for begin in range(0, tokens, size))


def modulation_of(temb: torch.Tensor, tokens: slice) -> torch.Tensor:
    """The part of ``temb`` that belongs to some tokens."""
    return temb[:, tokens] if temb.ndim == 4 else temb
