"""What comes before and after the blocks: tokens to their workers, and their results back.

The main worker embeds the latents, the text and the timestep and hands every worker its tokens; each worker projects its own tokens to
patches at the end, eighty times smaller than the hidden state, and the main worker puts them together.

Shapes: B batch, L tokens, l a worker's tokens, D width. Source: WanTransformer3DModel.forward in diffusers 0.42.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..planning.shares import share_tokens, token_ranges
from ..transformer.lean_block import modulation_of
from ..transformer.wan_block import rotary_tables
from ..weights.expert import Expert
from .crew import Crew
from .fetching import Fetcher
from .state import Inputs, State, joined
from .workers import Mark, Worker


class Ends:
    """Both ends of an expert's forward.

    Args:
        expert: whose parts before and after the blocks are on the main worker's device.
        crew: who computes.
        fetchers: one per worker.
    """

    def __init__(self, expert: Expert, crew: Crew, fetchers: Sequence[Fetcher]):
        self._expert, self._crew, self._fetchers = expert, crew, fetchers

    def hand_out(self, given: list[torch.Tensor | None]) -> list[State]:
        """Every worker's tokens and inputs to its device.

        Args:
            given: latents, timestep, text and image embeddings on the main worker's device.
        """
        crew = self._crew
        with crew.main.computing():
            tokens, shared, rotary = self._embed(*given)
        counts = share_tokens(tokens.shape[1], [s.speed for s in crew.shares], [s.most for s in crew.shares])
        states: list[State] = []
        kept: list[torch.Tensor] = []
        marks: list[Mark] = []
        for share, span, fetcher in zip(crew.shares, token_ranges(counts), self._fetchers, strict=True):
            if span.stop == span.start:
                continue
            worker = share.worker
            with crew.main.computing():
                own = tokens[:, span].clone(memory_format=torch.contiguous_format)  # it is written to
            sent = self._sent_to(worker, [own, *self._inputs_for(span, shared, rotary)], kept, marks)
            states.append(State(share, span, sent[0], Inputs(*sent[1:]), fetcher))
        # What was sent from may go once the main worker knows it has arrived.
        crew.main.wait(*marks)
        kept.clear()
        self._prepare_exchange(states, tokens)
        for state in states:  # others write to its room for keys and values, which may stand where something was sent from
            state.attended = state.worker.mark()
        return states

    @staticmethod
    def _inputs_for(span: slice, shared: Any, rotary: Any) -> list[torch.Tensor]:
        projected, text, out, weight, bias = shared
        shift, scale = (part.squeeze(-2) if out.ndim == 4 else part for part in modulation_of(out, span).chunk(2, dim=-2))
        return [modulation_of(projected, span), text, rotary[0][:, span], rotary[1][:, span], shift, scale, weight, bias]

    def _sent_to(self, worker: Worker, tensors: Sequence[torch.Tensor], kept: list[torch.Tensor], marks: list[Mark]) -> list[torch.Tensor]:
        """Contiguous copies on a worker's device; its own are the tensors themselves where they can be."""
        main = self._crew.main
        with main.computing():
            tensors = [tensor.contiguous() for tensor in tensors]
        if worker is main:
            return tensors
        ready = main.mark()
        link = self._crew.link("inputs", main.device, worker, main)
        with worker.computing():
            targets = [torch.empty_like(tensor, device=worker.device) for tensor in tensors]
        allocated = worker.mark()
        arrived = [link.copy(target, tensor, (ready, allocated)) for target, tensor in zip(targets, tensors, strict=True)]
        worker.wait(arrived[-1])
        kept.extend(tensors)
        marks.append(arrived[-1])
        return targets

    def _embed(self, latents: Any, timestep: Any, text: Any, image: Any) -> Any:
        """All tokens [B, L, D], what every worker needs whole, and the rotary tables; on the main worker."""
        model: Any = self._expert.model
        cos, sin = rotary_tables(*model.rope(latents))
        tokens = model.patch_embedding(latents).flatten(2).transpose(1, 2)
        per_token = timestep.shape[1] if timestep.ndim == 2 else None
        temb, projected, text, image = model.condition_embedder(timestep.flatten(), text, image, timestep_seq_len=per_token)
        projected = projected.unflatten(-1, (6, -1))
        if image is not None:
            text = torch.cat([image, text], dim=1)
        if per_token is not None:
            out = model.scale_shift_table.unsqueeze(0) + temb.unsqueeze(2)  # [B, L, 2, D]
        else:
            out = model.scale_shift_table + temb.unsqueeze(1)  # [B, 2, D]
        return tokens, (projected, text, out, model.proj_out.weight.data, model.proj_out.bias.data), (cos, sin)

    def _prepare_exchange(self, states: list[State], tokens: torch.Tensor) -> None:
        if len(states) == 1:
            return
        math = self._expert.math
        groups = self._crew.head_groups(math.heads, tokens.shape[0] * tokens.shape[1])
        width = tokens.shape[2] // math.heads
        rooms = self._crew.exchanges(tokens.shape[0], tokens.shape[1], groups, width, tokens.dtype)
        numbers = {id(share): number for number, share in enumerate(self._crew.shares)}
        for state in states:
            state.exchange = rooms[numbers[id(state.share)]]

    # ---- after the blocks

    def gather(self, states: list[State], latents: torch.Tensor) -> torch.Tensor:
        """The output projection where the tokens are, put together on the main worker: [B, C, F, H, W], as large as ``latents``."""
        main, model = self._crew.main, self._expert.model
        config: Any = model.config
        for state in states:
            inputs = state.inputs
            with state.worker.computing():
                pieces = []
                for span in state.ranges():
                    x, shift, scale = state.x[:, span], inputs.out_shift, inputs.out_scale
                    if shift.shape[1] > 1:
                        shift, scale = shift[:, span], scale[:, span]
                    normed = F.layer_norm(x.float(), (x.shape[-1],), eps=config.eps)
                    normed = normed.mul_(1 + scale).add_(shift).type_as(x)
                    pieces.append(F.linear(normed, inputs.out_weight, inputs.out_bias))
                state.out = joined(pieces)
        gathered = []
        for state in states:
            assert state.out is not None
            if state.worker is main:
                gathered.append(state.out)
                continue
            link = self._crew.link("outputs", state.worker.device, main, state.worker)
            with main.computing():
                target = torch.empty_like(state.out, device=main.device)
            arrived = link.copy(target, state.out, (state.worker.mark(), main.mark()))
            main.wait(arrived)
            state.worker.wait(arrived)
            gathered.append(target)
        with main.computing():
            return self._unpatch(joined(gathered), latents)

    def _unpatch(self, out: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """[B, L, patch values] -> [B, C, F, H, W]."""
        config: Any = self._expert.model.config
        batch, _, frames, height, width = latents.shape
        t, h, w = config.patch_size
        out = out.reshape(batch, frames // t, height // h, width // w, t, h, w, -1)
        return out.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
