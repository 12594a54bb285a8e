"""The loader node's work: choices to a handle, and the placement it would have, in words."""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path

from ..engine import OWNER, ModelHandle, open_model, probe
from ..engine.errors import PlacementError, WanShardedError
from ..engine.planning.bars import as_json
from ..engine.planning.footprint import VideoShape
from ..engine.reports import plan_bars, plan_report
from . import memory, progress
from .model_files import FROM_MODEL, NONE, choose

logger = logging.getLogger(__name__)

# What the loader plans for; the sampler plans again for its own size.
DEFAULT_SHAPE = VideoShape(832, 480, 81)


def make_handle(
    *,
    node_id: str | None,
    model: str,
    high_noise_model: str,
    low_noise_model: str,
    text_encoder: str,
    vae: str,
    weight_dtype: str,
    device_map: str,
    execution: str,
    offload: str,
    sliders_gib: list[float],
) -> tuple[ModelHandle, str, list[dict[str, object]]]:
    """Check the choices, download the model where need be, and plan.

    Returns:
        The handle; what was found by itself, and the placement for 832x480x81, in words; and that placement as bars, none where it does not
        fit.

    Raises:
        WanShardedError: with the remedy.
    """
    choice = choose(model, high_noise_model, low_noise_model, text_encoder, vae)
    handle = open_model(
        choice.model,
        **choice.files,
        max_memory_gib=sliders_by_index(sliders_gib),
        weight_dtype=weight_dtype,
        device_map=device_map,
        execution=execution,
        offload=offload,
        node_id=node_id,
        on_download=progress.DownloadProgress(node_id),
    )
    handle = replace(handle, model=replace(handle.model, notes=(*choice.notes, *handle.model.notes)))
    for note in handle.model.notes:
        logger.info("Wan Sharded Loader: %s", note)
    words, bars = describe(handle)
    return handle, "\n".join((*handle.model.notes, words)), bars


def sliders_by_index(sliders_gib: list[float]) -> dict[int, float]:
    """Visible index -> GiB, without those at 0 (automatic)."""
    return {index: value for index, value in enumerate(sliders_gib) if value != 0}


def fingerprint(
    model: str | None,
    high_noise_model: str | None = NONE,
    low_noise_model: str | None = NONE,
    text_encoder: str | None = FROM_MODEL,
    vae: str | None = FROM_MODEL,
) -> str:
    """Changes when the files of a model on this computer do, so that ComfyUI does not reuse an old loader's output for new files."""
    if model is None or high_noise_model is None or low_noise_model is None or text_encoder is None or vae is None:
        return ""  # a widget that another node fills is not known yet
    try:
        choice = choose(model, high_noise_model, low_noise_model, text_encoder, vae)
        folder = None if choice.model is None else Path(choice.model)
        files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder and folder.is_dir() else []
        files += [file for file in choice.files.values() if file]
        stats = "|".join(f"{file}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)
        # ComfyUI writes this into every saved video, where nobody's folders belong.
        return hashlib.sha256(stats.encode()).hexdigest() if files else ""
    except (WanShardedError, OSError):
        return ""  # the node itself says what is wrong


def describe(handle: ModelHandle) -> tuple[str, list[dict[str, object]]]:
    """The placement a handle would have now, in words and as bars; says why where it would not fit."""
    with OWNER.lock:
        try:
            plan = OWNER.dry_plan(handle, probe.probe_machine(), DEFAULT_SHAPE, reserve=memory.reserve())
        except PlacementError as error:
            return f"{DEFAULT_SHAPE} would not fit: {error}", []
        return plan_report(plan), as_json(plan_bars(plan, own_vae=handle.model.vae is not None))
