"""One expert: a diffusers ``WanTransformer3DModel`` whose parts are read, moved and dropped one by one.

A part is a name of the placement's map: a block, another top-level module, or a top-level parameter. Knows nothing of
steps or pipelines; called by the owner of loaded models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module

from .. import probe
from ..checkpoints.lora import LoraChoice
from ..checkpoints.stored import ComponentFiles
from ..host_memory import copy_on_host
from ..host_pool import HostPool
from ..planning.placement import HOST, Placement, parts_of
from ..transformer.low_precision import GGUF_CHUNK_BYTES
from ..transformer.wan_block import FUSED, BlockMath, fused_name
from . import hooks
from .adapters import Adapters
from .holding import NOWHERE, Holder, empty_transformer
from .keeping import Filling, Keeper
from .packing import Layout
from .precision import Precision
from .reading import TensorReader

CPU = torch.device("cpu")
# Of a part's bytes, what may be converted each time it is read: norms and tables, never a matrix.
CHEAP_SHARE = 0.05
# In one block, named inside it.
TOGETHER = [
    (f"{fused_name(names)}.{kind}", tuple(f"{name}.{kind}" for name in names))
    for names in FUSED
    for kind in ("weight", "weight_scale", "bias")
]


@dataclass(frozen=True)
class Packed:
    """A part's weights in one piece: uint8 ``flat`` with the tensors of ``layout`` in it."""

    layout: Layout
    flat: torch.Tensor


