"""Libraries that are asked by way of ctypes, so that Python's lock is given up only where there is something to wait for.

Most calls here take a microsecond or two. To be let into Python again after one, where other threads are busy, takes tens of them.
"""

import ctypes
import errno
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch


class Control(ctypes.Structure):
    """``struct aiocb`` of the GNU C library, as 64-bit systems have it: one read, which a thread of the library's does."""

    _fields_ = (
        ("file", ctypes.c_int),
        ("operation", ctypes.c_int),
        ("priority", ctypes.c_int),
        ("memory", ctypes.c_void_p),
        ("size_bytes", ctypes.c_size_t),
        ("signal_value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notification", ctypes.c_int),
        ("signal_rest", ctypes.c_char * 48),
        ("next", ctypes.c_void_p),
        ("absolute_priority", ctypes.c_int),
        ("policy", ctypes.c_int),
        ("error", ctypes.c_int),
        ("result", ctypes.c_ssize_t),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_char * 32),
    )


class Time(ctypes.Structure):
    """``struct timespec``."""

    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_long))


NO_NOTIFICATION = 1  # SIGEV_NONE
_PROBES: list[Any] = []


class AsynchronousReads:
    """POSIX asynchronous I/O of the GNU C library, which reads in threads of its own: one for each open file, in order.

    Attributes:
        read: begin (address of a :class:`Control`); anything but 0 where no thread or memory can be had.
        error: of a read (address): what the library still did with the control block is done then.
        wait: until one of several reads is over (array of addresses, how many, address of a :class:`Time` or None).
    """

    def __init__(self) -> None:
        names = "aio_read", "aio_error", "aio_suspend"
        for library in ("libc.so.6", "librt.so.1"):  # which has them before version 2.34
            keeping, letting_go = ctypes.PyDLL(library), ctypes.CDLL(library)
            if all(hasattr(keeping, name) for name in names):
                break
        else:
            raise OSError("no asynchronous reads")
        self.read, self.error, self.wait = keeping.aio_read, keeping.aio_error, letting_go.aio_suspend
        self.read.argtypes = self.error.argtypes = [ctypes.c_void_p]
        self.wait.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]


@cache
def asynchronous_reads() -> AsynchronousReads | None:
    """None where there are none, or where they do not do what they should: they read this file's beginning to find out."""
    try:
        # Other processors may show that a read is over before they show what it read.
        if sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize < 2**32:
            return None
        if not hasattr(ctypes.CDLL("libc.so.6"), "gnu_get_libc_version"):
            return None
        calls, path, got = AsynchronousReads(), Path(__file__), bytearray(100)
        control = Control(memory=ctypes.addressof(ctypes.c_char.from_buffer(got)), size_bytes=100, offset=10, notification=NO_NOTIFICATION)
        address = ctypes.addressof(control)
        _PROBES.append((control, got))  # also where something interrupts this, which the library does not know
        with path.open("rb") as file:
            control.file = file.fileno()
            if calls.read(address):
                return None
            while control.error == errno.EINPROGRESS:
                calls.wait((ctypes.c_void_p * 1)(address), 1, None)
        works = calls.error(address) == 0 and control.result == 100 and bytes(got) == path.read_bytes()[10:110]
    except (OSError, AttributeError):
        return None
    return calls if works else None


@cache
def cuda_driver() -> Any:
    """CUDA's own library for copies; None where there is none, as with AMD's GPUs."""
    try:
        calls: Any = ctypes.PyDLL("libcuda.so.1") if torch.version.cuda else None
        if calls is not None:
            pointer, size = ctypes.c_void_p, ctypes.c_size_t
            calls.cuMemcpyHtoDAsync_v2.argtypes = [pointer, pointer, size, pointer]
            calls.cuEventRecord.argtypes = [pointer, pointer]
            calls.cuEventQuery.argtypes = calls.cuCtxSetCurrent.argtypes = calls.cuCtxGetCurrent.argtypes = [pointer]
            calls.cuGetErrorString.argtypes = [ctypes.c_int, pointer]
    except (OSError, AttributeError):
        return None
    return calls
