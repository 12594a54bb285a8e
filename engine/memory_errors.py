"""Errors of CUDA that are no fault of the program: out of memory in all its forms, and what a refused call leaves behind."""

from functools import lru_cache

import torch

# Beside torch's own allocator, CUDA itself and its libraries run out, each in its words.
_WORDS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "HIP error: out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU has no memory left, whoever asked for it. Nothing of such an error comes up again later."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    found = isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)
    if found:
        discard()
    return found


def discard() -> None:
    """Forget the error of a CUDA call that was refused and did no harm: else the next kernel of this thread would raise it."""
    if torch.cuda.is_available():
        try:
            with torch.inference_mode():
                spare().add_(1)
            torch.cuda.synchronize()
        except RuntimeError:
            pass  # this was it


@lru_cache(maxsize=1)
def spare() -> torch.Tensor:
    """Something on a GPU to do a kernel with; to be made before memory is short."""
    with torch.inference_mode():
        return torch.zeros(1, dtype=torch.uint8, device="cuda")
