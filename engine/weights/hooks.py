"""What happens around each part of a dispatched expert: inputs to its device, host weights fetched, a look at the clock.

On accelerate's hooks. accelerate's own offloading allocates leaf by leaf; ``FetchHook`` copies a whole block into room that is made once.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import find_device, send_to_device
from torch import nn

from .. import probe
from ..run_ahead import RunAhead
from .packing import ALIGNMENT_BYTES

CheckCancelled = Callable[[], None]


class FetchBuffer:
    """Room on one device for the weights of one block, shared by all blocks that are fetched there.

    Made once, for the largest, so that fetching allocates nothing: freed and new weights among the activations would fragment the
    allocator, by more than a gigabyte where measured. Copies run on the stream that computes, so a block's weights are
    never overwritten while they are used.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._room = torch.empty(0, dtype=torch.uint8)

    def fill(self, hosts: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Device copies of a block's host parameters, one behind the other in the room."""
        ends = list(accumulate(-(-host.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for host in hosts))
        if ends and self._room.numel() < ends[-1]:
            self.clear()
            self._room = torch.empty(ends[-1], dtype=torch.uint8, device=self.device)
        filled: list[nn.Parameter] = []
        for host, begin in zip(hosts, [0, *ends], strict=False):
            there = self._room[begin : begin + host.nbytes].view(host.dtype).view(host.shape)
            there.copy_(host.data)
            filled.append(nn.Parameter(there, requires_grad=False))
        return filled

    def clear(self) -> None:
        """Give the room back."""
        self._room = torch.empty(0, dtype=torch.uint8)


class SendHook(ModelHook):
    """Sends a module's inputs to the device that computes it.

    As accelerate's ``AlignDevicesHook``, which besides moves the module's own parameters when it is attached; ours wait
    on the host.
    """

    no_grad = True

    def __init__(self, device: torch.device, *, return_to_input: bool = False):
        self.device = device
        self._return_to_input = return_to_input
        self._input_device = device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._return_to_input:
            self._input_device = find_device([args, kwargs]) or self.device
        return send_to_device(args, self.device), send_to_device(kwargs, self.device)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return send_to_device(output, self._input_device) if self._return_to_input else output


class FetchHook(ModelHook):
    """Brings a module's weights from host memory to the device that computes it, and lets them go afterwards.

    The host tensors stay where they are, so nothing is copied back. If the forward raises, :meth:`release` must be
    called by whoever called the model: accelerate does not run ``post_forward`` then.
    """

    no_grad = True

    def __init__(self, buffer: FetchBuffer, *, keep_room: bool):
        self._buffer = buffer
        self._keep_room = keep_room
        self._host: list[tuple[nn.Module, str, nn.Parameter]] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for owner in module.modules():
            self._host += [(owner, name, parameter) for name, parameter in owner._parameters.items() if parameter is not None]
        there = self._buffer.fill([parameter for _, _, parameter in self._host])
        for (owner, name, _), parameter in zip(self._host, there, strict=True):
            owner._parameters[name] = parameter
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.release()
        return output

    def release(self) -> None:
        """Put the host tensors back."""
        for owner, name, parameter in self._host:
            owner._parameters[name] = parameter
        self._host.clear()
        if not self._keep_room:
            self._buffer.clear()

    def clear_room(self) -> None:
        """Give the buffer's room back, between forwards."""
        self._buffer.clear()


class PaceHook(ModelHook):
    """Between blocks: lets a cancel through, keeps the host from queueing a whole forward ahead of the GPU, and the allocator
    from keeping more than its limit."""

    def __init__(
        self, device: torch.device, check_cancelled: CheckCancelled, ceilings: Mapping[torch.device, int], ahead: RunAhead, *, first: bool
    ):
        self.device = device
        self.check_cancelled = check_cancelled
        self.ceilings = ceilings
        self.ahead = ahead
        self.first = first

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.first:
            self.ahead.begin()
        self.ahead.wait()
        self.check_cancelled()
        probe.trim(str(self.device), self.ceilings[self.device])
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            self.ahead.queued([event])
        return output


def attach(
    model: nn.Module,
    execution_devices: dict[str, torch.device],
    offloaded: frozenset[str],
    main_device: torch.device,
    check_cancelled: CheckCancelled,
    ceilings: Mapping[torch.device, int],
) -> list[FetchHook]:
    """Dispatch a model whose parts are already at their homes.

    Args:
        model: the transformer.
        execution_devices: module name -> the device that computes it.
        offloaded: the names among them whose weights stay on the host.
        main_device: where the model's inputs go first.
        check_cancelled: raises when the run should stop; asked before every block.
        ceilings: the most the allocator should hold on each device; read anew before every block.

    Returns:
        The fetch hooks, to be released should a forward raise.
    """
    fetches: list[FetchHook] = []
    buffers = {device: FetchBuffer(device) for device in set(execution_devices.values())}
    ahead = RunAhead()
    add_hook_to_module(model, SendHook(main_device, return_to_input=True))
    for name, device in execution_devices.items():
        module = model.get_submodule(name)
        if not any(True for _ in module.parameters()) and not any(True for _ in module.buffers()):
            continue  # a norm without weights computes where its input is
        add_hook_to_module(module, SendHook(device), append=True)
        if name.startswith("blocks."):
            add_hook_to_module(module, PaceHook(device, check_cancelled, ceilings, ahead, first=name == "blocks.0"), append=True)
        if name in offloaded:
            is_block = name.startswith("blocks.")
            fetch = FetchHook(buffers[device] if is_block else FetchBuffer(device), keep_room=is_block)
            fetches.append(fetch)
            add_hook_to_module(module, fetch, append=True)
    return fetches
