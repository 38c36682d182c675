"""How often an epoch shows a sample whose weight is no whole number. Pure functions."""

from __future__ import annotations

import numpy as np

from lora_scripts.randomness import numpy_generator

_BLOCK = 1 << 16  # samples looked at in one go


def times(weights: np.ndarray, *key: int | str, epoch: int) -> np.ndarray:
    """How often each sample is shown in an epoch, int32, shape as `weights`.

    A weight of 2.5 shows a sample twice in every epoch and once more in every second one; which
    samples these are is dealt out evenly, so that none is left behind.
    """
    dice = numpy_generator(*key, "phase")
    shown = np.empty(len(weights), np.int32)
    for start in range(0, len(weights), _BLOCK):
        some = weights[start : start + _BLOCK]
        whole = np.floor(some)
        phase, share = dice.random(len(some)), some - whole
        once_more = np.floor((epoch + 1) * share + phase) - np.floor(epoch * share + phase)
        shown[start : start + _BLOCK] = whole + once_more
    return shown
