"""What happens around each part of a dispatched expert: inputs to its device, host weights fetched, a look at the clock.

accelerate's own ``AlignDevicesHook`` moves inputs. Its offloading rebuilds each parameter from its class, which torchao's
tensors don't survive, and goes leaf by leaf; ``FetchHook`` swaps whole parameters of a whole block instead.
"""

from collections import deque
from collections.abc import Callable

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from torch import nn

CheckCancelled = Callable[[], None]
# So many blocks may be queued on a GPU before the host waits: enough to keep it busy, few enough to stop within a moment.
RUN_AHEAD_BLOCKS = 2


class FetchHook(ModelHook):
    """Brings a module's weights from host memory to the device that computes it, and lets them go afterwards.

    The host tensors stay where they are, so nothing is copied back. If the forward raises, :meth:`release` must be
    called by whoever called the model: accelerate does not run ``post_forward`` then.
    """

    no_grad = True

    def __init__(self, device: torch.device):
        self.device = device
        self._host: list[tuple[nn.Module, str, nn.Parameter]] = []

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    self._host.append((owner, name, parameter))
        for owner, name, parameter in self._host:
            owner._parameters[name] = nn.Parameter(parameter.to(self.device, non_blocking=True), requires_grad=False)
        return args, kwargs

    def post_forward(self, module: nn.Module, output):
        self.release()
        return output

    def release(self) -> None:
        """Put the host tensors back."""
        for owner, name, parameter in self._host:
            owner._parameters[name] = parameter
        self._host.clear()


class PaceHook(ModelHook):
    """Lets a cancel through between blocks, and keeps the host from queueing a whole forward ahead of the GPU."""

    def __init__(self, device: torch.device, check_cancelled: CheckCancelled, queued: "deque[torch.cuda.Event]"):
        self.device = device
        self.check_cancelled = check_cancelled
        self.queued = queued

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        self.check_cancelled()
        while len(self.queued) > RUN_AHEAD_BLOCKS:
            self.queued.popleft().synchronize()
        return args, kwargs

    def post_forward(self, module: nn.Module, output):
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            self.queued.append(event)
        return output


def attach(
    model: nn.Module,
    execution_devices: dict[str, torch.device],
    offloaded: frozenset[str],
    main_device: torch.device,
    check_cancelled: CheckCancelled,
) -> list[FetchHook]:
    """Dispatch a model whose parts are already at their homes.

    Args:
        model: the transformer.
        execution_devices: module name -> the device that computes it.
        offloaded: the names among them whose weights stay on the host.
        main_device: where the model's inputs go first.
        check_cancelled: raises when the run should stop; asked before every block.

    Returns:
        The fetch hooks, to be released should a forward raise.
    """
    fetches: list[FetchHook] = []
    queued: deque[torch.cuda.Event] = deque()
    add_hook_to_module(model, AlignDevicesHook(execution_device=main_device, io_same_device=True))
    for name, device in execution_devices.items():
        module = model.get_submodule(name)
        if not any(True for _ in module.parameters()) and not any(True for _ in module.buffers()):
            continue  # a norm without weights computes where its input is
        add_hook_to_module(module, AlignDevicesHook(execution_device=device), append=True)
        if name.startswith("blocks."):
            add_hook_to_module(module, PaceHook(device, check_cancelled, queued), append=True)
        if name in offloaded:
            fetch = FetchHook(device)
            fetches.append(fetch)
            add_hook_to_module(module, fetch, append=True)
    return fetches
