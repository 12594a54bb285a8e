"""What the loader says on the machine that README.md has in mind: an RTX 5060 Ti 16 GB and an RTX 3060 12 GB.

    python tests/support/example_report.py [weight_dtype]

The real shape of the published checkpoint, without its weights, planned by the same code as on a real machine.
"""

import sys
from pathlib import Path
from types import ModuleType

if "wan_sharded" not in sys.modules:
    pack = ModuleType("wan_sharded")
    pack.__path__ = [str(Path(__file__).resolve().parents[2])]
    sys.modules["wan_sharded"] = pack

from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from stored_like import described
from wan_sharded.engine.checkpoints.stored import HIGH_NOISE, LOW_NOISE, ModelFiles
from wan_sharded.engine.handle import ModelHandle
from wan_sharded.engine.owner import ModelOwner
from wan_sharded.engine.planning.devices import GIB, DeviceInfo, Machine
from wan_sharded.engine.planning.footprint import FRAGMENTATION_ASYNC, VideoShape
from wan_sharded.engine.plans import Plan
from wan_sharded.engine.reports import plan_report

# Memory as the driver reports it, with a desktop on the first card; 64 GB of system memory with the usual programs open.
GPUS = (
    DeviceInfo(0, "RTX 5060 Ti", "lazy:0", int(15.93 * GIB), int(15.0 * GIB)),
    DeviceInfo(1, "RTX 3060", "lazy:1", int(12.0 * GIB), int(11.5 * GIB)),
)
HOST_AVAILABLE_BYTES = 56 * GIB
HOST_TOTAL_BYTES = 64 * GIB
SLIDERS_GIB = {0: 15, 1: 11}


def published_checkpoint() -> ModelFiles:
    """Wan-AI/Wan2.2-I2V-A14B-Diffusers as its headers describe it: two experts of 14.3 billion float32 parameters."""
    experts = {}
    for part in (HIGH_NOISE, LOW_NOISE):
        with init_empty_weights():
            model = WanTransformer3DModel(in_channels=36, out_channels=16, text_dim=4096, num_layers=40)
        experts[part] = described(model, "F32")
    return ModelFiles("published", experts, None, None, None, fingerprint="")


def example_report(weight_dtype: str = "default") -> str:
    """The placement for 832x480, 81 frames in words."""
    return plan_report(example_plan(weight_dtype))


def example_plan(weight_dtype: str = "default") -> Plan:
    """The plan inside a ComfyUI with its usual allocator."""
    machine = Machine(GPUS, HOST_AVAILABLE_BYTES, fragmentation=FRAGMENTATION_ASYNC, host_total_bytes=HOST_TOTAL_BYTES)
    handle = ModelHandle(published_checkpoint(), weight_dtype, max_memory_gib=SLIDERS_GIB)
    return ModelOwner().dry_plan(handle, machine, VideoShape(832, 480, 81))


if __name__ == "__main__":
    print(example_report(*sys.argv[1:]))
