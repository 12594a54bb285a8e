"""What is to be read for somebody, and how that goes."""

import threading
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType

import torch

from .pieces import Piece


class Reading:
    """Tensors that were asked for together, while threads read them.

    Attributes:
        stopped: what has not begun is to be left out.
        incomplete: something of it was left out, or failed.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left = 0
        self._size_bytes = 0
        self._error: BaseException | None = None
        self.stopped = False
        self.incomplete = False

    def add(self, pieces: int, size_bytes: int) -> None:
        """What is to be read for it."""
        with self._changed:
            self._left += pieces
            self._size_bytes += size_bytes

    def done(self, error: BaseException | None = None, *, left_out: bool = False) -> None:
        """One of those things is done, was left out, or failed."""
        with self._changed:
            self._left -= 1
            self._error = self._error or error
            self.incomplete = self.incomplete or left_out or error is not None
            if self.incomplete or not self._left:
                self._changed.notify_all()

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes of it; :meth:`wait` says at once how it went."""
        return not self._left

    @property
    def unfinished_bytes(self) -> int:
        """All of it, until it is there."""
        return self._size_bytes if self._left or self.incomplete else 0

    def wait(self) -> None:
        """Until all of it is there: in memory, or queued in the order of the GPU's stream.

        Raises:
            CheckpointError: a file can't be read any more, or has become shorter. Nothing is written for this reading after that.
        """
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._left or self.incomplete)
        except BaseException:
            self.stop()
            raise
        if self.incomplete:
            error = self._error or RuntimeError("what was to be read was let go")
            self.stop()
            try:
                raise error
            finally:
                del error

    def ended(self) -> bool:
        """Wait until no thread reads for it any more, from whatever thread: whether all of it is there."""
        with self._changed:
            self._changed.wait_for(lambda: not self._left)
        return not self.incomplete

    def stop(self) -> None:
        """Leave out what has not begun, and wait for the rest: no thread may write into memory that is let go."""
        self.stopped = True
        with self._changed:
            self._changed.wait_for(lambda: not self._left)
            self._error = None  # which knows this reading, and so the memory it was to fill


@dataclass(slots=True, eq=False)
class Errand:
    """A piece that is to be read for somebody, and the GPU's stream it is to be sent in. Not frozen, as pieces."""

    piece: Piece
    reading: Reading
    stream: "torch.cuda.Stream | None"


Waiting = dict["torch.cuda.Stream | None", deque[Errand]]
NOTHING: "Mapping[torch.cuda.Stream | None, int]" = MappingProxyType({})


class Errands:
    """What is still to be taken on: what is urgent first, and of several GPUs whose turn it is, so that all their links are busy.

    Attributes:
        lock: to be held by whoever calls anything of this.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # By the stream they are sent in, none empty; whose turn was last stands last.
        self._urgent: Waiting = {}
        self._others: Waiting = {}

    def __len__(self) -> int:
        return sum(len(errands) for waiting in (self._urgent, self._others) for errands in waiting.values())

    def __bool__(self) -> bool:
        return bool(self._urgent or self._others)

    def add(self, errands: Iterable[Errand], *, urgent: bool) -> None:
        waiting = self._urgent if urgent else self._others
        for errand in errands:
            waiting.setdefault(errand.stream, deque()).append(errand)

    def take(self, under_way: "Mapping[torch.cuda.Stream | None, int]" = NOTHING) -> Errand | None:
        """The next one, if there is one.

        Args:
            under_way: how many there are for each stream; one that has fewest is next.
        """
        waiting = self._urgent or self._others
        if not waiting:
            return None
        errands = waiting.pop(stream := min(waiting, key=lambda stream: under_way.get(stream, 0)))
        errand = errands.popleft()
        if errands:
            waiting[stream] = errands
        return errand

    def leave_out_stopped(self) -> None:
        """What would be next, but was let go."""
        for waiting in (self._urgent, self._others):
            for stream, errands in list(waiting.items()):
                while errands and errands[0].reading.stopped:
                    errands.popleft().reading.done(left_out=True)
                if not errands:
                    del waiting[stream]

    def leave_out(self, errands: Iterable[Errand]) -> None:
        """Those that nobody has taken on."""
        for errand in errands:
            for waiting in (self._urgent, self._others):
                with suppress(KeyError, ValueError):
                    waiting[errand.stream].remove(errand)
                    errand.reading.done(left_out=True)
                    if not waiting[errand.stream]:
                        del waiting[errand.stream]
