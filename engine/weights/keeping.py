"""From what a file has of an expert's parameters to what is kept of them in memory: which tensors, in which form, made how.

Knows files, precisions and LoRAs; not where parts live.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import nn

from ..checkpoints.stored import ComponentFiles, StoredTensor
from ..transformer.low_precision import quantized_rows, widened_gguf, widened_rows
from .adapters import Adapters
from .packing import Layout, Spec
from .pieces import Stretch, raw_shape
from .precision import Form, Precision, block_matrices, parameter_forms, scale_name, stored_dtype
from .reading import Reading, TensorReader

CPU = torch.device("cpu")
# What is read to be converted, at most at a time; a single matrix may be more.
BATCH_BYTES = 64 * 1024**2
# So much of it may stand in memory until all that was begun with it has arrived: scales and the like, of a whole expert.
WAITING_BYTES = 4 * 1024**2
# Of what is more than that, and so read before all else, so much may wait when the next of it is begun, so that threads read while it is
# converted: one of a block's largest matrices, in bf16, or a few of the others.
LARGE_BYTES = 144 * 1024**2
Tensors = dict[str, torch.Tensor]
ToRead = tuple[StoredTensor, Stretch]


def inside(part: str, full: str) -> str:
    """A parameter's name inside its part."""
    return full.removeprefix(f"{part}.")


def _beside(name: str, other: str) -> str:
    """Another parameter's name of the same layer."""
    return f"{name.rpartition('.')[0]}.{other}"


@dataclass(frozen=True)
class _Step:
    """Something that is kept, and what it is made of.

    Attributes:
        name: of the tensor in memory, inside its part.
        sources: what is read for it.
        made: makes the tensors, by name, of what was read, of any dtype and of shapes that expand to theirs; ``None`` where the one source is
            kept byte for byte.
    """

    name: str
    sources: tuple[StoredTensor, ...]
    made: Callable[[list[torch.Tensor]], Tensors] | None = None

    @property
    def read_bytes(self) -> int:
        return sum(source.size_bytes for source in self.sources)


@dataclass
class Filling:
    """A part's memory while it is filled.

    Attributes:
        views: its tensors, by their names inside the part.
        readings: of files.
        unconverted: how much of what was read is still to be converted.
    """

    views: Mapping[str, torch.Tensor]
    readings: list[Reading] = field(default_factory=list)
    unconverted: int = 0

    @property
    def incomplete(self) -> bool:
        """Whether something of it is not there, and does not come by itself."""
        return bool(self.unconverted) or any(reading.incomplete for reading in self.readings)

    def is_read(self) -> bool:
        """Wait until nothing more is read for it, from whatever thread: whether all was."""
        return all([reading.ended() for reading in self.readings])  # of all of them, whatever one says


