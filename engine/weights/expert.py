"""One expert: a diffusers ``WanTransformer3DModel`` whose parts are read, moved and dropped one by one.

A part is a name of the placement's map: a block, another top-level module, or a top-level parameter. Knows nothing of
steps or pipelines; called by the owner of loaded models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import compute_module_sizes
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from torch import nn

from .. import probe
from ..checkpoints.diffusers_folder import ComponentFiles, component_config
from ..errors import CheckpointError
from ..planning.placement import HOST, Placement, parts_of
from ..transformer.lean_block import use_lean_blocks
from ..transformer.wan_block import FUSED, BlockMath, fused_name
from . import hooks
from .host_memory import HostPool
from .moving import moved
from .packing import Layout
from .precision import Precision, parameter_dtypes, quantizable_weights, quantized_weight

NOWHERE = torch.device("meta")
CPU = torch.device("cpu")
# Of a part's bytes, what may be converted each time it is read: norms and tables, never a matrix.
CHEAP_SHARE = 0.05
# In one block, named inside it.
TOGETHER = [(f"{fused_name(names)}.{kind}", tuple(f"{name}.{kind}" for name in names)) for names in FUSED for kind in ("weight", "bias")]


@dataclass(frozen=True)
class Packed:
    """A part's weights in one piece: uint8 ``flat`` with the tensors of ``layout`` in it."""

    layout: Layout
    flat: torch.Tensor


def _inside(part: str, full: str) -> str:
    """A parameter's name inside its part."""
    return full.removeprefix(f"{part}.")


