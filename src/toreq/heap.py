"""Reuse of freed memory by the C library's allocator."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT = 1 << 30


def reuse_freed_memory() -> bool:
    """Keep up to 1 GiB of freed memory in the process instead of giving it back to the kernel; whether that worked.

    By default glibc maps every large tensor anew and returns it when it is freed. The kernel then clears its pages
    again at each step of a relaxation, which for states of some megabytes costs more than the arithmetic. The setting
    belongs to the process, so training runs and benches make it, not ``import toreq``. It exists
    in glibc alone; elsewhere nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(option, _KEPT) == 1 for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
