"""A worker: one device that computes its share of the tokens, and the order of what runs there and between workers.

One Python thread queues the work of all devices, in one order; the devices run at the same time, since queueing does not wait for
them. What must come before what across devices is told to CUDA by marks (events). The CPU, and the devices that tests imagine, do
each thing when it is asked of them: there a mark says nothing.
"""

import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch

from .. import probe

# A point in a stream's work; ``None`` where work is never behind.
Mark = torch.cuda.Event | None
Stream = torch.cuda.Stream | None


def new_stream(device: torch.device) -> Stream:
    """A stream of its own on a CUDA device."""
    return torch.cuda.Stream(device) if probe.is_cuda(str(device)) else None


def mark(stream: Stream) -> Mark:
    """The point that a stream's work has been queued to."""
    if stream is None:
        return None
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event


def wait(stream: Stream, marks: Iterable[Mark]) -> None:
    """Have a stream's later work start after these points; of whichever device's streams."""
    for event in marks:
        if event is not None and stream is not None:
            stream.wait_event(event)


class Worker:
    """One device's part in the work.

    Args:
        index: the device's visible index; what sliders count by.
        device: torch's.
        stream: where it computes; by default the device's current stream.
    """

    def __init__(self, index: int, device: torch.device, stream: Stream = None):
        self.index = index
        self.device = device
        self._stream = stream
        # Whether its speed has been measured, rather than guessed.
        self.is_timed = False

    @property
    def stream(self) -> Stream:
        """Where this worker's computing is queued."""
        if self._stream is None and probe.is_cuda(str(self.device)):
            return torch.cuda.current_stream(self.device)
        return self._stream

    @contextmanager
    def computing(self) -> Generator[None, None, None]:
        """Inside, what is computed and allocated is this worker's."""
        stream = self.stream
        if stream is None:
            yield
        else:
            with torch.cuda.stream(stream):
                yield

    def take_over(self) -> None:
        """Work on tensors that the caller's stream makes, from here on."""
        if self._stream is not None:
            self.wait(mark(torch.cuda.current_stream(self.device)))

    def hand_over(self, tensor: torch.Tensor) -> None:
        """Let the caller's stream use a tensor that this worker has made."""
        if self._stream is not None:
            theirs = torch.cuda.current_stream(self.device)
            wait(theirs, [self.mark()])
            tensor.record_stream(theirs)

    def mark(self) -> Mark:
        """The point that this worker's work has been queued to."""
        return mark(self.stream)

    def wait(self, *marks: Mark) -> None:
        """Work queued from here on starts after these points."""
        wait(self.stream, marks)

    def now(self) -> "Moment":
        """This point in the worker's work, to be timed."""
        return Moment(self.stream)


class Moment:
    """A point in time at which a worker's queued work gets to; readable once it has."""

    def __init__(self, stream: Stream):
        self._event = None
        if stream is None:
            self._time = time.perf_counter()
        else:
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(stream)

    def seconds_until(self, later: "Moment") -> float:
        """Between two moments of one worker; waits for the later one."""
        if self._event is None or later._event is None:
            return later._time - self._time
        later._event.synchronize()
        return self._event.elapsed_time(later._event) / 1e3
