"""Pictures and their records on disk, read one at a time; in memory a few numbers of each."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from lora_scripts.data.records import Record
from lora_scripts.data.spool import Values

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
    mask: str | None = None
    role: str = "train"


class _Store:
    """All pictures of a run."""

    def __init__(self, folder: Path | None) -> None:
        self.values = Values(folder)
        self._weights, self._buckets = array("H"), array("H")  # numbers of the two below
        self.different_weights: dict[float, int] = {}
        self.sizes: dict[Size, int] = {}

    def add(self, picture: Picture) -> None:
        """Put one at the end."""
        self.values.append(
            (picture.record.to_value(), picture.captions, picture.size, picture.bucket,
             picture.weight, picture.content, picture.mask, picture.role)
        )  # fmt: skip
        known = self.different_weights
        self._weights.append(known.setdefault(picture.weight, len(known)))
        self._buckets.append(self.sizes.setdefault(picture.bucket, len(self.sizes)))

    @property
    def weights(self) -> np.ndarray:
        """Of each picture the number of its weight among the different ones, uint16."""
        return np.frombuffer(self._weights, np.uint16)

    @property
    def buckets(self) -> np.ndarray:
        """Of each picture the number of its bucket among `sizes`, uint16."""
        return np.frombuffer(self._buckets, np.uint16)

    def read(self, number: int) -> Picture:
        record, captions, size, bucket, weight, content, mask, role = self.values[number]
        return Picture(
            Record.from_value(record), tuple(captions), (size[0], size[1]), (bucket[0], bucket[1]),
            weight, content, mask, role,
        )  # fmt: skip


class Pictures(Sequence[Picture]):
    """Some of the pictures of a run, or all of them; one may be there several times.

    Attributes:
        numbers: Which of all they are, int32.
    """

    def __init__(self, store: _Store, numbers: np.ndarray) -> None:
        self._store = store
        self.numbers = numbers

    @classmethod
    def of(cls, pictures: Iterable[Picture], folder: Path | None = None) -> Pictures:
        """Put pictures on disk; `folder` as for `Records`."""
        store = _Store(folder)
        for picture in pictures:
            store.add(picture)
        return cls(store, np.arange(len(store.values), dtype=np.int32))

    def take(self, places: np.ndarray) -> Pictures:
        """Those at these places (or where a mask of all of them is True)."""
        return Pictures(self._store, self.numbers[places])

    def joined(self, others: Pictures) -> Pictures:
        """These, of which none comes twice, and those of the others (of the same run) that are
        not among them, each once, in the order in which they come."""
        is_here = np.zeros(len(self._store.values), dtype=bool)
        is_here[self.numbers] = True
        new = others.numbers[~is_here[others.numbers]]
        if not len(new):
            return self
        _, first = np.unique(new, return_index=True)
        return Pictures(self._store, np.concatenate([self.numbers, new[np.sort(first)]]))

    @property
    def weights(self) -> np.ndarray:
        """Of each its weight, float64."""
        weights: np.ndarray = self._different_weights[self._store.weights[self.numbers]]
        return weights

    @property
    def views(self) -> np.ndarray:
        """Of each its weight rounded up, int32."""
        rounded = np.ceil(self._different_weights).astype(np.int32)
        views: np.ndarray = rounded[self._store.weights[self.numbers]]
        return views

    @property
    def weights_are_whole(self) -> bool:
        """Whether no weight has a fraction, so that all epochs show the same."""
        return all(weight == int(weight) for weight in self._store.different_weights)

    @property
    def bucket_ranks(self) -> np.ndarray:
        """Of each the place of its bucket among all buckets in ascending order, int16."""
        sizes = list(self._store.sizes)  # in the order of their numbers
        ranks = np.argsort(sorted(range(len(sizes)), key=sizes.__getitem__)).astype(np.int16)
        ranked: np.ndarray = ranks[self._store.buckets[self.numbers]]
        return ranked

    @property
    def _different_weights(self) -> np.ndarray:
        return np.array(list(self._store.different_weights), np.float64)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Picture: ...

    @overload
    def __getitem__(self, index: slice) -> Pictures: ...

    def __getitem__(self, index: int | slice) -> Picture | Pictures:
        if isinstance(index, slice):
            return Pictures(self._store, self.numbers[index])
        return self._store.read(int(self.numbers[index]))

    def __iter__(self) -> Iterator[Picture]:
        return (self._store.read(int(number)) for number in self.numbers)
