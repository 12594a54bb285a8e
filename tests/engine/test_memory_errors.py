"""Which errors are an out-of-memory."""

import pytest
import torch
from wan_sharded.engine import memory_errors


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError("CUDA error: out of memory"), False),
    ],
)
def test_out_of_memory_in_all_its_forms(error: Exception, memory: bool) -> None:
    assert memory_errors.is_out_of_memory(error) is memory


def test_only_what_was_not_torchs_own_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    discarded: list[int] = []
    monkeypatch.setattr(memory_errors, "discard", lambda: discarded.append(1))
    memory_errors.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert discarded == []
    memory_errors.is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert discarded == [1]


def test_discarding_takes_what_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    class Standing:
        def add_(self, _: int) -> None:
            taken.append(1)
            raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory_errors, "spare", Standing)
    memory_errors.discard()
    assert taken == [1]
