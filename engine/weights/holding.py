"""A ``WanTransformer3DModel`` without weights, and the tensors that its modules hold, part by part."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import nn

from ..checkpoints.stored import ComponentFiles
from ..errors import CheckpointError
from ..transformer.lean_block import use_lean_blocks
from .keeping import inside

NOWHERE = torch.device("meta")


def empty_transformer(files: ComponentFiles) -> WanTransformer3DModel:
    """The model that a checkpoint's configuration describes, its parameters nowhere.

    Raises:
        CheckpointError: the configuration makes no model, or tensors are missing, left over, or of the wrong shape for it.
    """
    try:
        with init_empty_weights(include_buffers=False):
            made: Any = WanTransformer3DModel.from_config(dict(files.config))
            model: WanTransformer3DModel = made.eval().requires_grad_(False)
    except Exception as error:  # whatever a wrong value makes of the arithmetic; the cause is kept
        raise CheckpointError(
            f"{files.name} has a configuration (config.json) that makes no Wan transformer ({error}). Download it again."
        ) from error
    use_lean_blocks(model)
    _check(files, model)
    return model


def _check(files: ComponentFiles, model: WanTransformer3DModel) -> None:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: stored.shape for name, stored in files.tensors.items()}
    ignored = tuple(model._keys_to_ignore_on_load_unexpected or ())
    missing = sorted(shapes.keys() - found.keys())
    extra = sorted(name for name in found.keys() - shapes.keys() if not any(word in name for word in ignored))
    if missing or extra:
        words = [f"{len(missing)} missing, such as {missing[0]}"] if missing else []
        words += [f"{len(extra)} unknown, such as {extra[0]}"] if extra else []
        raise CheckpointError(
            f"{files.name} does not match its configuration (config.json): tensors {'; '.join(words)}. Download it again."
        )
    for name, shape in shapes.items():
        if shape != found[name]:
            stored = files.tensors[name]
            wants = "a model of its other tensors has" if stored.file.name == files.name else "its configuration (config.json) wants"
            raise CheckpointError(
                f"{files.name}: tensor {stored.key} is {list(found[name])}, but {wants} {list(shape)}. Download it again."
            )


class Holder:
    """Puts tensors into a model's modules and takes them out again.

    Args:
        model: its parameters are nowhere yet.
        parts: names of blocks, other top-level modules and top-level parameters, which together are the model.
    """

    def __init__(self, model: nn.Module, parts: Sequence[str]):
        self._model = model
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        # By name: asking the model walks down to it each time.
        self._modules = dict(model.named_modules())
        # Part -> its parameters' full names.
        self.names = {part: [name for name in self._shapes if name == part or name.startswith(f"{part}.")] for part in parts}
        # Part -> its tensors by their names inside it.
        self._held: dict[str, dict[str, torch.Tensor]] = {}

    def held(self, part: str) -> Mapping[str, torch.Tensor]:
        """What a part's modules hold, by the names inside it; nothing where it is nowhere."""
        return self._held.get(part, {})

    def hold(self, part: str, tensors: dict[str, torch.Tensor]) -> None:
        """Have a part's modules hold these tensors, and nothing else; none: they are nowhere."""
        for name in self.held(part):
            if name not in tensors:
                owner, last = self._owner(part, name)
                owner._parameters.pop(last, None)
        nowhere = {
            name: torch.empty(self._shapes[full], device=NOWHERE)
            for full in self.names[part]
            if (name := inside(part, full)) not in tensors
        }
        for name, tensor in {**nowhere, **tensors}.items():
            owner, last = self._owner(part, name)
            owner._parameters[last] = nn.Parameter(tensor, requires_grad=False)
        if tensors:
            self._held[part] = tensors
        else:
            self._held.pop(part, None)

    def move_buffers(self, part: str, device: torch.device) -> None:
        """Have a part's buffers on a device."""
        if part in self._model._modules:
            for module in self._modules[part].modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = buffer.to(device)

    def _owner(self, part: str, name: str) -> tuple[nn.Module, str]:
        """The module that has a tensor of a part as its parameter, and the parameter's name there."""
        if part in self._shapes:
            return self._model, part
        path, _, last = name.rpartition(".")
        return self._modules[f"{part}.{path}" if path else part], last
