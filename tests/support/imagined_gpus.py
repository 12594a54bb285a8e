"""GPUs that are not there: tensors say they are on one, their numbers are in host memory.

With :class:`ImaginedGpus` entered, ``tensor.to("lazy:0")`` gives a tensor on the first imagined GPU. As on real ones, an
operation on tensors of two devices raises, nothing on a GPU turns into a numpy array, and every byte that lives on a device is counted,
with the peak. So the code that moves weights and activations about is tested without a GPU, by the same rules.

"lazy" is a device type that torch knows by name and does nothing for unless asked; no CUDA function is called for it.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE_TYPE = "lazy"
CPU = torch.device("cpu")

# What copies between devices, so that its operands may be on two.
_CROSSING = ("aten::to", "aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::type_as")
# Real GPUs take an index or a fill value from the host too.
_HOST_OPERANDS = ("aten::index", "aten::index_put", "aten::index_put_", "aten::fill_", "aten::is_same_size")


class ImaginedTensor(torch.Tensor):
    """A tensor on an imagined GPU; ``inner`` holds its numbers on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> "ImaginedTensor":
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=device
        )

    def __init__(self, inner: torch.Tensor, device: torch.device):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        gpus = ImaginedGpus.current
        if gpus is None:
            raise RuntimeError(f"{func} on a tensor of an imagined GPU after the GPUs are gone")
        return gpus.run(func, args, kwargs or {})


class ImaginedGpus(TorchDispatchMode):
    """Context in which imagined GPUs exist.

    Attributes:
        peak: device index -> the most bytes that lived there since :meth:`reset_peaks`.
        capacity: device index -> bytes; more raises ``torch.OutOfMemoryError``. No entry, no limit.
        raises: makes another error of the words.
    """

    current: "ImaginedGpus | None" = None

    def __init__(self, capacity: dict[int, int] | None = None):
        super().__init__()
        self.capacity = capacity or {}
        self.raises: Callable[[str], Exception] = torch.OutOfMemoryError
        self.peak: dict[int, int] = {}
        self._live: dict[int, int] = {}
        self._users: dict[tuple[int, int], int] = {}

    def __enter__(self) -> "ImaginedGpus":
        ImaginedGpus.current = self
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(numbers, device=...) makes a host tensor and moves it
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)
        ImaginedGpus.current = None

    def live_bytes(self, index: int) -> int:
        """Bytes that tensors hold on a device now; what shares a storage counts once."""
        return self._live.get(index, 0)

    def reset_peaks(self) -> None:
        self.peak = dict(self._live)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind not in (ImaginedTensor, torch.Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # quantized tensors take themselves apart; what is inside comes here again
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Do an operation on the numbers, and put its results where a real one would."""
        if func._schema.name == "aten::_has_compatible_shallow_copy_type":
            return False  # so that nn.Module.to makes new parameters instead of exchanging what is inside of the old ones
        flat, spec = pytree.tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, torch.Tensor)]
        asked = next((value for value in flat if isinstance(value, torch.device)), None)
        target = self._target(func, tensors, asked)
        originals = {id(t.inner): t for t in tensors if isinstance(t, ImaginedTensor)}
        plain = [
            t.inner if isinstance(t, ImaginedTensor) else CPU if isinstance(t, torch.device) and t.type == DEVICE_TYPE else t for t in flat
        ]
        with torch._C._DisableTorchDispatch():
            args, kwargs = pytree.tree_unflatten(plain, spec)
            result = func(*args, **kwargs)
        moved = target != CPU and any(not isinstance(t, ImaginedTensor) or t.device != target for t in tensors)

        def place(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in originals and originals[id(value)].device == target:
                return originals[id(value)]  # an operation in place, or one that had nothing to do
            if target == CPU:
                return value.clone() if id(value) in originals else value
            # A copy from another device has a storage of its own, also where the numbers did not need to move.
            shared = moved and any(
                value.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in plain if isinstance(t, torch.Tensor)
            )
            return self._wrap(value.clone() if shared else value, target)

        return pytree.tree_map(place, result)

    def _target(self, func: Any, tensors: list[torch.Tensor], asked: torch.device | None) -> torch.device:
        name = func._schema.name
        homes = {t.device for t in tensors if isinstance(t, ImaginedTensor)}
        on_host = any(not isinstance(t, ImaginedTensor) and t.ndim > 0 for t in tensors)
        if name in ("aten::copy_", "aten::_foreach_copy_", "aten::type_as"):
            return tensors[0].device
        if name == "aten::to" and asked is None and len(tensors) == 2:
            return tensors[1].device
        crossing = name in _CROSSING
        if not crossing and (len(homes) > 1 or (homes and on_host and name not in _HOST_OPERANDS)):
            shapes = ", ".join(f"{list(t.shape)} on {t.device}" for t in tensors)
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but got {shapes}")
        home = next(iter(homes), CPU) if asked is None else asked
        return home if home.type == DEVICE_TYPE else CPU

    def _wrap(self, inner: torch.Tensor, device: torch.device) -> ImaginedTensor:
        storage = inner.untyped_storage()
        key = (device.index or 0, storage.data_ptr())
        if self._users.get(key, 0) == 0:
            self._count(key[0], storage.nbytes())
        self._users[key] = self._users.get(key, 0) + 1
        wrapped = ImaginedTensor(inner, device)
        weakref.finalize(wrapped, self._forget, key, storage.nbytes())
        return wrapped

    def _forget(self, key: tuple[int, int], nbytes: int) -> None:
        self._users[key] -= 1
        if self._users[key] == 0:
            del self._users[key]
            self._count(key[0], -nbytes)

    def _count(self, index: int, nbytes: int) -> None:
        live = self._live.get(index, 0) + nbytes
        if nbytes > 0 and live > self.capacity.get(index, live):
            raise self.raises(f"imagined GPU {index} has {self.capacity[index]} bytes, {live} were asked for")
        self._live[index] = live
        self.peak[index] = max(self.peak.get(index, 0), live)
