"""Print what ComfyUI would serve of this pack at ``/object_info``, as JSON, without starting a server.

    python tests/support/served_nodes.py COMFYUI_FOLDER PACK_FOLDER BASE_FOLDER

Run in a process of its own: ComfyUI's top-level modules (``nodes``, ``server``, ``utils``) have names that others use too.
``BASE_FOLDER`` takes the place of ComfyUI's own models, input and output folders; an empty one gives combos without any model.
"""

import asyncio
import importlib
import importlib.util
import json
import sys


async def served(pack_init: str) -> dict[str, dict]:
    """Node id -> its entry, in the order in which the pack lists its nodes."""
    spec = importlib.util.spec_from_file_location("pack_as_comfyui_loads_it", pack_init)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    extension = await module.comfy_entrypoint()
    return {node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in await extension.get_node_list()}


def main() -> None:
    comfyui, pack, base = sys.argv[1:]
    sys.path[0] = comfyui  # as if main.py there were running
    sys.argv = ["main.py", "--cpu", "--base-directory", base]
    importlib.import_module("comfy.options").enable_args_parsing()  # before anything reads the arguments
    importlib.import_module("utils.extra_config")  # before `utils` is taken for comfy/utils.py, as in main.py
    print(json.dumps(asyncio.run(served(f"{pack}/__init__.py"))))


if __name__ == "__main__":
    main()
