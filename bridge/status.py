"""Text on a node while and after it runs, sent over ComfyUI's websocket to the page that queued the prompt."""

import logging

from server import PromptServer

logger = logging.getLogger(__name__)
STATUS_EVENT = "wan_sharded.status"


def show_on_node(node_id: str | None, text: str) -> None:
    """Show text in a node's text area; without a page or a node it goes nowhere."""
    server = getattr(PromptServer, "instance", None)
    if node_id is not None and server is not None:
        server.send_sync(STATUS_EVENT, {"node": str(node_id), "text": text}, server.client_id)
