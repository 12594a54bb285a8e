"""Defaults for CUDA that only count before torch is loaded. Must not import torch; what the user has set stays.

Inside ComfyUI torch is there first, and both are ComfyUI's business.
"""

import os
import sys


def prepare() -> None:
    """GPUs in PCI bus order, as nvidia-smi counts them; and CUDA's own memory pool, as ComfyUI uses it.

    torch's default allocator keeps freed memory in pieces of the size they once had: two gigabytes of an 11 GB limit at
    480x832x81, measured. Its segments that grow would do too, but are refused in some virtual machines ("operation not
    permitted", seen).
    """
    if "torch" in sys.modules:
        return
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
