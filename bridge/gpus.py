"""GPU names for the loader's sliders."""

from ..engine import probe
from ..engine.planning.devices import GIB


def is_present(index: int) -> bool:
    """Whether the machine has a GPU of this visible index, in PCI bus order."""
    return index < len(probe.visible_gpus())


def slider_label(index: int) -> str:
    """``GPU 0 · RTX 5060 Ti 16 GB``, or ``GPU 5`` for one that isn't here."""
    if not is_present(index):
        return f"GPU {index}"
    gpu = probe.visible_gpus()[index]
    return f"GPU {index} · {gpu.name} {round(gpu.total_bytes / GIB)} GB"
