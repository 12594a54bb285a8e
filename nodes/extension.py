"""The list of nodes ComfyUI gets. Called by the pack's ``comfy_entrypoint`` only."""

from comfy_api.latest import ComfyExtension, io

from .export import WanShardedVideoExport
from .loader import WanShardedLoader
from .lora import WanShardedLora
from .sampler import WanShardedI2VSampler


class WanShardedExtension(ComfyExtension):
    """Registers the nodes; older servers do not call ``on_load``, so set-up happens on import of the bridge."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [WanShardedLoader, WanShardedLora, WanShardedI2VSampler, WanShardedVideoExport]
