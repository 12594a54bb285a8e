"""Prompts to embeddings with the model's UMT5 encoder, which is loaded for that and let go again.

5.7B parameters for a twentieth of a second of work: keeping it would cost the video 11 GB. Embeddings are remembered, so
a prompt is encoded once. Nothing here knows the transformers.
"""

import gc
from collections import OrderedDict
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline

from .. import probe
from ..checkpoints.stored import ModelFiles, fingerprint_of
from ..checkpoints.umt5_file import CHOOSE_TEXT_ENCODER, open_umt5_file
from ..errors import CheckpointError
from ..loaded import LoadedModel
from ..memory_errors import is_out_of_memory
from ..planning.devices import GIB
from .callbacks import Callbacks
from .text_encoder import FolderTextEncoder, LoadedTextEncoder, Room, TextEncoderSource
from .text_encoder_file import FileTextEncoder

MAX_TOKENS = 512
# What loading takes for a moment: the largest tensor a second time, and what is converted.
LOADING_BYTES = int(2.5 * GIB)


class PromptEmbeddings:
    """Remembers the latest embeddings; 4 MB each."""

    def __init__(self, capacity: int = 16):
        self._capacity = capacity
        self._known: OrderedDict[tuple[Any, ...], torch.Tensor] = OrderedDict()

    def encode(self, model: ModelFiles, prompts: list[str], loaded: LoadedModel, callbacks: Callbacks) -> list[torch.Tensor]:
        """Embeddings [1, 512, text width] on the CPU, one per prompt, padded with zeros as Wan expects.

        Args:
            model: whose text encoder.
            prompts: texts; longer than 512 tokens is cut.
            loaded: whose weights make room while the encoder works.
            callbacks: told what is going on.

        Raises:
            CheckpointError: there is no encoder, or it or the tokenizer can't be loaded.
        """
        identity = _identity(model)
        keys = {prompt: (*identity, loaded.precision.dtype, prompt) for prompt in prompts}
        unknown = [prompt for prompt, key in keys.items() if key not in self._known]
        if unknown:
            callbacks.on_stage("Encoding the prompt")
            for prompt, embeds in zip(unknown, _encode(model, unknown, loaded, callbacks), strict=True):
                self._known[keys[prompt]] = embeds
        result = [self._known[keys[prompt]] for prompt in prompts]
        for key in keys.values():
            self._known.move_to_end(key)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return result


def open_text_encoder(model: ModelFiles, *, narrow: bool) -> TextEncoderSource:
    """The model's text encoder, not loaded yet; reads headers only.

    Args:
        model: whose.
        narrow: float32 weights become bfloat16.

    Raises:
        CheckpointError: it has none, or none that can be read.
    """
    if model.text_encoder is None:
        raise CheckpointError(
            f"{model.name} has no text encoder. {CHOOSE_TEXT_ENCODER} Or connect positive_conditioning, and with cfg above 1 "
            "negative_conditioning as well."
        )
    if model.text_encoder.is_dir():
        return FolderTextEncoder(model.text_encoder, model.tokenizer, narrow=narrow)
    return FileTextEncoder(open_umt5_file(model.text_encoder), model.tokenizer, narrow=narrow)


def _identity(model: ModelFiles) -> tuple[Any, ...]:
    """Changes with the files that make the embeddings, and with nothing else of the model."""
    paths = [path for path in (model.text_encoder, model.tokenizer) if path is not None]
    try:
        files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
        return model.text_encoder, model.tokenizer, fingerprint_of(files)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror or error}. Was the text encoder moved?") from error


def _encode(model: ModelFiles, prompts: list[str], loaded: LoadedModel, callbacks: Callbacks) -> list[torch.Tensor]:
    plan = loaded.plan
    assert plan is not None
    on_gpu = probe.is_cuda(plan.budgets[0].device.torch_device)
    # As wide as the experts compute: UMT5 was published in bf16, and float32 would double its 11 GB.
    source = open_text_encoder(model, narrow=plan.budgets[0].device.is_gpu and plan.precision.dtype != torch.float32)
    rooms = _rooms(loaded, source.weight_bytes, source.activation_bytes) if on_gpu else [None]
    for room, is_last in zip(rooms, [*[False] * (len(rooms) - 1), True], strict=True):
        try:
            return _encode_in(source, prompts, room, [b.device.torch_device for b in plan.budgets], callbacks)
        except RuntimeError as error:
            if is_last or not is_out_of_memory(error):
                raise
        # Only here, with the exception gone, is its memory free again.
        callbacks.on_stage("Encoding the prompt with less on the GPU")
    raise AssertionError("there is always a way")


def _encode_in(source: TextEncoderSource, prompts: list[str], room: Room, devices: list[str], callbacks: Callbacks) -> list[torch.Tensor]:
    """Load the encoder into the given room, encode, let it go."""
    encoder: LoadedTextEncoder | None = None
    pipeline = None
    try:
        callbacks.check_cancelled()
        encoder = source.load(room, callbacks.check_cancelled)
        callbacks.check_cancelled()
        pipeline = WanImageToVideoPipeline(
            tokenizer=encoder.tokenizer,
            text_encoder=encoder.model,
            vae=None,  # type: ignore[arg-type]
            scheduler=None,  # type: ignore[arg-type]
        )
        # Where its inputs go; diffusers before 0.41 takes the device it is given for that.
        device = next((p.device for p in encoder.model.parameters() if p.device.type != "meta"), torch.device("cpu"))
        embeds, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS, device=device, dtype=encoder.dtype
        )
        if not bool(torch.isfinite(embeds).all()):
            raise CheckpointError(
                f"The text encoder {source.name} makes values of the prompt that are no numbers (NaN or infinite). It is damaged, or its "
                f"values are too large for float16. {CHOOSE_TEXT_ENCODER}"
            )
        return list(embeds.cpu().split(1))
    finally:
        # The pipeline holds the encoder too, and accelerate's hooks make cycles: all of it must be gone before the VAE's stage.
        del pipeline, encoder
        gc.collect()
        probe.release_cached(devices)


def _rooms(loaded: LoadedModel, weight_bytes: int, activation_bytes: int) -> list[Room]:
    """Where the encoder may go, the preferred way first.

    All of it on the roomiest GPU, or else on all GPUs together. Loading holds tensors twice for a moment (the embedding table alone is
    2 GiB), so where that runs out of memory less is tried, and then the CPU, which takes longer and always works.
    """
    plan = loaded.plan
    assert plan is not None
    needed = weight_bytes + activation_bytes
    ordered = sorted(plan.budgets, key=lambda budget: -budget.usable_bytes)
    chosen = ordered[:1] if ordered[0].usable_bytes >= needed else ordered
    for budget in chosen:
        loaded.make_room(budget.device.index, min(needed, budget.usable_bytes), budget.usable_bytes)
    probe.release_cached([b.device.torch_device for b in chosen])
    rooms: list[Room] = []
    for spare in (activation_bytes, activation_bytes + LOADING_BYTES):
        room: dict[int | str, int] = {torch.device(b.device.torch_device).index: b.usable_bytes - spare for b in chosen}
        if min(room.values()) > 0:
            rooms.append({**room, "cpu": needed})
    return [*rooms, None]
