"""Randomness as a function: every random choice has a generator keyed by what it is for.

`generator(seed, "noise", epoch, sample)` gives the same numbers in any process, at any time,
resumed or not. No module of this package draws from a global generator, LoRA dropout apart, which
the training loop seeds at every micro-step.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator keyed by `parts`; draws are made on the CPU so that devices agree."""
    import torch

    return torch.Generator().manual_seed(seed_of(*parts))


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A NumPy generator keyed by `parts`."""
    return np.random.Generator(np.random.PCG64(seed_of(*parts)))
