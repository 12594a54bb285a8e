"""The loader node's work: choices to a handle, and the placement it would have, in words."""

from pathlib import Path

from ..engine import OWNER, ModelHandle, open_model, probe
from ..engine.errors import PlacementError, WanShardedError
from ..engine.pipeline.image_to_video import plan_report
from ..engine.planning.footprint import VideoShape
from . import memory, model_files, progress

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
) -> tuple[ModelHandle, str]:
    """Check the choices, download the model where need be, and plan.

    Returns:
        The handle, and the placement for 832x480x81 in words.

    Raises:
        WanShardedError: with the remedy.
    """
    model_files.refuse_single_files(
        model,
        high_noise_model=(high_noise_model, "none"),
        low_noise_model=(low_noise_model, "none"),
        text_encoder=(text_encoder, "from model"),
        vae=(vae, "from model"),
    )
    handle = open_model(
        model_files.resolve_model(model),
        max_memory_gib={index: value for index, value in enumerate(sliders_gib) if value != 0},
        weight_dtype=weight_dtype,
        device_map=device_map,
        execution=execution,
        offload=offload,
        node_id=node_id,
        on_download=progress.DownloadProgress(node_id),
    )
    return handle, describe(handle)


def fingerprint(model: str) -> str:
    """Changes when the files of a model on this computer do, so that ComfyUI does not reuse an old loader's output for new files."""
    try:
        folder = model_files.resolve_model(model)
        path = Path(folder)
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []
        return "|".join(f"{file.relative_to(path)}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)
    except (WanShardedError, OSError):
        return ""  # the node itself says what is wrong


def describe(handle: ModelHandle) -> str:
    """The placement a handle would have now, in words; says why where it would not fit."""
    with OWNER.lock:
        try:
            plan = OWNER.dry_plan(handle, probe.probe_machine(), DEFAULT_SHAPE, reserved_bytes=memory.reserved_bytes())
        except PlacementError as error:
            return f"{DEFAULT_SHAPE} would not fit: {error}"
        return plan_report(plan)
