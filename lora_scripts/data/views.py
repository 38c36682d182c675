"""What an epoch shows: pictures and their views, in shuffled micro-batches of one bucket each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lora_scripts.data import buckets, weights
from lora_scripts.data.records import Record
from lora_scripts.randomness import numpy_generator

Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True)
class Picture:
    """One picture with everything that does not change while training.

    Attributes:
        captions: Of these one is drawn for each view; most pictures have one.
        size: The picture's own, upright.
        bucket: The size that it is cut to.
        weight: How often an epoch shows it.
        content: SHA-256 of the file.
        mask: The file that says where it is learned; the picture itself for its alpha channel.
        role: Of its dataset: train, regularisation or validation.
    """

    record: Record
    captions: tuple[str, ...]
    size: Size
    bucket: Size
    weight: float
    content: str
    mask: Path | None = None
    role: str = "train"


@dataclass(frozen=True)
class PictureSet:
    """Pictures and their views, numbered from 0.

    A picture of the weight 2.5 has three views, the last of which is shown in every second epoch.
    Behind the views of the pictures stand those of the regularisation pictures: in every epoch as
    many as there are of the others, going round where there are fewer pictures.
    """

    pictures: list[Picture]
    picture_of_view: np.ndarray
    is_last: np.ndarray  # of each view: the one that a fractional weight may leave out
    regularisation: list[Picture] = field(default_factory=list)

    @classmethod
    def repeated(
        cls, pictures: list[Picture], regularisation: list[Picture] | None = None
    ) -> PictureSet:
        """Every picture as often as its weight says."""
        slots = np.ceil([picture.weight for picture in pictures]).astype(np.int64)
        last = np.zeros(int(slots.sum()), dtype=bool)
        last[np.cumsum(slots) - 1] = True
        often = [max(1, round(picture.weight)) for picture in regularisation or ()]
        rounds = [p for p, n in zip(regularisation or (), often, strict=True) for _ in range(n)]
        return cls(pictures, np.repeat(np.arange(len(pictures)), slots), last, rounds)

    @classmethod
    def measured(cls, pictures: list[Picture], views: int) -> PictureSet:
        """Every picture in turn, at least once each, until there are about `views`."""
        rounds = max(1, round(views / len(pictures)))
        shown = np.tile(np.arange(len(pictures)), rounds)
        return cls(pictures, shown, np.zeros(len(shown), dtype=bool))

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
        """The views of an epoch in the order of their numbers."""
        weight_P = np.array([picture.weight for picture in self.pictures])
        times_P = weights.times(weight_P, *key, epoch=epoch)
        full_V = (times_P >= np.ceil(weight_P))[self.picture_of_view]
        views = np.flatnonzero(full_V | ~self.is_last)
        if not self.regularisation:
            return views
        kept = np.arange(len(views)) + round(epoch * weight_P.sum())
        return np.concatenate([views, len(self) + kept])

    def batches(self, batch_size: int, *key: int | str, epoch: int = 0) -> list[tuple[int, ...]]:
        """The epoch's views in shuffled micro-batches of one bucket each; the order is `key`'s."""
        views = self.shown(epoch, *key)
        shown = [self.at(int(view)).bucket for view in views]
        numbers = {bucket: number for number, bucket in enumerate(sorted(set(shown)))}
        planned = buckets.plan_batches(
            [numbers[bucket] for bucket in shown], batch_size, numpy_generator(*key, epoch)
        )
        return [tuple(int(views[place]) for place in batch) for batch in planned]
