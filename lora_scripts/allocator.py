"""How this process gets memory from the system and gives it back: if memory is short, without gaps.

glibc puts every tensor below 32 MiB into one heap. PyTorch asks for memory aligned to 64 bytes;
what is cut off around a block is soon taken by small objects, and the hole that a tensor leaves is
then too small for the next tensor of its size: the heap grows to 1.4 to 3.2 times of what is alive
in a training step (memory/heap.py). Mapped alone, a tensor goes back to the system when it dies,
and the next one has to be given its pages anew, which takes time (docs/benchmarks.md has both).
"""

from __future__ import annotations

import ctypes
import os
import platform

MAPPED = 2**18  # bytes from which a block is mapped alone
THRESHOLD = "MALLOC_MMAP_THRESHOLD_"  # glibc's own variable, mallopt(3)
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_KEPT = 32 * 2**20  # free bytes at the heap's end that stay: no system call for each small tensor
_alone = False


def map_alone() -> bool:
    """Map every tensor of 256 kB and more alone from now on. Returns whether that is so.

    It is not on systems without glibc, nor where the user has set a threshold in the environment.
    """
    global _alone  # of the process, as glibc's setting is
    if not _alone and platform.libc_ver()[0] == "glibc" and THRESHOLD not in os.environ:
        libc = ctypes.CDLL(None)
        set_one = libc.mallopt(_M_MMAP_THRESHOLD, MAPPED)
        _alone = bool(set_one and libc.mallopt(_M_TRIM_THRESHOLD, _KEPT))
    return _alone


def maps_alone() -> bool:
    """Whether `map_alone` has been called, and could."""
    return _alone


def give_back() -> None:
    """Return what is free to the system, so that the next stage does not come on top of it.

    glibc keeps what was freed: after the pictures are encoded, or a model is let go of, gigabytes.
    Nothing to do elsewhere.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
