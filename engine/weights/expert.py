"""One expert: a diffusers ``WanTransformer3DModel`` whose parts are read, moved and dropped one by one.

A part is a name of the placement's map: a block, another top-level module, or a top-level parameter. Knows nothing of
steps or pipelines; called by the owner of loaded models.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import compute_module_sizes
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from torch import nn

from ..checkpoints.diffusers_folder import ComponentFiles, component_config
from ..errors import CheckpointError
from ..planning.placement import HOST, Placement, parts_of
from ..transformer.lean_block import use_lean_blocks
from . import hooks
from .moving import moved
from .precision import Precision, parameter_dtypes, quantizable_weights, quantize

NOWHERE = torch.device("meta")
CPU = torch.device("cpu")
# Of a part's bytes, what may be converted each time it is read: norms and tables, never a matrix.
CHEAP_SHARE = 0.05


class Expert:
    """A transformer and where its parts are now.

    Args:
        name: what people call it, "high noise expert".
        files: its checked checkpoint.
        precision: how weights are kept in memory.

    Raises:
        CheckpointError: tensors are missing, left over, or of the wrong shape for the configuration.
    """

    def __init__(self, name: str, files: ComponentFiles, precision: Precision):
        self.name = name
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

    def bring(self, part: str, device: torch.device, stage: torch.device) -> None:
        """Have a part's weights on a device, from wherever they are.

        Args:
            part: the part's name.
            device: its home.
            stage: a device that converts fast, for weights that are quantized on their way to the host.
        """
        where = self._locations[part]
        if where == device:
            return
        if where == NOWHERE:
            self._read(part, device, stage)
        else:
            self._move(part, device)
        self._locations[part] = device

    def drop(self, part: str) -> None:
        """Forget a part's weights; they are read from the file again when needed."""
        self._move(part, NOWHERE)
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

    def _read(self, part: str, device: torch.device, stage: torch.device) -> None:
        parameters = self._parameters(part)
        convert_on = stage if device == CPU and any(full in self._quantized for full, _, _ in parameters) else device
        by_file = defaultdict(list)
        for full, module, name in parameters:
            by_file[self.files.tensors[full][0]].append((full, module, name))
        for file, wanted in by_file.items():
            try:
                with safe_open(file, framework="pt", device="cpu") as opened:
                    for full, module, name in wanted:
                        self._place_tensor(full, module, name, opened.get_tensor(full), convert_on)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} could not be read ({error}). Was it moved or is it damaged? Download it again.") from error
        if part in self.model._modules:
            self._move_buffers(part, device)
        if convert_on != device:
            self._move(part, device)

    def _place_tensor(self, full: str, module: nn.Module, name: str, tensor: torch.Tensor, device: torch.device) -> None:
        quantized = full in self._quantized
        dtype = self.precision.dtype if quantized else self.dtypes[full]
        module._parameters[name] = nn.Parameter(tensor.to(device, dtype), requires_grad=False)
        if quantized:
            assert isinstance(module, nn.Linear)
            quantize(module, self.precision.storage_dtype)

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
