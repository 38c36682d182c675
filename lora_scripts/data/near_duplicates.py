"""Pictures that are nearly the same: another size, format or brightness, a little cut. Pure.

Two pictures are alike if their perceptual hashes (the signs of the lowest 64 frequencies of their
grey, by ImageHash) differ in few bits and their colours, averaged over 8 x 8 fields, in little. The
hash alone takes drawings of one layout in other colours for the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Between what was measured on 120 drawings: unrelated ones differ in 14 bits and more, copies of
# half the size, a tenth brighter or as poor JPEGs in 8 and fewer in nine of ten cases, and in their
# colours by 2 of 255, with a border of 3% cut off by up to 17.
BITS = 8
COLOUR_STEPS = 20


def groups(hashes_N: NDArray[np.uint64], colours_NC: NDArray[np.uint8]) -> list[list[int]]:
    """Indices of pictures that are nearly the same, each group in ascending order.

    A picture belongs to the first one that it is like, so that a long series in which each is like
    its neighbours only does not become one group. Takes memory for a few numbers a picture, and the
    time of comparing all with all: half a second for 10,000.

    Args:
        hashes_N: Of the pictures.
        colours_NC: 8 x 8 RGB pixels of each.
    """
    free_N = np.ones(len(hashes_N), dtype=bool)
    found = []
    for first in range(len(hashes_N)):
        if not free_N[first]:
            continue
        after = np.flatnonzero(free_N[first + 1 :]) + first + 1
        differing = np.bitwise_count(hashes_N[after] ^ hashes_N[first])
        likely = after[differing <= BITS]
        alike = [i for i in likely.tolist() if _distance(colours_NC, first, i) <= COLOUR_STEPS]
        if alike:
            free_N[alike] = False
            found.append([first, *alike])
    return found


def _distance(colours_NC: NDArray[np.uint8], first: int, second: int) -> float:
    return float(np.abs(colours_NC[first].astype(np.int16) - colours_NC[second]).mean())
