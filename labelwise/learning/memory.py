"""How the process holds on to memory, which on a CPU decides a good part of a training step's time."""

import ctypes
import sys

import torch

from labelwise.environment import free_memory

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4  # malloc.h of glibc
_LARGEST = 2**31 - 1  # mallopt takes an int
TRAINING_SHARE = 0.5  # of what is free goes to training


def keep_freed_memory() -> None:
    """Let glibc keep what is freed from now on, instead of giving every large tensor back to the system.

    A training step frees and asks for the same large blocks again and again; each time the system must
    map and clear the pages anew. Kept, a step of a narrow ResNet at 96 px took 405 ms instead of 710
    (measured 2026-11-24, recipes/LOG.md). Peak memory grows by about a sixth. Nothing happens where the
    C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    mallopt = getattr(library, "mallopt", None)
    if mallopt is None:  # musl
        return
    library.malloc_trim(0)  # what was freed before: 60 MB after a million files were listed
    mallopt(_MMAP_THRESHOLD, _LARGEST)
    mallopt(_MMAP_MAX, 0)  # older versions of glibc refuse a threshold above 32 MiB
    mallopt(_TRIM_THRESHOLD, _LARGEST)
    mallopt(_TOP_PAD, 64 * 2**20)


def available_memory(device: torch.device) -> float:
    """Bytes a step may still use on a device; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return free_memory()
