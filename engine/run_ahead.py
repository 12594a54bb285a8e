"""How far the host queues blocks ahead of the devices that compute them."""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

# So many blocks may be queued on the devices behind the one that computes, where blocks are short: enough to keep them busy. Where they are
# long fewer are, so that a cancel is heard, and all that is queued done, within so many seconds; queueing takes some milliseconds.
RUN_AHEAD_BLOCKS = 2
QUEUED_SECONDS = 1.5


class RunAhead:
    """Keeps it as far as the latest block's time allows. As long as none is known, one block is queued at a time: it may take long."""

    def __init__(self) -> None:
        self._queued: deque[Sequence[Any]] = deque()
        # Of those, which are of forwards before.
        self._before = 0
        self._latest_end: float | None = None
        self._block_seconds: float | None = None

    def begin(self) -> None:
        """A forward begins. What the one before queued may still be computing, and counts; what comes in between is no block's time."""
        self._before = len(self._queued)
        self._latest_end = None if self._before else time.perf_counter()

    def queued(self, events: Sequence[Any]) -> None:
        """All work of a block is queued, up to these events; ``None`` where it is done already."""
        self._queued.append(events)

    def wait(self) -> None:
        """Until another block may be queued."""
        while len(self._queued) > self._allowed:
            for event in self._queued.popleft():
                if event is not None:
                    event.synchronize()
            ended = time.perf_counter()
            if self._before:
                self._before -= 1
            elif self._latest_end is not None:
                self._block_seconds = ended - self._latest_end
            self._latest_end = ended

    @property
    def _allowed(self) -> int:
        """How many blocks may be queued when another one is to be."""
        if self._block_seconds is None:
            return 0
        if self._block_seconds * (RUN_AHEAD_BLOCKS + 1) <= QUEUED_SECONDS:
            return RUN_AHEAD_BLOCKS
        return max(0, int(QUEUED_SECONDS / self._block_seconds) - 1)
