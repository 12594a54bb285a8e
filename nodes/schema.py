"""What the schemas share: the socket type, the category, and arguments older servers do not know."""

import dataclasses
from typing import Any

from comfy_api.latest import io

WanShardedModel = io.Custom("WAN_SHARDED_MODEL")
CATEGORY = "Wan Sharded"


def schema(**arguments: Any) -> io.Schema:
    """``io.Schema`` from the arguments this server's version knows (0.3.75 has no ``search_aliases``)."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(**{name: value for name, value in arguments.items() if name in known})


def hidden(widget: io.WidgetInput) -> io.WidgetInput:
    """Hide a widget in the frontend while keeping its place in saved files (``extra_dict=`` is newer than 0.3.75)."""
    widget.extra_dict = {**(widget.extra_dict or {}), "hidden": True}
    return widget
