"""How often an epoch shows a sample whose weight is no whole number. Pure functions."""

from __future__ import annotations

import numpy as np

from lora_scripts.randomness import numpy_generator


def times(weights: np.ndarray, *key: int | str, epoch: int) -> np.ndarray:
    """How often each sample is shown in an epoch, int64, shape as `weights`.

    A weight of 2.5 shows a sample twice in every epoch and once more in every second one; which
    samples these are is dealt out evenly, so that none is left behind.
    """
    whole = np.floor(weights).astype(np.int64)
    phase = numpy_generator(*key, "phase").random(len(weights))
    share = weights - whole
    once_more = np.floor((epoch + 1) * share + phase) - np.floor(epoch * share + phase)
    shown: np.ndarray = whole + once_more.astype(np.int64)
    return shown
