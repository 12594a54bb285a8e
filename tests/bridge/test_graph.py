"""Finding the loader behind a sampler in prompts as ComfyUI holds them."""

from typing import Any

import pytest

graph = pytest.importorskip("comfy_execution.graph", reason="put a ComfyUI folder on PYTHONPATH to run this")

from wan_sharded.bridge.graph import loader_behind  # noqa: E402


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


LOADER = node("WanShardedLoader", model="wan", gpu0_gb=15)


def behind(nodes: dict[str, Any], made_by: str | None, sampler: str = "9") -> str | None:
    return loader_behind(graph.DynamicPrompt(nodes), sampler, made_by)


def test_the_loader_itself_and_behind_loras() -> None:
    sampler = node("WanShardedI2VSampler", model=["3", 0], image=["7", 0])
    loras = {"3": node("WanShardedLora", model=["2", 0]), "2": node("WanShardedLora", model=["1", 0])}
    assert behind({"1": LOADER, **loras, "9": sampler}, made_by="1") == "1"
    assert behind({"5:1": LOADER, "3": node("WanShardedLora", model=["5:1", 0]), "9": sampler}, made_by="77") == "5:1"
    assert behind({"1": LOADER, "3": node("SomebodysSwitch", anything=["1", 0], size=[1, 2]), "9": sampler}, made_by="77") == "1"


def test_another_models_loader_is_not_meant() -> None:
    """The image may come from a sampler with a loader of its own."""
    nodes = {
        "1": LOADER, "2": LOADER,
        "8": node("WanShardedI2VSampler", model=["2", 0]), "9": node("WanShardedI2VSampler", model=["1", 0], image=["8", 0]),
    }  # fmt: skip
    assert behind(nodes, made_by="2") == "1"
    assert behind(nodes, made_by="1", sampler="8") == "2"


def test_of_several_only_the_one_that_ran_is_known() -> None:
    switch = {"3": node("SomebodysSwitch", first=["1", 0], second=["2", 0]), "9": node("WanShardedI2VSampler", model=["3", 0])}
    assert behind({"1": LOADER, "2": LOADER, **switch}, made_by="2") == "2"
    assert behind({"1": LOADER, "2": LOADER, **switch}, made_by="77") == "77"


def test_nodes_made_while_running_are_found() -> None:
    prompt = graph.DynamicPrompt({"4": node("SomebodysLoop")})
    prompt.add_ephemeral_node("4.0.1", LOADER, "4", "4")
    prompt.add_ephemeral_node("4.0.9", node("WanShardedI2VSampler", model=["4.0.1", 0]), "4", "4")
    assert loader_behind(prompt, "4.0.9", "77") == "4.0.1"


@pytest.mark.parametrize("nodes", [{}, {"9": node("WanShardedI2VSampler")}, {"9": node("WanShardedI2VSampler", model=["404", 0])}])
def test_a_prompt_that_does_not_tell(nodes: dict[str, Any]) -> None:
    assert behind(nodes, made_by="1") == "1"
    assert behind(nodes, made_by=None) is None


def test_nothing_to_ask() -> None:
    assert loader_behind(None, "9", "1") == "1"
    assert loader_behind(graph.DynamicPrompt({}), None, "1") == "1"


def test_links_in_a_circle_end() -> None:
    nodes = {"3": node("A", x=["4", 0]), "4": node("A", x=["3", 0]), "9": node("WanShardedI2VSampler", model=["3", 0])}
    assert behind(nodes, made_by="1") == "1"
