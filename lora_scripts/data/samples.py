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

    def __init__(self, views: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> None:
        """Batch n holds the views [starts[n], stops[n])."""
        self._views, self._starts, self._stops = views, starts, stops

    def of(self, items: np.ndarray) -> Batches:
        """The same batches of the items that the views are numbers of."""
        return Batches(items[self._views], self._starts, self._stops)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...

    @overload
    def __getitem__(self, index: slice) -> Batches: ...

    def __getitem__(self, index: int | slice) -> tuple[int, ...] | Batches:
        starts, stops = self._starts[index], self._stops[index]
        if isinstance(index, slice):
            return Batches(self._views, starts, stops)
        return tuple(self._views[starts:stops].tolist())

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """As lists are equal."""
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def batches(
    views: np.ndarray, batch_size: int, lengths: np.ndarray | None, *key: int | str
) -> Batches:
    """Micro-batches of `batch_size` samples in the order of `views`.

    With `lengths` (tokens of each sample) those of a batch are of like length: of each few batches
    the samples are sorted by length, and the batches shuffled again.
    """
    starts = np.arange(0, len(views), batch_size, dtype=np.int32)
    if lengths is not None:
        grouped = np.empty_like(views)
        span = GROUPED_BATCHES * batch_size
        for start in range(0, len(views), span):
            part = views[start : start + span]
            grouped[start : start + span] = part[np.argsort(lengths[part], kind="stable")]
        views = grouped
        numpy_generator(*key).shuffle(starts)
    return Batches(views, starts, np.minimum(starts + batch_size, len(views)).astype(np.int32))
