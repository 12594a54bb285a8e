"""From one expert to the next behind the last forward of the first: as soon as all workers are done with a block, the other expert's takes
its place.

Only blocks that change nothing else move so: of the same size, for the same home, and held ready in system memory or in the file as they are
kept. Whatever is left moves when the next expert is activated, as it would without this.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from . import probe
from .parallel.workers import Mark, Stream, new_stream
from .planning.placement import HOST, Placement
from .weights.expert import CPU, NOWHERE, Expert

logger = logging.getLogger(__name__)


def can_hand_over(old: Expert, new: Expert, part: str, homes: tuple[Placement, Placement], device: torch.device) -> bool:
    """Whether a block of ``new`` can take the place of the same one of ``old``.

    Args:
        old, new: the experts.
        part: the block's name.
        homes: the experts' placements, in that order.
        device: where the block of ``old`` is.
    """
    if homes[0].homes[part] == HOST or homes[0].homes[part] != homes[1].homes[part]:
        return False
    if device == CPU or old.packed(part) is None or old.part_bytes(part) != new.part_bytes(part):
        return False
    if new.location(part) == NOWHERE:
        return new.is_cheap_to_read(part)
    return new.location(part) == CPU and new.is_current(part)


class Handover:
    """Moves blocks behind one forward.

    On GPUs a thread does it, in streams of its own, while the caller goes on queueing the forward; elsewhere, where nothing runs beside
    anything, it is done at once.

    Args:
        old, new: the experts.
        devices: the blocks to be moved, by number, with the device of their home.
        keep: whether a block of ``old`` is to wait in system memory, by its name; else it is read from its file again.
        let_go: told the number of each block before it moves; must drop what else refers to its memory.
    """

    def __init__(
        self,
        old: Expert,
        new: Expert,
        devices: dict[int, torch.device],
        keep: Callable[[str], bool],
        let_go: Callable[[int], None],
    ):
        self._old, self._new, self._devices, self._keep, self._let_go = old, new, devices, keep, let_go
        self.moved: list[int] = []
        self._done: queue.SimpleQueue[tuple[int, Sequence[Mark]] | None] = queue.SimpleQueue()
        self._stopped = False
        on_gpus = any(probe.is_cuda(str(device)) for device in devices.values())
        self._thread = threading.Thread(target=self._work, name="wan-sharded-handover", daemon=True) if on_gpus else None
        self._streams: dict[torch.device, Stream] = {}
        if self._thread is not None:
            self._thread.start()

    def block_done(self, number: int, marks: Sequence[Mark]) -> None:
        """All work that reads a block is queued, up to these points. Returns at once on GPUs."""
        if self._thread is not None:
            self._done.put((number, marks))
        elif not self._stopped:
            self._stopped = not self._try(number)

    def finish(self, *, wait: bool = True) -> None:
        """Wait until everything that was begun has arrived; safe to call twice.

        Args:
            wait: for the blocks that are still to be moved, too; else only for the one under way.
        """
        self._stopped = self._stopped or not wait
        if self._thread is not None:
            self._done.put(None)
            self._thread.join()
            self._thread = None
        self._stopped = True

    def _work(self) -> None:
        while (item := self._done.get()) is not None:
            number, marks = item
            if self._stopped:
                continue
            for event in marks:
                if event is not None:
                    event.synchronize()
            self._stopped = not self._try(number)

    def _try(self, number: int) -> bool:
        """Move one block; False: it could not be, and activating the next expert will say why."""
        device = self._devices.get(number)
        if device is None:
            return True
        if device not in self._streams:
            self._streams[device] = new_stream(device)
        stream = self._streams[device]
        try:
            with torch.inference_mode(), nullcontext() if stream is None else torch.cuda.stream(stream):
                self._move(f"blocks.{number}", number, device)
        except Exception as error:
            logger.info("Block %d was not handed over: %s", number, error)
            return False
        self.moved.append(number)
        return True

    def _move(self, part: str, number: int, device: torch.device) -> None:
        packed = self._old.packed(part)
        assert packed is not None
        self._let_go(number)
        if self._keep(part):
            self._old.park(part)
        else:
            self._old.drop(part)
        self._new.bring_into(part, packed.flat, device)
