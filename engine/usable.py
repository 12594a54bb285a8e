"""What this torch can do with the GPUs that are there: kernels, half precision, copies between them. Answers that don't change while it runs."""

import re
from collections.abc import Iterable
from functools import lru_cache

import torch

# What is sent to see whether it arrives.
PATTERN_NUMBERS = 4 * 1024**2
BF16_CAPABILITY = (8, 0)


def has_kernels(capability: tuple[int, int], built_for: Iterable[str]) -> bool:
    """Whether a torch build has kernels for a GPU: for its generation, or in a form that the driver translates.

    Args:
        capability: of the GPU, such as (8, 6).
        built_for: ``torch.cuda.get_arch_list()``; nothing, or none of CUDA's names, counts as all.
    """
    known = [(kind, int(digits[:-1]), int(digits[-1])) for kind, digits in re.findall(r"\b(sm|compute)_(\d{2,3})", " ".join(built_for))]
    binary = any(kind == "sm" and major == capability[0] and minor <= capability[1] for kind, major, minor in known)
    return not known or binary or any(kind == "compute" and (major, minor) <= capability for kind, major, minor in known)


def other_accelerator_warning() -> tuple[str, ...]:
    """Says so where there is a GPU that this pack does not compute on, and none that it does."""
    if torch.cuda.is_available():
        return ()
    mps = getattr(torch.backends, "mps", None)
    if mps is not None and mps.is_available():
        kind = "an Apple GPU"
    elif hasattr(torch, "xpu") and torch.xpu.is_available():
        kind = "an Intel GPU"
    else:
        return ()
    return (f"This computer has {kind}, but this pack computes on NVIDIA GPUs only: the CPU would compute all, which takes hours to days.",)


def copies_arrive(source: torch.device, target: torch.device) -> bool:
    """Whether what is copied from one GPU's memory straight to another's is the same there.

    Drivers promise that more often than it is so: with an IOMMU, PCIe access control or a virtual machine in between, other bytes arrive,
    without an error.
    """
    try:
        return _copies_arrive(source, target)
    except RuntimeError:  # no memory for it now; asked again the next time
        return True


@lru_cache(maxsize=64)
def _copies_arrive(source: torch.device, target: torch.device) -> bool:
    with torch.inference_mode():
        pattern = torch.arange(1, PATTERN_NUMBERS + 1, dtype=torch.int32)
        there = pattern.to(source).to(target)
        return torch.equal(there.cpu(), pattern)