class Expert:
    """A transformer and where its parts are now.

    On a GPU, and in system memory that GPUs fetch from, each part's weights are one piece of memory. Where the CPU computes, and
    for parts that just wait, they are what the mapped file gives.

    Args:
        name: what people call it, "high noise expert".
        files: its checked checkpoint.
        precision: how weights are kept in memory.
        host_pool: system memory for packed parts.
        reader: of the files; may serve both experts.

    Raises:
        CheckpointError: tensors are missing, left over, or of the wrong shape for the configuration.
    """

    def __init__(
        self,
        name: str,
        files: ComponentFiles,
        precision: Precision,
        host_pool: HostPool | None = None,
        reader: TensorReader | None = None,
    ):
        self.name = name
        self._host_pool = host_pool or HostPool()
        self.files = files
        self.precision = precision
        self.model = empty_transformer(files)
        self.math = BlockMath.of(self.model.config)
        self.parts = parts_of(self.model)
        self._holder = Holder(self.model, self.parts)
        self._names = self._holder.names
        self._keeper = Keeper(self.model, files, precision, reader or TensorReader())
        self._adapters = Adapters()
        # Part -> the LoRAs that are in its tensors.
        self._adapted: dict[str, Adapters] = {}
        self._packed: dict[str, Packed] = {}
        self._locations = dict.fromkeys(self.parts, NOWHERE)
        self._layouts: dict[Any, Layout] = {}
        self._layouts_of: dict[tuple[str, Any], Layout] = {}
        self._fetches: list[hooks.FetchHook] = []
        self._may_have_hooks = False
        # Part -> what of it may not be where it is said to be yet.
        self._arriving: dict[str, Filling] = {}

    # ---- where parts are

    @property
    def width(self) -> int:
        """D, the width of the hidden state."""
        config: Any = self.model.config
        return config.num_attention_heads * config.attention_head_dim

    def widened_bytes(self, loras: Sequence[LoraChoice] | None = None) -> int:
        """What stands beside the largest matrix that is kept in few bits, or that a LoRA is added to, while it is multiplied; with the LoRAs in
        use or with others."""
        adapters = self._adapters if loras is None else Adapters(loras, self._keeper.matrices)
        elements = self._keeper.largest_elements(every=bool(adapters.key))
        has_gguf = any(form.gguf_type for form in self._keeper.low_precision.values())
        return elements * self.precision.dtype.itemsize + (min(GGUF_CHUNK_BYTES, 20 * elements) if has_gguf else 0)

    @property
    def compilable(self) -> bool:
        """Whether compiling the blocks has been measured to pay: all but GGUF's, each of whose blocks would be compiled anew."""
        return not any(form.gguf_type for form in self._keeper.low_precision.values())

    def location(self, part: str) -> torch.device:
        return self._locations[part]

    def resident_bytes(self, device: torch.device) -> int:
        """Bytes of this expert's weights on a device."""
        return sum(self.part_bytes(part) for part, where in self._locations.items() if where == device)

    def parts_on(self, device: torch.device) -> list[str]:
        return [part for part, where in self._locations.items() if where == device and self._names[part]]

    def part_bytes(self, part: str) -> int:
        """What a part takes in memory: as it is there, or as it will be."""
        return self.layout(part).total_bytes

    @property
    def largest_block_bytes(self) -> int:
        """What the largest block takes, with the LoRAs in use."""
        return max(size for part, size in self.sizes().items() if part.startswith("blocks."))

    def sizes(self, loras: Sequence[LoraChoice] | None = None) -> dict[str, int]:
        """Bytes of every part in the order they compute, with the LoRAs in use or with others."""
        adapters = self._adapters if loras is None else Adapters(loras, self._keeper.matrices)
        return {part: self._layout_with(part, adapters).total_bytes for part in self.parts}

    def use_loras(self, loras: Sequence[LoraChoice]) -> bool:
        """Have these LoRAs in what is brought home from now on; parts in memory follow at their next :meth:`bring`.

        Returns:
            Whether they differ from those before.
        """
        before, self._adapters = self._adapters, Adapters(loras, self._keeper.matrices)
        in_use = {self._adapters.key, *(adapters.key for adapters in self._adapted.values())}
        self._layouts_of = {(part, key): layout for (part, key), layout in self._layouts_of.items() if key in in_use}
        return before.key != self._adapters.key

    # ---- how a part lies in memory

    def layout(self, part: str) -> Layout:
        """How a part's weights lie when they are in one piece; one object for all parts that lie alike."""
        return self._layout_with(part, self._adapted.get(part, self._adapters))

    def _layout_with(self, part: str, adapters: Adapters) -> Layout:
        if (part, adapters.key) not in self._layouts_of:
            specs, kinds = self._keeper.specs(part, self._names[part], adapters)
            alike = (tuple(specs.items()), tuple(kinds.items()))
            if alike not in self._layouts:
                self._layouts[alike] = Layout(specs, TOGETHER, kinds)
            self._layouts_of[part, adapters.key] = self._layouts[alike]
        return self._layouts_of[part, adapters.key]

    def packed(self, part: str) -> Packed | None:
        """The part's weights in one piece, where they are so."""
        return self._packed.get(part)

    def block_weights(self, part: str) -> dict[str, Any]:
        """A block's weights by their names inside it, where they are now (see wan_block.py)."""
        packed = self._packed.get(part)
        if packed is not None:
            return packed.layout.bind(packed.flat, self._holder.held(part))
        return {**self._holder.held(part), **self.layout(part).kinds}

    # ---- moving parts

    def bring(self, part: str, device: torch.device, stage: torch.device, *, packed: bool | None = None, later: bool = False) -> None:
        """Have a part's weights on a device, from wherever they are.

        Args:
            part: the part's name.
            device: its home.
            stage: a device that converts fast, for weights that are converted on their way to the host.
            packed: in one piece of memory, page-locked on the host; by default on GPUs only.
            later: what is read may arrive after this returns. Nothing else must be asked of the part until :meth:`arrived`; after an
                error, here too, :meth:`drop_arriving` is to be called.
        """
        packed = device != CPU if packed is None else packed
        where, convert_on = self._locations[part], stage if device == CPU else device
        if where == NOWHERE:
            self._read(part, device, convert_on, packed=packed, later=later)
        else:
            if not self.is_current(part):
                self._adapt(part, stage if where == CPU else where)
            if where != device or (packed and part not in self._packed):
                self._move(part, device, packed=packed or part in self._packed)
        if not later:
            self._host_pool.finish()
        self._holder.move_buffers(part, device)
        self._locations[part] = device

    def arrived(self) -> None:
        """Wait until all that was brought is there, or in the order of its GPU's stream."""
        self._keeper.finish()
        self._host_pool.finish()
        self._arriving.clear()

    def drop_arriving(self) -> None:
        """Forget the parts that are not all there, and let no more arrive."""
        try:
            self._keeper.close()
            self._host_pool.finish()
        finally:
            for part, filling in self._arriving.items():
                if filling.incomplete:
                    self.drop(part)
            self._arriving.clear()

    def host_bytes_to_make(self, part: str) -> int:
        """What must be made before a part can stand on the host in one piece: all of it, or nothing where it stands there already, or what it
        comes into is page-locked afterwards."""
        layout, packed = self._layout_with(part, self._adapters), self._packed.get(part)
        stands = packed is not None and packed.flat.device == CPU and packed.layout is layout
        return 0 if stands or self._locked_behind(part, CPU) else layout.total_bytes

    def _locked_behind(self, part: str, device: torch.device) -> bool:
        """Whether what a part comes into is page-locked once it is there: on the host, from a file or from other memory of the host. What a
        GPU copies there must be locked before, or it takes longer."""
        where = self._locations[part]
        is_loose = where == CPU and part not in self._packed
        return device == CPU and (is_loose or (where in (CPU, NOWHERE) and self.is_cheap_to_read(part)))

    def bring_into(self, part: str, flat: torch.Tensor, device: torch.device) -> None:
        """Have a part's weights in memory that something else stood in, once they have arrived there.

        Args:
            part: the part's name; it is nowhere, or on the host with the LoRAs in use.
            flat: uint8 of exactly the part's bytes.
            device: where that is; the work is queued in its current stream, and waited for.
        """
        layout = self.layout(part)
        try:
            if self._locations[part] == NOWHERE:
                self._keeper.fill(part, self._names[part], self._adapters, layout, flat, device)
                self._adapted[part] = self._adapters
            elif part in self._packed:
                flat.copy_(self._packed[part].flat, non_blocking=True)
            else:
                layout.fill(flat, self._holder.held(part))
        finally:  # after an error, too, nothing must arrive in memory that is let go
            probe.wait_for_stream(str(device))
        self._keep(part, layout, flat)
        self._holder.move_buffers(part, device)
        self._locations[part] = device

    def park(self, part: str) -> None:
        """Have a part's weights wait in host memory, as they are."""
        self._move(part, CPU, packed=part in self._packed)
        self._holder.move_buffers(part, CPU)
        self._locations[part] = CPU

    def is_current(self, part: str) -> bool:
        """Whether what is in memory of a part has the LoRAs in use."""
        return self._adapted.get(part, self._adapters).key == self._adapters.key

    def drop(self, part: str) -> None:
        """Forget a part's weights; they are read from the file again when needed."""
        self._hold(part, {})
        self._unpack(part)
        self._adapted.pop(part, None)
        self._locations[part] = NOWHERE

    def is_cheap_to_read(self, part: str) -> bool:
        """Whether the file holds nearly all of this part as it is kept, so that the mapped file serves as its host copy."""
        return self._keeper.converted_bytes(self._names[part], self._adapters) <= CHEAP_SHARE * self.part_bytes(part)

    def takes_host_memory(self, part: str) -> bool:
        """Whether a part that is on the host stands in memory of its own, rather than nearly all of it in its mapped file."""
        return part in self._packed or not self.is_cheap_to_read(part)

    def check_mapped(self) -> None:
        """Check that the files that weights are mapped from, if any, were not written to.

        Raises:
            CheckpointError: one was.
        """
        self._keeper.reader.check_mapped()

    def close_files(self) -> None:
        """Let go of what reading took, once everything is at home. Some page-locked memory is kept for more of it."""
        self._keeper.close()

    def give_back_buffers(self) -> None:
        """Let go of that memory, too."""
        self._keeper.reader.give_back_buffers()

    def _read(self, part: str, device: torch.device, convert_on: torch.device, *, packed: bool, later: bool) -> None:
        """Read a part from its files to a device."""
        names, adapters = self._names[part], self._adapters
        layout = self._layout_with(part, adapters)
        if packed:
            behind = self._locked_behind(part, device)
            flat = self._flat(layout, device, locked=not behind)
            filling = self._keeper.fill(part, names, adapters, layout, flat, convert_on, later=later)
            if behind:
                self._host_pool.lock_behind(flat, filling.is_read)
            self._keep(part, layout, flat, filling.views)
            if later:
                self._arriving[part] = filling
        else:
            self._hold(part, self._keeper.loose(part, names, adapters, convert_on))
        self._adapted[part] = adapters

    def _adapt(self, part: str, convert_on: torch.device) -> None:
        """Have the LoRAs in use in a part that is in memory, where it is. What they don't touch is not read again."""
        old, new = self._adapted[part], self._adapters
        names = self._keeper.touched(self._names[part], old, new)
        before, layout = self._layout_with(part, old), self._layout_with(part, new)
        # Own values of a matrix stay, unless a LoRA changes or changed them.
        whole = [name for name in names if old.merged(name) or new.merged(name) or name not in self._keeper.matrices]
        added = [name for name in names if name not in whole]
        self._adapted[part] = new
        packed = self._packed.get(part)
        try:
            if packed is None:
                kept = {name: tensor for name, tensor in self._holder.held(part).items() if name in layout.specs}
                changed = self._keeper.loose(part, whole, new, convert_on)
                self._hold(part, {**kept, **changed, **self._keeper.loose(part, added, new, convert_on, only_added=True)})
                return
            behind = self._locked_behind(part, packed.flat.device)
            flat = packed.flat if layout is before else self._copied(before, packed.flat, layout, locked=not behind)
            self._keeper.fill(part, whole, new, layout, flat, convert_on)
            self._keeper.fill(part, added, new, layout, flat, convert_on, only_added=True)
            probe.synchronize(str(convert_on))
            if flat is not packed.flat:
                if behind:
                    self._host_pool.lock_behind(flat, lambda: True)
                self._keep(part, layout, flat)
        except BaseException:
            self.drop(part)  # what is half one and half the other is neither
            raise

    def _copied(self, before: Layout, flat: torch.Tensor, after: Layout, *, locked: bool) -> torch.Tensor:
        """Another piece of memory on the same device, with what is the same in both layouts."""
        copy = self._flat(after, flat.device, locked=locked)
        same = [(copy[after.span(n)], flat[before.span(n)]) for n, spec in after.specs.items() if before.specs.get(n) == spec]
        if flat.device == CPU:
            copy_on_host(same)
        else:
            for target, source in same:
                target.copy_(source)
        return copy

    def _move(self, part: str, device: torch.device, *, packed: bool) -> None:
        """A part from device to device, or from loose tensors into one piece."""
        before, layout = self._packed.get(part), self.layout(part)
        if not packed:
            self._hold(part, {name: tensor.to(device) for name, tensor in self._holder.held(part).items()})
            return
        behind = self._locked_behind(part, device)
        flat = self._flat(layout, device, locked=not behind)
        if before is not None:
            flat.copy_(before.flat)
        else:
            layout.fill(flat, self._holder.held(part))
            probe.synchronize(str(device))  # what was copied from is let go now
        if behind:
            self._host_pool.lock_behind(flat, lambda: True)
        self._keep(part, layout, flat)

    def _flat(self, layout: Layout, device: torch.device, *, locked: bool = True) -> torch.Tensor:
        if device == CPU:
            return self._host_pool.take(layout.total_bytes, locked=locked)
        return torch.empty(layout.total_bytes, dtype=torch.uint8, device=device)

    def _keep(self, part: str, layout: Layout, flat: torch.Tensor, views: Mapping[str, torch.Tensor] | None = None) -> None:
        """Let a part stand in ``flat``, which holds its values."""
        self._hold(part, dict(views or layout.views(flat)))
        self._unpack(part)
        self._packed[part] = Packed(layout, flat)

    def _unpack(self, part: str) -> None:
        """Forget the one piece of memory; no parameter stands in it any more."""
        before = self._packed.pop(part, None)
        if before is not None and before.flat.device == CPU:
            self._host_pool.give(before.flat)

    def _hold(self, part: str, tensors: dict[str, torch.Tensor]) -> None:
        self._holder.hold(part, tensors)
        if tensors and part.startswith("blocks."):
            module: Any = self.model.get_submodule(part)
            module.weight_kinds = self.layout(part).kinds

    # ---- computing

    def dispatch(
        self,
        placement: Placement,
        devices: Mapping[int, torch.device],
        check_cancelled: hooks.CheckCancelled,
        ceilings: Mapping[torch.device, int],
    ) -> None:
        """Make the model callable with its parts where the placement has them (they must be there already).

        Args:
            placement: the homes.
            devices: visible index -> torch's device.
            check_cancelled: raises when the run should stop.
            ceilings: the most the allocator should hold on each device.
        """
        self.undispatch()
        main = devices[placement.main_device]
        execution = {
            part: main if home == HOST else devices[int(home)]
            for part, home in placement.homes.items()
            if part not in self.model._parameters
        }
        offloaded = frozenset(part for part in placement.offloaded if part in execution)
        self._may_have_hooks = True  # also where this is interrupted
        self._fetches = hooks.attach(self.model, execution, offloaded, main, check_cancelled, ceilings)

    def undispatch(self) -> None:
        """Take all hooks off; the parts stay where they are."""
        self.release_fetched()
        if self._may_have_hooks:  # looking for them takes milliseconds, and this is asked for each part that leaves
            remove_hook_from_module(self.model, recurse=True)
        self._may_have_hooks, self._fetches = False, []

    def clear_fetch_room(self) -> None:
        """Give back what fetched weights stood in; it is made again at the next forward."""
        for fetch in self._fetches:
            fetch.clear_room()

    def release_fetched(self) -> None:
        """Let go of fetched weights after a forward that raised."""
        for fetch in self._fetches:
            fetch.release()
