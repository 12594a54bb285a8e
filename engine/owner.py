"""The one owner of what is loaded: both experts of one model, on the devices of one plan.

Handles are light and many; weights are heavy and here. Prompts that use the same model reuse it; another model replaces
it; ``release`` lets everything go. All of it runs under one lock: one video at a time, whichever threads ask.
"""

import gc
import threading
from dataclasses import replace
from typing import Any

import torch

from . import probe
from .handle import ModelHandle
from .loaded import LoadedModel
from .planning.budgets import NO_RESERVE, Reserve
from .planning.devices import Machine
from .planning.footprint import VideoShape
from .plans import Plan, make_plan, still_holds
from .usable import BF16_CAPABILITY
from .weights.precision import resolve_precision
from .weights.reading import TensorReader


class ModelOwner:
    """Holds at most one loaded model; the only mutable state of the pack."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._key: tuple[Any, ...] | None = None
        self._handle: ModelHandle | None = None
        self._loaded: LoadedModel | None = None

    @property
    def loaded(self) -> LoadedModel | None:
        return self._loaded

    def obtain(self, handle: ModelHandle, machine: Machine, shape: VideoShape, *, reserve: Reserve = NO_RESERVE) -> LoadedModel:
        """The loaded model of a handle with a plan for a size; weights arrive with ``activate``.

        The plan in force is kept when it holds for this run too, so that nothing moves needlessly.

        Args:
            handle: the model and how to spread it.
            machine: the devices as they are now.
            shape: the run's size.
            reserve: what the application around us wants left alone.

        Raises:
            CheckpointError, PlacementError, UnsupportedError: see there; what was loaded before stays.
        """
        reader = TensorReader()
        try:
            key, loaded, plan = self._prepare(handle, machine, shape, reserve, reader)
        except BaseException:
            reader.close()
            reader.give_back_buffers()
            raise
        if loaded is not self._loaded:
            self.release()
            self._loaded, self._key = loaded, key
        loaded.use_loras(handle.loras)
        if loaded.plan is not None and self._handle == handle and still_holds(loaded.plan, plan):
            kept = {part: replace(plan.placements[part], homes=loaded.plan.placements[part].homes) for part in plan.placements}
            plan = replace(plan, placements=kept)
        loaded.set_plan(plan)
        self._handle = handle
        return loaded

    def dry_plan(self, handle: ModelHandle, machine: Machine, shape: VideoShape, *, reserve: Reserve = NO_RESERVE) -> Plan:
        """The plan :meth:`obtain` would make; loads and changes nothing. Arguments and errors as there."""
        return self._prepare(handle, machine, shape, reserve)[2]

    def _prepare(
        self, handle: ModelHandle, machine: Machine, shape: VideoShape, reserve: Reserve, reader: TensorReader | None = None
    ) -> tuple[tuple[Any, ...], LoadedModel, Plan]:
        """The identity of what a handle needs loaded, that model (ours if it is the same, else one without weights), a plan.

        Where a new one is to be loaded, a reader is given for it; what reading to GPUs takes is made behind this.
        """
        on_gpu = machine.devices[0].is_gpu
        part_taking = [device for device in machine.devices if device.is_gpu and handle.max_memory_gib.get(device.index, 0) >= 0]
        precision, notes = resolve_precision(
            handle.weight_dtype,
            *(files.stored_dtype for files in handle.model.experts.values()),
            on_gpu=on_gpu,
            beside=[dtype for files in handle.model.experts.values() if (dtype := files.wide_dtype) is not None],
            without_bf16=[d.label for d in part_taking if (d.compute_capability or BF16_CAPABILITY) < BF16_CAPABILITY],
        )
        key = (handle.model.name, handle.model.fingerprint, precision)
        if self._key == key and self._loaded is not None:
            loaded = self._loaded
        else:
            if reader is not None and on_gpu and handle.offload != "cpu":
                reader.prepare()
            loaded = LoadedModel(handle, precision, reader or TensorReader())
        # What another model holds now is let go before this one arrives, so it counts as free.
        plan = make_plan(handle, loaded, machine, shape, notes, in_memory=self._loaded or loaded, reserve=reserve)
        return key, loaded, plan

    def held_bytes(self) -> dict[str, int]:
        """Bytes of weights on each device, by torch's device name."""
        if self._loaded is None or self._loaded.plan is None:
            return {}
        devices = [b.device.torch_device for b in self._loaded.plan.budgets]
        return {device: self._loaded.resident_bytes(torch.device(device)) for device in devices}

    def release(self) -> None:
        """Let everything go; the next prompt loads again."""
        with self.lock:
            loaded, self._loaded, self._key = self._loaded, None, None
            if loaded is None:
                return
            devices = [b.device.torch_device for b in loaded.plan.budgets] if loaded.plan else []
            loaded.release()
            del loaded
            gc.collect()
            probe.release_cached(devices)
