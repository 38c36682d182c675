"""What an epoch shows: pictures and their views, in shuffled micro-batches of one bucket each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_scripts.data import buckets, weights
from lora_scripts.data.pictures import Picture, Pictures
from lora_scripts.data.samples import Batches
from lora_scripts.randomness import numpy_generator


@dataclass(frozen=True)
class PictureSet:
    """Pictures and their views, numbered from 0.

    A picture of the weight 2.5 has three views, the last of which is shown in every second epoch.
    Behind the views of the pictures stand those of the regularisation pictures: in every epoch as
    many as there are of the others, going round where there are fewer pictures.
    """

    pictures: Pictures
    picture_of_view: np.ndarray  # int32
    is_last: np.ndarray  # of each view: the one that a fractional weight may leave out
    regularisation: Pictures

    @classmethod
    def repeated(cls, pictures: Pictures, regularisation: Pictures | None = None) -> PictureSet:
        """Every picture as often as its weight says; both are of one run."""
        regularisation = pictures[:0] if regularisation is None else regularisation
        slots = pictures.views
        last = np.zeros(int(slots.sum()), dtype=bool)
        last[np.cumsum(slots, dtype=np.int32) - 1] = True
        often = np.maximum(1, np.round(regularisation.weights)).astype(np.int32)
        rounds = regularisation.take(np.repeat(np.arange(len(often), dtype=np.int32), often))
        numbers = np.arange(len(pictures), dtype=np.int32)
        if len(last) > len(pictures):
            numbers = np.repeat(numbers, slots)
        return cls(pictures, numbers, last, rounds)

    @classmethod
    def measured(cls, pictures: Pictures, views: int) -> PictureSet:
        """Every picture in turn, at least once each, until there are about `views`."""
        rounds = max(1, round(views / len(pictures)))
        shown = np.tile(np.arange(len(pictures), dtype=np.int32), rounds)
        return cls(pictures, shown, np.zeros(len(shown), dtype=bool), pictures[:0])

    def __len__(self) -> int:
        """The number of different views, those of regularisation left out."""
        return len(self.picture_of_view)

    def at(self, view: int) -> Picture:
        """The picture that a view shows."""
        if self.is_regularisation(view):
            return self.regularisation[(view - len(self)) % len(self.regularisation)]
        return self.pictures[int(self.picture_of_view[view])]

    def is_regularisation(self, view: int) -> bool:
        """Whether a view shows what is to be kept, not what is to be learned."""
        return view >= len(self)

    def shown(self, epoch: int, *key: int | str) -> np.ndarray:
        """The views of an epoch in the order of their numbers, int32."""
        weight_P = self.pictures.weights
        times_P = weights.times(weight_P, *key, epoch=epoch)
        full_V = (times_P >= np.ceil(weight_P))[self.picture_of_view]
        views = np.flatnonzero(full_V | ~self.is_last).astype(np.int32)
        if not len(self.regularisation):
            return views
        kept = np.arange(len(views)) + round(epoch * weight_P.sum())
        return np.concatenate([views, (len(self) + kept).astype(np.int32)])

    def batches(self, batch_size: int, *key: int | str, epoch: int = 0) -> Batches:
        """The epoch's views in shuffled micro-batches of one bucket each; the order is `key`'s."""
        source = numpy_generator(*key, epoch)
        if self.pictures.weights_are_whole and not len(self.regularisation):  # all, in their order
            ranks = self.pictures.bucket_ranks[self.picture_of_view]
            return buckets.plan_batches(ranks, batch_size, source)
        views = self.shown(epoch, *key)
        learned = int(np.searchsorted(views, len(self)))  # the others stand behind them
        ranks = self.pictures.bucket_ranks[self.picture_of_view[views[:learned]]]
        if learned < len(views):
            kept = (views[learned:] - len(self)) % len(self.regularisation)
            ranks = np.append(ranks, self.regularisation.bucket_ranks[kept])
        return buckets.plan_batches(ranks, batch_size, source).of(views)
