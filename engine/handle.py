"""What the ``WAN_SHARDED_MODEL`` socket carries: a description of what to load, a few hundred bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .checkpoints.diffusers_folder import open_diffusers_folder
from .checkpoints.hub import OnProgress, download_model, is_hub_id
from .checkpoints.lora import LoraFile
from .checkpoints.stored import ModelFiles
from .errors import InvalidRequestError
from .planning.placement import DEVICE_MAPS, OFFLOADS
from .weights.precision import WEIGHT_DTYPES

EXECUTIONS = ("auto", "parallel", "sequential")


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA for one expert, and how strongly it is added."""

    file: LoraFile
    strength: float


@dataclass(frozen=True)
class ModelHandle:
    """A model and how to spread it; loads nothing.

    Attributes:
        model: the checked files.
        weight_dtype: one of ``WEIGHT_DTYPES``.
        device_map: "auto" or "balanced".
        execution: "parallel" (all devices compute every block), "sequential" (each the blocks that live there), or "auto".
        offload: "auto", "cpu" or "none".
        max_memory_gib: visible GPU index -> GiB; 0 or missing = automatic, -1 = leave out.
        loras: expert part name -> its LoRAs.
        node_id: the loader node that shows the placement, if any; no part of the identity.

    Raises:
        InvalidRequestError: an unknown choice.
    """

    model: ModelFiles
    weight_dtype: str = "default"
    device_map: str = "balanced"
    execution: str = "auto"
    offload: str = "auto"
    max_memory_gib: Mapping[int, float] = field(default_factory=dict)
    loras: Mapping[str, tuple[LoraChoice, ...]] = field(default_factory=dict)
    node_id: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        choices = {"weight_dtype": WEIGHT_DTYPES, "device_map": DEVICE_MAPS, "execution": EXECUTIONS, "offload": OFFLOADS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InvalidRequestError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}.")


def open_model(
    model: str | Path,
    *,
    max_memory_gib: Mapping[int, float] | None = None,
    weight_dtype: str = "default",
    device_map: str = "balanced",
    execution: str = "auto",
    offload: str = "auto",
    node_id: str | None = None,
    on_download: OnProgress | None = None,
) -> ModelHandle:
    """Describe a model for :func:`engine.generate`; checks the files, loads no weights.

    Args:
        model: a folder in diffusers format, or a Hub id (downloaded on first use).
        max_memory_gib: visible GPU index -> the most this may use there, GiB, everything included. 0 or missing =
            automatic, -1 = leave that GPU out.
        on_download: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: the model is missing, incomplete or no Wan 2.2 I2V model.
        InvalidRequestError: an unknown choice.
    """
    path = Path(model)
    folder = path if path.exists() or not is_hub_id(str(model)) else download_model(str(model), on_download)
    return ModelHandle(
        open_diffusers_folder(folder), weight_dtype, device_map, execution, offload, dict(max_memory_gib or {}), node_id=node_id
    )
