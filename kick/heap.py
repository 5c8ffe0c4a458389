"""What becomes of freed memory on a CPU: given back to the system, or kept for the next tensor. glibc on Linux; else
nothing happens.

Given back, a process is as large as what it holds. Kept, the next large tensor needs no new pages from the system, each
of which costs a fault and a zeroing: a training step of a 135M-parameter model takes about a quarter less.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_USUAL_TRIM, _USUAL_MMAP_MAX = 128 * 1024, 65536
_NEVER = 2**31 - 1


def release_at_once() -> None:
    """From now on large tensors that are let go give their memory back at once.

    By itself glibc raises the size from which this holds up to 32 MB as it goes, keeps what is smaller in a heap that
    fragments, and the deeper the model, the higher its peak.
    """
    _tell(_M_MMAP_THRESHOLD, 2**20)


def trim() -> None:
    """Give the rest back too: what lies free between pieces that are still held."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


@contextmanager
def kept() -> Iterator[None]:
    """Inside, freed memory stays with the process; afterwards it is given back."""
    _tell(_M_MMAP_MAX, 0)
    _tell(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        _tell(_M_MMAP_MAX, _USUAL_MMAP_MAX)
        _tell(_M_TRIM_THRESHOLD, _USUAL_TRIM)
        trim()


def _tell(option: int, value: int) -> None:
    if (libc := _glibc()) is not None:
        libc.mallopt(option, value)


def _glibc() -> Any:
    """glibc, or None where there is another one."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if libc is not None and hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
