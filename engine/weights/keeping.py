"""From what a file has of an expert's parameters to what is kept of them in memory: which tensors, in which form, made how.

Knows files, precisions and LoRAs; not where parts live.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..checkpoints.stored import ComponentFiles, StoredTensor
from ..transformer.low_precision import quantized_rows, widened_gguf, widened_rows
from .adapters import Adapters
from .packing import Layout, Spec
from .precision import Form, Precision, block_matrices, parameter_forms, scale_name, stored_dtype
from .reading import TensorReader

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


def inside(part: str, full: str) -> str:
    """A parameter's name inside its part."""
    return full.removeprefix(f"{part}.")


def _beside(name: str, other: str) -> str:
    """Another parameter's name of the same layer."""
    return f"{name.rpartition('.')[0]}.{other}"


@dataclass(frozen=True)
class _Step:
    """Something to be read: as the file has it, or made of what it has.

    Attributes:
        name: of the tensor in memory, inside its part.
        straight: what is copied byte for byte.
        made: makes tensors on a device, by name.
    """

    name: str
    straight: StoredTensor | None
    made: Callable[[torch.device], Tensors] | None = None


class Keeper:
    """How one expert's parameters are kept.

    Args:
        model: the transformer, on the meta device.
        files: its checkpoint.
        precision: how weights are kept.
        reader: of the files.
    """

    def __init__(self, model: nn.Module, files: ComponentFiles, precision: Precision, reader: TensorReader):
        self.reader = reader
        self.matrices = block_matrices(model)
        self._stored, self._precision = files.tensors, precision
        self._forms = parameter_forms(model, files.tensors, precision)

    @property
    def low_precision(self) -> Mapping[str, Form]:
        """Parameter name -> form, of those kept in few bits."""
        return {name: form for name, form in self._forms.items() if form.few_bits}

    def form(self, name: str, adapters: Adapters) -> Form:
        """How a parameter is kept. One whose own values a LoRA changes is kept wide: rounded again, the change could be lost."""
        form = self._forms[name]
        return Form(self._precision.dtype) if form.few_bits and adapters.merged(name) else form

    def specs(self, part: str, names: Sequence[str], adapters: Adapters) -> tuple[dict[str, Spec], dict[str, str]]:
        """The tensors that a part is kept in, by their names inside it, and the kinds of those that are no plain ones."""
        specs: dict[str, Spec] = {}
        kinds: dict[str, str] = {}
        for full in names:
            name, form, stored = inside(part, full), self.form(full, adapters), self._stored[full]
            specs.update(form.specs(name, stored))
            if form.gguf_type is not None:
                kinds[f"{name}.gguf"] = form.gguf_type
            added = adapters.specs(full, stored.shape, self._precision.dtype)
            specs.update({_beside(name, other): spec for other, spec in added.items()})
        return specs, kinds

    def converted_bytes(self, names: Sequence[str], adapters: Adapters) -> int:
        """What of some parameters is not kept as the file has it."""
        return sum(
            self._stored[full].elements * form.dtype.itemsize
            for full in names
            if not self._as_stored(full, form := self.form(full, adapters), adapters)
        )

    def touched(self, names: Sequence[str], before: Adapters, after: Adapters) -> list[str]:
        """Those of some parameters that other LoRAs change, or something beside them."""
        dtype = self._precision.dtype

        def concerns(full: str, adapters: Adapters) -> bool:
            return adapters.merged(full) or bool(adapters.specs(full, self._stored[full].shape, dtype))

        return [full for full in names if concerns(full, before) or concerns(full, after)]

    def _as_stored(self, full: str, form: Form, adapters: Adapters) -> bool:
        stored = self._stored[full]
        has_scale = stored.scale is not None and not form.scaled
        return stored_dtype(stored) == form.dtype and not has_scale and not adapters.merged(full)

    # ---- reading

    def fill(
        self,
        part: str,
        names: Sequence[str],
        adapters: Adapters,
        layout: Layout,
        flat: torch.Tensor,
        convert_on: torch.device,
        *,
        only_added: bool = False,
    ) -> None:
        """Read parameters into the one piece of memory of their part.

        Args:
            part, names: the part, and which of its parameters.
            adapters: LoRAs to be added.
            layout, flat: where they go.
            convert_on: the device that converts; the work is queued there.
            only_added: read only what stands beside matrices whose own values stay.
        """
        steps = list(self._steps(part, names, adapters, only_added=only_added))
        self.reader.read_into([(step.straight, flat[layout.span(step.name)]) for step in steps if step.straight is not None])
        for step in steps:
            if step.made is not None:
                for name, tensor in step.made(convert_on).items():
                    layout.view(flat, name).copy_(tensor, non_blocking=True)

    def loose(self, part: str, names: Sequence[str], adapters: Adapters, convert_on: torch.device) -> Tensors:
        """Parameters as tensors of the CPU, which are the mapped file where it has them as they are kept."""
        found: Tensors = {}
        for step in self._steps(part, names, adapters):
            if step.straight is not None:
                found[step.name] = self.reader.mapped(step.straight)
            elif step.made is not None:
                found.update({name: tensor.to(CPU) for name, tensor in step.made(convert_on).items()})
        return found

    def _steps(self, part: str, names: Sequence[str], adapters: Adapters, *, only_added: bool = False) -> Iterator[_Step]:
        for full in names:
            name, stored, form = inside(part, full), self._stored[full], self.form(full, adapters)
            if not only_added or full not in self.matrices or adapters.merged(full):
                yield from self._own_values(full, name, stored, form, adapters)
            if adapters.specs(full, stored.shape, self._precision.dtype):
                yield _Step(name, None, lambda device, full=full, name=name: self._added(full, name, adapters, device))

    def _own_values(self, full: str, name: str, stored: StoredTensor, form: Form, adapters: Adapters) -> Iterator[_Step]:
        if not self._as_stored(full, form, adapters):
            yield _Step(name, None, lambda device: self._converted(full, name, form, adapters, device))
            return
        yield _Step(name, stored)
        if form.scaled:
            yield _Step(name, None, lambda device: {scale_name(name): self._scale(stored, device)})

    def _added(self, full: str, name: str, adapters: Adapters, device: torch.device) -> Tensors:
        found = adapters.low_rank(full, self._precision.dtype, self.reader, device)
        return {_beside(name, other): tensor for other, tensor in found.items()}

    def _scale(self, stored: StoredTensor, device: torch.device) -> torch.Tensor:
        """Float32 [out, 1]; a file's one scale for all rows is repeated, and none is 1."""
        rows = stored.shape[0]
        if stored.scale is None:
            return torch.ones(rows, 1, device=device)
        return self.reader.on_device(stored.scale, device).float().reshape(-1, 1).expand(rows, 1)

    def _wide(self, stored: StoredTensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The values that a tensor of the file stands for."""
        raw = self.reader.on_device(stored, device)
        if stored.gguf_type is not None:
            return widened_gguf(raw, stored.gguf_type, dtype).view(stored.shape)
        if stored.scale is None:
            return raw.to(dtype)
        # A scale may stand beside what is wide already, too.
        return widened_rows(raw.flatten(1), self._scale(stored, device), dtype).view(stored.shape)

    def _converted(self, full: str, name: str, form: Form, adapters: Adapters, device: torch.device) -> Tensors:
        stored = self._stored[full]
        if adapters.merged(full):
            return {name: adapters.merge(full, self._wide(stored, torch.float32, device), self.reader).to(form.dtype)}
        if form.scaled:
            # In the precision of computing, so that files in float32 and in bf16 give the same.
            values, scale = quantized_rows(self._wide(stored, self._precision.dtype, device), form.dtype)
            return {name: values, scale_name(name): scale}
        return {name: self._wide(stored, form.dtype, device)}

    def largest_elements(self) -> int:
        """Values of the largest matrix that is widened at once: layers of one input are widened as one."""
        found = [math.prod(self._stored[name].shape) * (3 if name.endswith("attn1.to_q.weight") else 1) for name in self.low_precision]
        return max(found, default=0)
