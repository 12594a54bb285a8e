"""What page-locks system memory, played: where no CUDA is."""

import threading
from collections.abc import Callable

import pytest
import torch
from wan_sharded.engine import host_memory, memory_errors
from wan_sharded.engine.host_memory import PageLocking


class PlayedDriver:
    """Registers memory as CUDA does, up to a limit; a refusal stands until it is discarded.

    Attributes:
        registered: address -> bytes, of what is locked.
        asked: how often it was to lock something.
        by: the names of the threads that asked.
        when_asked: called with each address and size before it is locked.
    """

    def __init__(self, most_bytes: int):
        self.most_bytes, self.registered, self.asked, self.stands = most_bytes, dict[int, int](), 0, False
        self.by: list[str] = []
        self.when_asked: Callable[[int, int], None] = lambda pointer, size: None

    @classmethod
    def installed(cls, monkeypatch: pytest.MonkeyPatch, most_bytes: int) -> "PlayedDriver":
        """One that is asked where CUDA would be."""
        played = cls(most_bytes)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: played)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.untyped_storage().data_ptr() in played.registered)
        monkeypatch.setattr(memory_errors, "spare", lambda: torch.zeros(1))
        monkeypatch.setattr(memory_errors, "discard", played.discard)
        monkeypatch.setattr(host_memory, "PAGE_LOCKING", PageLocking(windows=False))
        return played

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        self.when_asked(pointer, size)
        self.asked += 1
        self.by.append(threading.current_thread().name)
        if sum(self.registered.values()) + size > self.most_bytes:
            self.stands = True
            return 2
        assert pointer not in self.registered, "twice"
        self.registered[pointer] = size
        return 0

    def cudaHostUnregister(self, pointer: int) -> None:
        del self.registered[pointer]

    def discard(self) -> None:
        self.stands = False
