"""Pictures that are nearly the same: another size, format or brightness, a little cut. Pure.

Two pictures are alike if their perceptual hashes (the signs of the lowest 64 frequencies of their
grey, by ImageHash) differ in few bits and their colours, averaged over 8 x 8 fields, in little. The
hash alone takes drawings of one layout in other colours for the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Between what was measured on 120 drawings: unrelated ones differ in 14 bits and more, copies of
# half the size, a tenth brighter or as poor JPEGs in 8 and fewer in nine of ten cases, and in their
# colours by 2 of 255, with a border of 3% cut off by up to 17.
BITS = 8
COLOUR_STEPS = 20


def groups(patterns: Sequence[int], colours: Sequence[str]) -> list[list[int]]:
    """Indices of pictures that are nearly the same, each group in ascending order.

    A picture belongs to the first one that it is like, so that a long series in which each is like
    its neighbours only does not become one group. Takes memory for a few numbers a picture, and the
    time of comparing all with all: half a second for 10,000.

    Args:
        patterns: 64-bit hashes.
        colours: 8 x 8 RGB pixels of each, as hexadecimal digits.
    """
    hashes_N = np.array(patterns, dtype=np.uint64)
    free_N = np.ones(len(hashes_N), dtype=bool)
    found = []
    for first in range(len(hashes_N)):
        if not free_N[first]:
            continue
        after = np.flatnonzero(free_N[first + 1 :]) + first + 1
        differing = np.bitwise_count(hashes_N[after] ^ hashes_N[first])
        likely = after[differing <= BITS]
        alike = [int(i) for i in likely if _colour_distance(colours, first, int(i)) <= COLOUR_STEPS]
        if alike:
            free_N[alike] = False
            found.append([first, *alike])
    return found


def _colour_distance(colours: Sequence[str], first: int, second: int) -> float:
    difference = _levels(colours[first]) - _levels(colours[second])
    return float(np.abs(difference).mean())


def _levels(colours: str) -> NDArray[np.int16]:
    return np.frombuffer(bytes.fromhex(colours), dtype=np.uint8).astype(np.int16)
