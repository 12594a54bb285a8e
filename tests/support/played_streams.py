"""GPUs' streams, played: copies to the CPU that are made when they are waited for."""

import random
import threading
import time
from typing import Any

import torch
from wan_sharded.engine.weights.driver_copies import Copied

CPU = torch.device("cpu")


class PlayedStream:
    """A GPU's stream, in which copies are made when they are waited for."""

    device = CPU

    def __init__(self) -> None:
        self.queued: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        self.all_queued: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        self.fails = False
        self._playing = threading.Lock()

    def synchronize(self) -> None:
        with self._playing:
            while self.queued:
                targets, sources = self.queued.pop(0)
                for target, source in zip(targets, sources, strict=True):
                    target.copy_(source)


class PlayedEvent:
    """Of what is queued in a stream."""

    def __init__(self) -> None:
        self.stream: PlayedStream | None = None

    def record(self, stream: PlayedStream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        time.sleep(random.random() * 0.002)
        assert self.stream is not None
        self.stream.synchronize()


class PlayedCopies:
    """Makes copies in a played stream, where CUDA's driver would in a real one."""

    def __init__(self, driver: object) -> None:
        pass

    def queue(self, stream: PlayedStream, filled: list[Any]) -> Copied:
        if stream.fails:
            raise RuntimeError("the GPU fell off the bus")
        for one in filled:
            sources = [one.memory[place : place + target.size_bytes] for place, target in one.piece.targets]
            stream.queued.append(([target.view() for _, target in one.piece.targets], sources))
            stream.all_queued.append(stream.queued[-1])
        event: Any = PlayedEvent()
        event.record(stream)
        return Copied(event, 1, CPU)

    def are_over(self, copied: Copied) -> bool:
        """They arrive late: only when this has been asked some times."""
        played: Any = copied.event
        if random.random() < 0.3:
            played.stream.synchronize()
        return not played.stream.queued

    def give_back(self, copied: Copied) -> None:
        pass
