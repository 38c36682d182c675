"""The rows of a run: the records of its datasets, which may lie on disk, each with its dataset."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Generic, TypeVar, overload

Records = TypeVar("Records", bound=Sequence[Any])
Dataset = TypeVar("Dataset")


class Rows(Sequence[tuple[Any, Dataset]], Generic[Records, Dataset]):
    """(record, dataset) pairs, made when they are asked for.

    Attributes:
        parts: The records of each dataset, in order.
        numbers: Of each of them the numbers of its rows.
    """

    def __init__(self, parts: Sequence[tuple[Records, Dataset]] = ()) -> None:
        self.parts = tuple(parts)
        ends = list(accumulate((len(records) for records, _ in self.parts), initial=0))
        self.numbers = tuple(map(range, ends, ends[1:]))

    def __len__(self) -> int:
        return self.numbers[-1].stop if self.numbers else 0

    @overload
    def __getitem__(self, index: int) -> tuple[Any, Dataset]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[Any, Dataset]]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        part = bisect_right(self.numbers, place, key=lambda numbers: numbers.start) - 1
        records, dataset = self.parts[part]
        return records[place - self.numbers[part].start], dataset

    def __iter__(self) -> Iterator[tuple[Any, Dataset]]:
        return ((record, dataset) for records, dataset in self.parts for record in records)


AnyRows = Rows[Any, Any]
