"""A default for CUDA that only counts before torch is loaded. Must not import torch; what the user has set stays."""

import os
import sys


def prepare() -> None:
    """Count GPUs in PCI bus order, as nvidia-smi does. Inside ComfyUI torch is there first; engine/probe.py sorts then."""
    if "torch" not in sys.modules:
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
