"""Our weights in ComfyUI's memory management: one patcher per GPU, so that "unload models", ``/free`` and other models'
loads reach them, and room made by unloading what ComfyUI itself holds.
"""

from collections.abc import Iterable
from functools import cache

import comfy.model_management as management
import torch
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher
from torch import nn

from ..engine import OWNER
from ..engine.handle import ModelHandle
from ..engine.host_memory import PAGE_LOCKING
from ..engine.planning.budgets import NO_RESERVE, Reserve
from ..engine.planning.devices import GIB, Machine

try:
    import comfy.memory_management as memory_management  # newer ComfyUI
except ImportError:
    memory_management = None

PAGE_LOCKING.allowed = not getattr(args, "disable_pinned_memory", False)
PAGE_LOCKING.others_bytes = lambda: int(getattr(management, "TOTAL_PINNED_MEMORY", 0))

# Of a video, and what else may come while the weights stay.
FRAMES_BYTES = GIB


class GpuShare(ModelPatcher):
    """What the owner holds on one device, as ComfyUI sees it."""

    def __init__(self, device: torch.device):
        super().__init__(_WanSharded(), load_device=device, offload_device=torch.device("cpu"), size=1)

    def model_size(self) -> int:
        return max(1, self.loaded_size())

    def loaded_size(self) -> int:
        """Bytes here; for the default device, on all: ComfyUI's "unload models" asks only that one, and it answers for all."""
        held = OWNER.held_bytes()
        return sum(held.values()) if self._is_default else held.get(str(self.load_device), 0)

    @property
    def _is_default(self) -> bool:
        return self.load_device == management.get_torch_device()

    def __del__(self) -> None:
        """Nothing: core's would detach, and at the end of the process wait for a lock that a dead thread may hold."""

    def model_dtype(self) -> None:
        return None

    def current_loaded_device(self) -> torch.device:
        return self.load_device

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False) -> int:
        """Nothing to do: the owner loads when a sampler runs."""
        return 0

    def partially_unload(self, device_to, memory_to_free=0, *args, **kwargs) -> float:
        """Park weights on this device until ``memory_to_free`` bytes are free there, or none are left.

        Returns:
            ``memory_to_free``, unrounded: there is nothing more to be had from us here, and for any less core would detach everything.
        """
        with OWNER.lock:
            loaded = OWNER.loaded
            if loaded is not None and loaded.plan is not None:
                held = OWNER.held_bytes().get(str(self.load_device), 0)
                for budget in loaded.plan.budgets:
                    if budget.device.torch_device == str(self.load_device):
                        loaded.make_room(budget.device.index, 0, max(0, held - int(memory_to_free)))
            management.soft_empty_cache()
        return memory_to_free

    def detach(self, unpatch_all=True) -> nn.Module:
        """Let go of what is here, or of everything where this is the default device ("unload models").

        Args:
            unpatch_all: core's ``load_models_gpu`` gives False where it lists a model anew; nothing is to go then.
        """
        if not unpatch_all:
            return self.model
        if self._is_default:
            OWNER.release()
        else:
            self.partially_unload(self.offload_device, self.loaded_size())
        return self.model


class _WanSharded(nn.Module):
    """What ComfyUI's log calls the thing it loads and unloads."""

    device = None


@cache
def _share(torch_device: str) -> GpuShare:
    return GpuShare(torch.device(torch_device))


def make_room(handle: ModelHandle, machine: Machine) -> None:
    """Have ComfyUI unload its own models from the GPUs that take part, as far as the sliders ask."""
    for device in machine.devices:
        slider = handle.max_memory_gib.get(device.index, 0.0)
        if not device.is_gpu or slider < 0:
            continue
        wanted = slider * GIB - OWNER.held_bytes().get(device.torch_device, 0) if slider else 1e30
        ours = [model for model in management.current_loaded_models if isinstance(model.model, GpuShare)]
        management.free_memory(wanted, torch.device(device.torch_device), keep_loaded=ours)
    management.soft_empty_cache()


def register(torch_devices: Iterable[str]) -> None:
    """Tell ComfyUI that we hold memory on these devices."""
    known = management.loaded_models()
    default = str(management.get_torch_device())
    shares = [_share(device) for device in {default, *torch_devices}]
    new = [share for share in shares if share not in known]
    if new:
        management.load_models_gpu(new)
    # As of a model that is in use, newer ComfyUI would make room for all of it again whenever a node loads its models "back".
    for listed in management.current_loaded_models:
        if isinstance(listed.model, GpuShare):
            listed.currently_used = False


def reserve() -> Reserve:
    """What ComfyUI wants left alone: its reserve on every GPU, and the system memory below which it drops results from its cache."""
    before_dropping = max(float(getattr(memory_management, "RAM_CACHE_HEADROOM", 0)), _cache_ram_gib() * GIB)
    host_bytes = int(before_dropping) + FRAMES_BYTES if before_dropping else 0
    return Reserve(int(management.extra_reserved_memory()), max(NO_RESERVE.host_bytes, host_bytes))


def _cache_ram_gib() -> float:
    """``--cache-ram`` of older ComfyUI; newer ComfyUI does so by itself, with a headroom of its own."""
    given = getattr(args, "cache_ram", 0)
    return float(given) if isinstance(given, int | float) else 0.0
