"""The samples of a split, how often an epoch shows each, and its micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from lora_scripts.data import weights
from lora_scripts.randomness import numpy_generator

GROUPED_BATCHES = 32  # of so many batches the rows are sorted by length, where they are padded


@dataclass(frozen=True)
class SampleSet:
    """Samples of one split (int32), each with how often an epoch shows it (float64)."""

    samples: np.ndarray
    weights: np.ndarray

    def views(self, *key: int | str, epoch: int) -> np.ndarray:
        """The samples of an epoch in shuffled order, each as often as its weight says."""
        views = np.repeat(self.samples, weights.times(self.weights, *key, epoch=epoch))
        numpy_generator(*key, epoch).shuffle(views)
        return views


class Batches(Sequence[tuple[int, ...]]):
    """Micro-batches of an epoch, made when they are asked for; a slice of them is of this kind."""

    def __init__(
        self, views: np.ndarray, size: int, order: np.ndarray | None, places: range
    ) -> None:
        """Batch `order[place]` (`place` itself without an order) of each of `places`; batch n
        holds the views from n * `size` on."""
        self._views, self._size, self._order = views, size, order
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...

    @overload
    def __getitem__(self, index: slice) -> Batches: ...

    def __getitem__(self, index: int | slice) -> tuple[int, ...] | Batches:
        if isinstance(index, slice):
            return Batches(self._views, self._size, self._order, self._places[index])
        place = self._places[index]
        start = self._size * int(place if self._order is None else self._order[place])
        return tuple(self._views[start : start + self._size].tolist())

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return (self[index] for index in range(len(self)))


def batches(
    views: np.ndarray, batch_size: int, lengths: np.ndarray | None, *key: int | str
) -> Batches:
    """Micro-batches of `batch_size` samples in the order of `views`.

    With `lengths` (tokens of each sample) those of a batch are of like length: of each few batches
    the samples are sorted by length, and the batches shuffled again.
    """
    count = -(-len(views) // batch_size)
    if lengths is None:
        return Batches(views, batch_size, None, range(count))
    grouped = np.empty_like(views)
    span = GROUPED_BATCHES * batch_size
    for start in range(0, len(views), span):
        part = views[start : start + span]
        grouped[start : start + span] = part[np.argsort(lengths[part], kind="stable")]
    order = np.arange(count, dtype=np.int32)
    numpy_generator(*key).shuffle(order)
    return Batches(grouped, batch_size, order, range(count))
