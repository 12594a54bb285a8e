"""Prompts to embeddings with the model's UMT5 encoder, which is loaded for that and let go again.

5.7B parameters for a twentieth of a second of work: keeping it would cost the video 11 GB. Embeddings are remembered, so
a prompt is encoded once. Nothing here knows the transformers.
"""

import gc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline
from transformers import AutoTokenizer, UMT5EncoderModel

from .. import probe
from ..checkpoints.diffusers_folder import weight_files
from ..checkpoints.safetensors_header import ELEMENT_BITS, read_header
from ..errors import CheckpointError
from ..loaded import LoadedModel
from ..planning.devices import GIB
from .callbacks import Callbacks

MAX_TOKENS = 512
# Besides its weights: 512 tokens' activations and the workspaces of a first matmul.
ACTIVATION_BYTES = int(0.75 * GIB)
# What loading takes for a moment: the largest tensor a second time, and what is converted.
LOADING_BYTES = int(2.5 * GIB)


class PromptEmbeddings:
    """Remembers the latest embeddings; 4 MB each."""

    def __init__(self, capacity: int = 16):
        self._capacity = capacity
        self._known: OrderedDict[tuple[Any, ...], torch.Tensor] = OrderedDict()

    def encode(self, folder: Path, identity: str, prompts: list[str], loaded: LoadedModel, callbacks: Callbacks) -> list[torch.Tensor]:
        """Embeddings [1, 512, text width] on the CPU, one per prompt, padded with zeros as Wan expects.

        Args:
            folder: the model's folder.
            identity: changes when the model's files do.
            prompts: texts; longer than 512 tokens is cut.
            loaded: whose weights make room while the encoder works.
            callbacks: told what is going on.

        Raises:
            CheckpointError: the encoder or the tokenizer can't be loaded.
        """
        keys = {prompt: (folder, identity, loaded.precision.dtype, prompt) for prompt in prompts}
        unknown = [prompt for prompt, key in keys.items() if key not in self._known]
        if unknown:
            callbacks.on_stage("Encoding the prompt")
            for prompt, embeds in zip(unknown, _encode(folder, unknown, loaded, callbacks), strict=True):
                self._known[keys[prompt]] = embeds
        result = [self._known[keys[prompt]] for prompt in prompts]
        for key in keys.values():
            self._known.move_to_end(key)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return result


def _encode(folder: Path, prompts: list[str], loaded: LoadedModel, callbacks: Callbacks) -> list[torch.Tensor]:
    plan = loaded.plan
    assert plan is not None
    on_gpu = probe.is_cuda(plan.budgets[0].device.torch_device)
    stored_bytes, stored_float32 = _stored(folder / "text_encoder")
    # As wide as the experts compute: UMT5 was published in bf16, and float32 would double its 11 GB.
    dtype = torch.bfloat16 if stored_float32 and plan.budgets[0].device.is_gpu and plan.precision.dtype != torch.float32 else None
    needed = (stored_bytes // 2 if dtype else stored_bytes) + ACTIVATION_BYTES
    rooms = _rooms(loaded, needed) if on_gpu else [None]
    for room, is_last in zip(rooms, [*[False] * (len(rooms) - 1), True], strict=True):
        try:
            return _encode_in(folder, prompts, dtype, room, [b.device.torch_device for b in plan.budgets], callbacks)
        except torch.OutOfMemoryError:
            if is_last:
                raise
        # Only here, with the exception gone, is its memory free again.
        callbacks.on_stage("Encoding the prompt with less on the GPU")
    raise AssertionError("there is always a way")


def _encode_in(
    folder: Path,
    prompts: list[str],
    dtype: torch.dtype | None,
    room: dict[int | str, int] | None,
    devices: list[str],
    callbacks: Callbacks,
) -> list[torch.Tensor]:
    """Load the encoder into the given room, encode, let it go."""
    encoder = pipeline = None
    try:
        callbacks.check_cancelled()
        tokenizer, encoder = _load(folder, dtype, room)
        callbacks.check_cancelled()
        pipeline = WanImageToVideoPipeline(tokenizer=tokenizer, text_encoder=encoder, vae=None, scheduler=None)  # type: ignore[arg-type]
        # Where its inputs go; diffusers before 0.41 takes the device it is given for that.
        device = next((p.device for p in encoder.parameters() if p.device.type != "meta"), torch.device("cpu"))
        embeds, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS, device=device)
        return list(embeds.cpu().split(1))
    finally:
        # The pipeline holds the encoder too, and accelerate's hooks make cycles: all of it must be gone before the VAE's stage.
        del pipeline, encoder
        gc.collect()
        probe.release_cached(devices)


def _load(folder: Path, dtype: torch.dtype | None, max_memory: dict[int | str, int] | None) -> tuple[Any, Any]:
    """Tokenizer and encoder.

    Raises:
        CheckpointError: one of them can't be loaded.
    """
    spread: Any = {"device_map": "sequential", "max_memory": max_memory} if max_memory else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        loaded: Any = UMT5EncoderModel.from_pretrained(
            folder / "text_encoder", dtype=dtype or "auto", local_files_only=True, output_loading_info=True, **spread
        )
        encoder, loading = loaded
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises many kinds; the cause is kept
        raise CheckpointError(f"The text encoder of {folder.name} could not be loaded: {error}. Download it again.") from error
    if loading["missing_keys"]:  # transformers would go on with random ones
        raise CheckpointError(
            f"The text encoder of {folder.name} lacks {len(loading['missing_keys'])} tensors, such as {min(loading['missing_keys'])}. "
            "Download it again."
        )
    return tokenizer, encoder.eval()


def _rooms(loaded: LoadedModel, needed: int) -> list[dict[int | str, int] | None]:
    """Where the encoder may go, the preferred way first: accelerate's ``max_memory`` by torch index, or ``None`` for the CPU.

    All of it on the roomiest GPU, or else on all GPUs together. Loading holds tensors twice for a moment (the embedding table alone is
    2 GiB), so where that runs out of memory less is tried, and then the CPU, which takes longer and always works.
    """
    plan = loaded.plan
    assert plan is not None
    ordered = sorted(plan.budgets, key=lambda budget: -budget.usable_bytes)
    chosen = ordered[:1] if ordered[0].usable_bytes >= needed else ordered
    for budget in chosen:
        loaded.make_room(budget.device.index, min(needed, budget.usable_bytes), budget.usable_bytes)
    probe.release_cached([b.device.torch_device for b in chosen])
    rooms: list[dict[int | str, int] | None] = []
    for spare in (ACTIVATION_BYTES, ACTIVATION_BYTES + LOADING_BYTES):
        room: dict[int | str, int] = {torch.device(b.device.torch_device).index: b.usable_bytes - spare for b in chosen}
        if min(room.values()) > 0:
            rooms.append({**room, "cpu": needed})
    return [*rooms, None]


def _stored(folder: Path) -> tuple[int, bool]:
    """Bytes of the weights on disk, and whether they are float32."""
    total, float32 = 0, False
    for file in weight_files(folder):
        for entry in read_header(file).values():
            count = 1
            for n in entry.shape:
                count *= n
            total += count * ELEMENT_BITS[entry.dtype] // 8
            float32 |= entry.dtype == "F32"
    return total, float32
