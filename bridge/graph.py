"""Which node of the running prompt is meant, where ComfyUI's cache has hidden it."""

from collections.abc import Mapping
from typing import Any, Protocol

LOADER = "WanShardedLoader"


class Prompt(Protocol):
    """What is used of comfy_execution.graph.DynamicPrompt."""

    def has_node(self, node_id: str, /) -> bool: ...
    def get_node(self, node_id: str, /) -> Mapping[str, Any]: ...


def loader_behind(prompt: Prompt | None, sampler_id: str | None, made_by: str | None) -> str | None:
    """The id of the loader node whose model a sampler gets.

    A loader that was not run, since ComfyUI remembers the result of an equal one, hands on the handle that the other made, with the other's
    id, which may be a node of another workflow. So the prompt is asked.

    Args:
        prompt: the running one.
        made_by: the loader that made the handle.
    """
    if prompt is None or sampler_id is None or not prompt.has_node(sampler_id):
        return made_by
    loaders: set[str] = set()
    seen = {sampler_id}
    ahead = _linked({"model": prompt.get_node(sampler_id)["inputs"].get("model")})
    while ahead:
        node_id = ahead.pop()
        if node_id in seen or not prompt.has_node(node_id):
            continue
        seen.add(node_id)
        node = prompt.get_node(node_id)
        if node["class_type"] == LOADER:
            loaders.add(node_id)
        else:
            ahead += _linked(node["inputs"])
    # Of several, one of which a node in between chooses, only the one that ran just now can be told.
    return made_by if made_by in loaders or len(loaders) != 1 else loaders.pop()


def _linked(inputs: Mapping[str, Any]) -> list[str]:
    """The nodes that a node's inputs come from; ComfyUI writes a link as [node id, output]."""
    return [value[0] for value in inputs.values() if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)]
