"""Keeps encoders' threads from taking the processors for themselves."""

import os
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

_TASKS = Path("/proc/self/task")


@contextmanager
def usual_scheduling() -> Generator[None, None, None]:
    """Have the caller's thread, and threads that are begun inside, scheduled as the caller was before.

    Run by root, SVT-AV1 makes its threads and the one that opens it real-time ones (``SCHED_FIFO``, priority 99). The latter stays so
    when the video is done, and so does every thread and program it starts: ComfyUI's page and its Cancel get no time beside it.
    """
    if sys.platform != "linux":
        yield
        return
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    known = set(os.listdir(_TASKS)) - {str(threading.get_native_id())}
    try:
        yield
    finally:
        for task in set(os.listdir(_TASKS)) - known:
            with suppress(OSError):  # ended meanwhile
                if os.sched_getscheduler(int(task)) != policy:
                    os.sched_setscheduler(int(task), policy, priority)