@dataclass(frozen=True)
class _Batch:
    """Steps whose sources are read together, the ones to be converted into memory of their own."""

    filling: Filling
    steps: Sequence[_Step]
    raws: Mapping[StoredTensor, torch.Tensor]
    reading: Reading

    @property
    def is_read(self) -> bool:
        return self.reading.is_over

    @property
    def raw_bytes(self) -> int:
        return sum(source.size_bytes for source in self.raws)

    def convert(self) -> None:
        """Make what is kept of it, once it is read."""
        self.reading.wait()
        made: Tensors = {}
        waiting_bytes = 0
        for step in self.steps:
            if step.made is not None:
                waiting_bytes += self._make(step, made)
                if waiting_bytes > WAITING_BYTES:
                    self._keep(made)
                    waiting_bytes = 0
        self._keep(made)
        self.filling.unconverted -= 1

    def _make(self, step: _Step, made: Tensors) -> int:
        """Add what a step makes: how many bytes. Nobody else is to know it, as it may be large."""
        assert step.made is not None
        more = step.made([self.raws[source] for source in step.sources])
        made.update(more)
        return sum(tensor.nbytes for tensor in more.values())

    def _keep(self, made: Tensors) -> None:
        """Copy these to where they are kept, converted if they are of another dtype, and forget them.

        With one call of torch's for all that are alike, as each call lets other threads in. Alike, because of a list some versions of torch
        take all for what its first is, and all one by one if any needs more than being copied.
        """
        alike: dict[tuple[torch.dtype, torch.dtype, bool], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for name, tensor in made.items():
            target = self.filling.views[name]
            if tensor.device != target.device:
                tensor = tensor.to(target.dtype)  # by the device that converts, not by the processor behind a wait
            source = tensor if tensor.shape == target.shape else tensor.expand(target.shape)
            targets, sources = alike.setdefault((target.dtype, source.dtype, source.stride() == target.stride()), ([], []))
            targets.append(target)
            sources.append(source)
        for targets, sources in alike.values():
            torch._foreach_copy_(targets, sources, non_blocking=True)
        made.clear()


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
        self._waiting: deque[_Batch] = deque()
        # Those of which one is much.
        self._large: deque[_Batch] = deque()

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
        later: bool = False,
    ) -> Filling:
        """Read parameters into the one piece of memory of their part. After an error nothing is read for any part any more.

        Args:
            part, names: the part, and which of its parameters.
            adapters: LoRAs to be added.
            layout, flat: where they go.
            convert_on: the device that converts; the work is queued there.
            only_added: read only what stands beside matrices whose own values stay.
            later: some of it may arrive after this returns, until :meth:`finish`.
        """
        filling = Filling(layout.views(flat))
        try:
            for steps in _batches(self._steps(part, names, adapters, convert_on, only_added=only_added)):
                self._begin(filling, steps, layout, flat, convert_on)
                _convert(self._waiting, WAITING_BYTES)
                _convert(self._large, None)
            if not later:
                self.finish()
        except BaseException:
            self.stop()
            raise
        return filling

    def finish(self) -> None:
        """Wait until all that is to be filled has arrived, or is in the order of its GPU's stream."""
        try:
            _convert(self._large, -1)
            _convert(self._waiting, -1)
            self.reader.finish()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Let go of all that has not arrived."""
        self._forget_waiting()
        self.reader.stop()

    def close(self) -> None:
        """Let go of what reading took, too, but for the buffers that are kept for more of it."""
        self._forget_waiting()
        self.reader.close()

    def _forget_waiting(self) -> None:
        self._waiting.clear()
        self._large.clear()

    def _begin(self, filling: Filling, steps: Sequence[_Step], layout: Layout, flat: torch.Tensor, convert_on: torch.device) -> None:
        """Have what is kept as it is read to its place, and the rest to memory of its own, from which it is to be converted."""
        sources = [source for step in steps if step.made for source in step.sources]
        is_large = sum(source.size_bytes for source in sources) > WAITING_BYTES
        if is_large:
            _convert(self._large, LARGE_BYTES)
        rooms = None
        with suppress(torch.OutOfMemoryError):
            rooms = _rooms_for(sources, convert_on)
        if rooms is None:  # what is converted leaves its own
            _convert(self._large, -1)
            rooms = _rooms_for(sources, convert_on)
        raws, to_convert = rooms
        as_stored = [(step.sources[0], _stretch(flat, layout.span(step.name))) for step in steps if step.made is None]
        if is_large:
            readings = [self.reader.begin(to_convert, urgent=True), self.reader.begin(as_stored)]
        else:
            # Read along with its neighbours in the file: small pieces of their own would take as long as large ones.
            readings = [self.reader.begin(to_convert + as_stored)]
        filling.readings += readings
        if any(step.made for step in steps):
            filling.unconverted += 1
            (self._large if is_large else self._waiting).append(_Batch(filling, steps, raws, readings[0]))

    def loose(self, part: str, names: Sequence[str], adapters: Adapters, convert_on: torch.device, *, only_added: bool = False) -> Tensors:
        """Parameters as tensors of the CPU, which are the mapped file where it has them as they are kept. Arguments as for :meth:`fill`."""
        steps = list(self._steps(part, names, adapters, convert_on, only_added=only_added))
        mapped = self.reader.all_mapped([step.sources[0] for step in steps if step.made is None])
        specs, _ = self.specs(part, names, adapters)
        found: Tensors = {}
        for step in steps:
            if step.made is None:
                found[step.name] = mapped[step.sources[0]]
            else:
                made = step.made([self.reader.mapped(source).to(convert_on) for source in step.sources])
                for name, tensor in made.items():
                    found[name] = tensor.to(specs[name].dtype).expand(specs[name].shape).to(CPU)
        return found

    def _steps(
        self, part: str, names: Sequence[str], adapters: Adapters, device: torch.device, *, only_added: bool = False
    ) -> Iterator[_Step]:
        for full in names:
            name, stored, form = inside(part, full), self._stored[full], self.form(full, adapters)
            if not only_added or full not in self.matrices or adapters.merged(full):
                yield from self._own_values(full, name, stored, form, adapters, device)
            if adapters.specs(full, stored.shape, self._precision.dtype):
                sources = tuple(adapters.low_rank_sources(full))
                yield _Step(name, sources, lambda raws, full=full, name=name: self._added(full, name, adapters, raws))

    def _own_values(
        self, full: str, name: str, stored: StoredTensor, form: Form, adapters: Adapters, device: torch.device
    ) -> Iterator[_Step]:
        scale = () if stored.scale is None else (stored.scale,)
        if not self._as_stored(full, form, adapters):
            added = tuple(adapters.merged_sources(full))
            yield _Step(name, (stored, *scale, *added), lambda raws: self._converted(full, name, form, adapters, raws))
            return
        yield _Step(name, (stored,))
        if form.scaled:
            yield _Step(name, scale, lambda raws: {scale_name(name): _kept_scales(stored, raws, device)})

    def _added(self, full: str, name: str, adapters: Adapters, raws: list[torch.Tensor]) -> Tensors:
        found = adapters.low_rank(full, self._precision.dtype, raws)
        return {_beside(name, other): tensor for other, tensor in found.items()}

    def _converted(self, full: str, name: str, form: Form, adapters: Adapters, raws: list[torch.Tensor]) -> Tensors:
        """A parameter as it is kept, of the file's values, their scale if it has one, and what LoRAs have for it; it may be of the file's
        dtype yet.
        """
        stored = self._stored[full]
        own = 1 if stored.scale is None else 2
        if adapters.merged(full):
            return {name: adapters.merge(full, _wide(stored, raws[:own], torch.float32), raws[own:]).to(form.dtype)}
        if form.scaled:
            # In the precision of computing, so that files in float32 and in bf16 give the same.
            values, scale = quantized_rows(_wide(stored, raws[:own], self._precision.dtype), form.dtype)
            return {name: values, scale_name(name): scale}
        if own == 1 and stored.gguf_type is None and raws[0].dtype.itemsize > 1:
            return {name: raws[0]}  # to be converted as it is copied
        return {name: _wide(stored, raws[:own], form.dtype)}

    def largest_elements(self, *, every: bool) -> int:
        """Values of the largest matrix that is made anew to be multiplied: of those in few bits, or of every one.

        Layers of one input are made as one.
        """
        names = self.matrices if every else self.low_precision
        found = [math.prod(self._stored[name].shape) * (3 if name.endswith("attn1.to_q.weight") else 1) for name in names]
        return max(found, default=0)


def _convert(waiting: deque[_Batch], most_bytes: int | None) -> None:
    """Those that have been read, and as many more as must not wait in memory: all that is more than so much, -1 all, ``None`` no other."""
    while waiting and (waiting[0].is_read or (most_bytes is not None and sum(batch.raw_bytes for batch in waiting) > most_bytes)):
        waiting.popleft().convert()


def _batches(steps: Iterable[_Step]) -> Iterator[list[_Step]]:
    """Steps that are read together: many, but not so much that what they are made of takes much memory beside them."""
    batch: list[_Step] = []
    beside = 0
    for step in steps:
        size = step.read_bytes if step.made is not None else 0
        if batch and beside + size > BATCH_BYTES:
            yield batch
            batch, beside = [], 0
        batch.append(step)
        beside += size
    if batch:
        yield batch


def _rooms_for(sources: Sequence[StoredTensor], device: torch.device) -> tuple[dict[StoredTensor, torch.Tensor], list[ToRead]]:
    """Memory on a device for what a file has, all in one piece: as tensors, and as what is to be read."""
    by_name = {str(number): source for number, source in enumerate(dict.fromkeys(sources))}
    if not by_name:
        return {}, []
    layout = _layout_of(tuple(Spec(raw_shape(source), stored_dtype(source)) for source in by_name.values()))
    memory = torch.empty(layout.total_bytes, dtype=torch.uint8, device=device)
    views = layout.views(memory)
    return (
        {by_name[name]: view for name, view in views.items()},
        [(source, _stretch(memory, layout.span(name))) for name, source in by_name.items()],
    )


@lru_cache(maxsize=32)
def _layout_of(specs: tuple[Spec, ...]) -> Layout:
    """Of tensors that are named by their numbers; most blocks have the same."""
    return Layout({str(number): spec for number, spec in enumerate(specs)})


def _stretch(memory: torch.Tensor, span: slice) -> Stretch:
    return Stretch(memory, span.start, span.stop - span.start)


def _kept_scales(stored: StoredTensor, scale: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """As :func:`_row_scales`, but a file's one scale for all rows, in float32 as most are, as it is: the copy to where it is kept repeats it."""
    return scale[0] if scale and scale[0].numel() == 1 and scale[0].dtype == torch.float32 else _row_scales(stored, scale, device)


def _row_scales(stored: StoredTensor, scale: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Float32 [out, 1]; a file's one scale for all rows is repeated, and none is 1."""
    rows = stored.shape[0]
    if not scale:
        return torch.ones(rows, 1, device=device)
    return scale[0].float().reshape(-1, 1).expand(rows, 1)


def _wide(stored: StoredTensor, raws: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The values that a tensor of the file stands for, of what it has and of its scale."""
    raw, scale = raws[0], raws[1:]
    if stored.gguf_type is not None:
        return widened_gguf(raw, stored.gguf_type, dtype).view(stored.shape)
    if not scale:
        return raw.to(dtype)
    # A scale may stand beside what is wide already, too.
    rows, scales = raw.reshape(raw.shape[0], -1), _row_scales(stored, scale, raw.device)
    wide = widened_rows(rows, scales, dtype) if rows.dtype.itemsize == 1 else (rows.float() * scales).to(dtype)
    return wide.view(stored.shape)
