"""What a node shows while and after it runs, text and the picture of the placement, sent over ComfyUI's websocket to the page that queued the prompt."""

from typing import Any

from server import PromptServer

from ..engine.planning.bars import Bar, as_json

STATUS_EVENT = "wan_sharded.status"
PLACEMENT_EVENT = "wan_sharded.placement"


def show_on_node(node_id: str | None, text: str) -> None:
    """Show text in a node's text area; without a page or a node it goes nowhere."""
    _send(STATUS_EVENT, node_id, {"text": text})


def show_placement(node_id: str | None, bars: tuple[Bar, ...]) -> None:
    """Show a placement in a loader node's picture; likewise."""
    _send(PLACEMENT_EVENT, node_id, {"bars": as_json(bars)})


def _send(event: str, node_id: str | None, content: dict[str, Any]) -> None:
    server = getattr(PromptServer, "instance", None)
    if node_id is not None and server is not None:
        server.send_sync(event, {"node": str(node_id), **content}, server.client_id)
