"""The errors a user can meet. Every message says what is wrong, with the value, and what to do.

Raised anywhere in the engine, shown unchanged on the node (or by Python). None of them leaves anything half loaded.
"""

import re

# People put what they are told into bug reports.
_PATHS = re.compile(r"(?:[A-Za-z]:)?[\\/][\w.~-]+[\\/][^\s'\",:;)]*")


class WanShardedError(Exception):
    """Base of the pack's errors."""


class InvalidRequestError(WanShardedError, ValueError):
    """An input is outside what Wan can take (size, frame count, empty image, NaN pixels, unknown choice)."""


class CheckpointError(WanShardedError):
    """A model is missing, incomplete, damaged, or not a Wan model."""


class PlacementError(WanShardedError):
    """The weights and buffers do not fit within the given memory limits."""


class UnsupportedError(WanShardedError):
    """A choice that exists in the contract but cannot be honoured here (this version, this device, this package)."""


class ComputationError(WanShardedError):
    """The model gave values that are no numbers; going on would give a black video."""


class ExportError(WanShardedError):
    """A video could not be written (format, encoder, folder, disk)."""


class BusyError(WanShardedError):
    """Something else is being computed that this must not disturb."""


class Cancelled(WanShardedError):
    """The user stopped the run. Raised by callbacks in the engine's own use; ComfyUI raises its own."""


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says in its first line, without paths; empty where it says nothing."""
    words = str(error).strip()
    return _PATHS.sub("...", words.splitlines()[0]) if words else ""
