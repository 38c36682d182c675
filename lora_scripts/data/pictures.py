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
    mask: Path | None = None
    role: str = "train"


class _Store:
    """All pictures of a run."""

    def __init__(self, folder: Path | None) -> None:
        self.values = Values(folder)
        self.weights = array("d")
        self.buckets = array("h")  # numbers of `sizes`
        self.sizes: dict[Size, int] = {}

    def add(self, picture: Picture) -> None:
        """Put one at the end."""
        mask = None if picture.mask is None else str(picture.mask)
        self.values.append(
            (picture.record.to_value(), picture.captions, picture.size, picture.bucket,
             picture.weight, picture.content, mask, picture.role)
        )  # fmt: skip
        self.weights.append(picture.weight)
        self.buckets.append(self.sizes.setdefault(picture.bucket, len(self.sizes)))

    def read(self, number: int) -> Picture:
        record, captions, size, bucket, weight, content, mask, role = self.values[number]
        return Picture(
            Record.from_value(record), tuple(captions), (size[0], size[1]), (bucket[0], bucket[1]),
            weight, content, None if mask is None else Path(mask), role,
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
        """Those of both, which are of one run, each once, in the order in which they come."""
        numbers = np.concatenate([self.numbers, others.numbers])
        _, first = np.unique(numbers, return_index=True)
        return Pictures(self._store, numbers[np.sort(first)])

    @property
    def weights(self) -> np.ndarray:
        """Of each its weight, float64."""
        weights: np.ndarray = np.array(self._store.weights)[self.numbers]
        return weights

    @property
    def bucket_ranks(self) -> np.ndarray:
        """Of each the place of its bucket among all buckets in ascending order, int16."""
        sizes = list(self._store.sizes)  # in the order of their numbers
        ranks = np.argsort(sorted(range(len(sizes)), key=sizes.__getitem__)).astype(np.int16)
        ranked: np.ndarray = ranks[np.array(self._store.buckets)[self.numbers]]
        return ranked

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
