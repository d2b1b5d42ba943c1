"""What the machine is good at: products in bfloat16, and memory that is kept instead of mapped anew."""

from __future__ import annotations

import ctypes
import sys

import torch

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


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32 on this device; elsewhere they are emulated, slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