class Expert:
    """A transformer and where its parts are now.

    On a GPU, and in system memory that GPUs fetch from, each part's weights are one piece of memory. Where the CPU computes, and
    for parts that just wait, they are what the mapped file gives.

    Args:
        name: what people call it, "high noise expert".
        files: its checked checkpoint.
        precision: how weights are kept in memory.
        host_pool: system memory for packed parts.

    Raises:
        CheckpointError: tensors are missing, left over, or of the wrong shape for the configuration.
    """

    def __init__(self, name: str, files: ComponentFiles, precision: Precision, host_pool: HostPool | None = None):
        self.name = name
        self._host_pool = host_pool or HostPool()
        self.files = files
        self.precision = precision
        config = component_config(files.folder)
        try:
            with init_empty_weights(include_buffers=False):
                model: Any = WanTransformer3DModel.from_config(config)
                self.model: WanTransformer3DModel = model.eval().requires_grad_(False)
        except Exception as error:  # whatever a wrong value makes of the arithmetic; the cause is kept
            raise CheckpointError(
                f"{files.folder.parent.name}/{files.folder.name} has a config.json that makes no Wan transformer ({error}). Download it again."
            ) from error
        use_lean_blocks(self.model)
        self.math = BlockMath.of(self.model.config)
        self._packed: dict[str, Packed] = {}
        self._block_layout: Layout | None = None
        self.dtypes = parameter_dtypes(self.model, precision)
        self._quantized = quantizable_weights(self.model) if precision.quantized else frozenset()
        self._locations = dict.fromkeys(parts_of(self.model), NOWHERE)
        sizing: Any = {"dtype": precision.dtype, "special_dtypes": self.dtypes}
        sizes = compute_module_sizes(self.model, **sizing)
        self._sizes = {part: sizes.get(part, 0) for part in self._locations}
        self._fetches: list[hooks.FetchHook] = []
        self._check_names()

    def _check_names(self) -> None:
        expected = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        found = {name: entry.shape for name, (_, entry) in self.files.tensors.items()}
        ignored = tuple(self.model._keys_to_ignore_on_load_unexpected or ())
        folder = f"{self.files.folder.parent.name}/{self.files.folder.name}"
        missing = sorted(expected.keys() - found.keys())
        extra = sorted(name for name in found.keys() - expected.keys() if not any(word in name for word in ignored))
        if missing or extra:
            words = [f"{len(missing)} missing, such as {missing[0]}"] if missing else []
            words += [f"{len(extra)} unknown, such as {extra[0]}"] if extra else []
            raise CheckpointError(f"{folder} does not match its config.json: tensors {'; '.join(words)}. Download it again.")
        for name, shape in expected.items():
            if shape != found[name]:
                raise CheckpointError(
                    f"{folder}: tensor {name} is {list(found[name])}, but config.json wants {list(shape)}. Download it again."
                )

    # ---- where parts are

    @property
    def width(self) -> int:
        """D, the width of the hidden state."""
        config: Any = self.model.config
        return config.num_attention_heads * config.attention_head_dim

    @property
    def widened_bytes(self) -> int:
        """What the largest quantized matrix takes while it is multiplied: once in float32, once in the compute dtype."""
        elements = max((self.model.get_parameter(name).numel() for name in self._quantized), default=0)
        return elements * (4 + self.precision.dtype.itemsize)

    @property
    def parts(self) -> list[str]:
        return list(self._locations)

    def location(self, part: str) -> torch.device:
        return self._locations[part]

    def resident_bytes(self, device: torch.device) -> int:
        """Bytes of this expert's weights on a device."""
        return sum(self._sizes[part] for part, where in self._locations.items() if where == device)

    def parts_on(self, device: torch.device) -> list[str]:
        return [part for part, where in self._locations.items() if where == device and self._sizes[part]]

    def part_bytes(self, part: str) -> int:
        return self._sizes[part]

    # ---- moving parts

    def bring(self, part: str, device: torch.device, stage: torch.device, *, packed: bool | None = None) -> None:
        """Have a part's weights on a device, from wherever they are.

        Args:
            part: the part's name.
            device: its home.
            stage: a device that converts fast, for weights that are quantized on their way to the host.
            packed: in one piece of memory, page-locked on the host; by default on GPUs only.
        """
        packed = device != CPU if packed is None else packed
        where = self._locations[part]
        if where == device and (part in self._packed or not packed):
            return
        if where == NOWHERE:
            self._read(part, device, stage, packed=packed)
        elif where != device and part not in self._packed:
            self._move(part, device)
        if (packed or part in self._packed) and not (part in self._packed and self._packed[part].flat.device == device):
            self._pack(part, device)
        self._locations[part] = device

    def packed(self, part: str) -> Packed | None:
        """The part's weights in one piece, where they are so."""
        return self._packed.get(part)

    def block_weights(self, part: str) -> dict[str, torch.Tensor]:
        """A block's weights by their names inside it, where they are now."""
        packed = self._packed.get(part)
        if packed is not None:
            return packed.layout.bind(packed.flat)
        return {name: parameter.data for name, parameter in self.model.get_submodule(part).named_parameters()}

    def block_layout(self, part: str) -> Layout:
        """How a block's weights lie when they are in one piece."""
        packed = self._packed.get(part)
        return packed.layout if packed is not None else Layout(self.block_weights(part), TOGETHER)

    def drop(self, part: str) -> None:
        """Forget a part's weights; they are read from the file again when needed."""
        self._move(part, NOWHERE)
        self._unpack(part)
        self._locations[part] = NOWHERE

    def is_cheap_to_read(self, part: str) -> bool:
        """Whether the file holds nearly all of this part as it is kept, so that the mapped file serves as its host copy."""
        converted = sum(
            parameter.numel()
            for full, module, name in self._parameters(part)
            if (parameter := module._parameters[name]) is not None
            and (full in self._quantized or self._stored_dtype(full) != self.dtypes[full])
        )
        return converted * 4 <= CHEAP_SHARE * self._sizes[part]

    def _stored_dtype(self, name: str) -> torch.dtype | None:
        names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        return names.get(self.files.tensors[name][1].dtype)

    def _parameters(self, part: str) -> list[tuple[str, nn.Module, str]]:
        """(full name, owning module, name there) of every parameter of a part."""
        if part in self.model._parameters:
            return [(part, self.model, part)]
        found = []
        for prefix, module in self.model.get_submodule(part).named_modules(prefix=part):
            found += [(f"{prefix}.{name}", module, name) for name, p in module._parameters.items() if p is not None]
        return found

    def _pack(self, part: str, device: torch.device) -> None:
        """Have the weights of a part in one piece of memory on a device, from wherever they are."""
        before = self._packed.get(part)
        if before is not None:
            layout, flat = before.layout, self._flat(before.layout, device)
            flat.copy_(before.flat)
        else:
            tensors = {_inside(part, full): module._parameters[name].data for full, module, name in self._parameters(part)}  # type: ignore[union-attr]
            layout = Layout(tensors, TOGETHER)
            flat = self._flat(layout, device)
            layout.fill(flat, tensors)
            probe.synchronize(str(device))  # what was read from is let go now
        self._bind(part, layout, flat)

    def _flat(self, layout: Layout, device: torch.device) -> torch.Tensor:
        if device == CPU:
            return self._host_pool.take(layout.total_bytes)
        return torch.empty(layout.total_bytes, dtype=torch.uint8, device=device)

    def _bind(self, part: str, layout: Layout, flat: torch.Tensor) -> None:
        """Let a part's parameters stand in ``flat``, which holds their values."""
        bound = layout.bind(flat)
        for full, module, name in self._parameters(part):
            module._parameters[name] = nn.Parameter(bound[_inside(part, full)], requires_grad=False)
        if part in self.model._modules:
            self._move_buffers(part, flat.device)
        if part.startswith("blocks."):
            self._block_layout = layout
        self._unpack(part)
        self._packed[part] = Packed(layout, flat)

    def _unpack(self, part: str) -> None:
        """Forget the one piece of memory; no parameter stands in it any more."""
        before = self._packed.pop(part, None)
        if before is not None and before.flat.device == CPU:
            self._host_pool.give(before.flat)

    def _move(self, part: str, device: torch.device) -> None:
        arrived = []
        for _, module, name in self._parameters(part):
            old = module._parameters[name]
            assert old is not None
            if device == NOWHERE:  # quantized tensors know no meta device
                new = torch.empty(old.shape, dtype=old.dtype, device=device)
            else:
                new = moved(old.data, device)
            arrived.append((module, name, nn.Parameter(new, requires_grad=False)))
        # Only now: should memory end half-way, the part is still whole where it was.
        for module, name, parameter in arrived:
            module._parameters[name] = parameter
        if part in self.model._modules and device != NOWHERE:
            self._move_buffers(part, device)

    def _move_buffers(self, part: str, device: torch.device) -> None:
        for module in self.model.get_submodule(part).modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    def _read(self, part: str, device: torch.device, stage: torch.device, *, packed: bool) -> None:
        """Read a part from its files to a device."""
        parameters, file = self._parameters(part), self.files.folder
        quantized = any(full in self._quantized for full, _, _ in parameters)
        convert_on = stage if device == CPU and quantized else device
        layout = self._known_layout(part) if packed else None
        flat = None if layout is None else self._flat(layout, device)
        files: dict[Path, Any] = {}
        try:
            for full, module, name in parameters:
                file = self.files.tensors[full][0]
                if file not in files:
                    files[file] = safe_open(file, framework="pt", device="cpu")
                tensor = files[file].get_tensor(full)
                if flat is None or full in self._quantized or tensor.dtype != self.dtypes[full]:
                    tensor = self._converted(full, module, tensor, convert_on)
                if layout is not None and flat is not None:
                    layout.fill_one(flat, _inside(part, full), tensor)
                else:
                    module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} could not be read ({error}). Was it moved or is it damaged? Download it again.") from error
        if layout is not None and flat is not None:
            probe.synchronize(str(convert_on))
            self._bind(part, layout, flat)
        elif convert_on != device and not packed:
            self._move(part, device)
        if part in self.model._modules:
            self._move_buffers(part, device)

    def _known_layout(self, part: str) -> Layout | None:
        """How a part will lie in one piece, where that is known before it is there: what quantization makes of a tensor, the first block tells."""
        parameters = self._parameters(part)
        if part.startswith("blocks.") and self._block_layout is not None:
            return self._block_layout
        if any(full in self._quantized for full, _, _ in parameters):
            return None
        shapes = {full: module._parameters[name].shape for full, module, name in parameters}  # type: ignore[union-attr]
        return Layout(
            {_inside(part, full): torch.empty(shape, dtype=self.dtypes[full], device=NOWHERE) for full, shape in shapes.items()}, TOGETHER
        )

    def _converted(self, full: str, module: nn.Module, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A tensor of the file as it is kept, on a device."""
        if full not in self._quantized:
            return tensor.to(device, self.dtypes[full])
        assert isinstance(module, nn.Linear)
        return quantized_weight(tensor.to(device, self.precision.dtype), self.precision.storage_dtype)

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
        self._fetches = hooks.attach(self.model, execution, offloaded, main, check_cancelled, ceilings)

    def undispatch(self) -> None:
        """Take all hooks off; the parts stay where they are."""
        self.release_fetched()
        remove_hook_from_module(self.model, recurse=True)
        self._fetches = []

    def clear_fetch_room(self) -> None:
        """Give back what fetched weights stood in; it is made again at the next forward."""
        for fetch in self._fetches:
            fetch.clear_room()

    def release_fetched(self) -> None:
        """Let go of fetched weights after a forward that raised."""
        for fetch in self._fetches:
            fetch.release()
