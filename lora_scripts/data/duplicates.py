"""Texts that are nearly the same: rows that count twice, held-out rows that were learned. Pure.

Two texts are as alike as their sets of shingles, short overlapping pieces, are:

    similarity(a, b) = |A ∩ B| / |A ∪ B|

(Jaccard's coefficient as "resemblance" in Broder, "On the resemblance and containment of
documents", 1997). A shingle is five characters long, or two where it begins in Chinese, Japanese
or Korean; upper and lower case, full and half width and the amount of white space do not count.

The pairs worth comparing are found without comparing all: MinHash (Broder 1997) gives each text a
signature of 240 numbers, and only texts that agree in one of 60 bands of 4 of them (Indyk and
Motwani, "Approximate nearest neighbors", 1998) are compared. Two texts of similarity s agree in
one with the probability 1 - (1 - s⁴)⁶⁰: 0.996 at s = 0.55, 0.9998 at 0.6. Copies never escape.

Letters are compared, not meaning. One changed word in a long sentence is a near duplicate even
where it changes the sense ("boiling point", "freezing point"); the same said in quite other words
is none. Texts as long as books share most of their shingles anyway: this is for rows.

The texts are read as often as they are needed and never kept; signatures lie on disk, a kilobyte
for each text. In memory are 30 bytes a text while a band is sorted, and 4 else.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_scripts.data.spool import table
from lora_scripts.randomness import numpy_generator

# Between what was measured in tests/data/test_duplicates.py: sentences with a few changed words
# have 0.61 and more, sentences of one topic or from one pattern 0.48 and less.
THRESHOLD = 0.55

_LONG, _SHORT = 5, 2  # characters of a shingle; the short one begins in an unspaced script
_UNSPACED = ((0x1100, 0x11FF), (0x2E80, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF))
_ASTRAL = (0x20000, 0x3FFFF)  # the rarer Chinese characters
_BANDS, _ROWS = 60, 4
_SLICE = 1 << 17  # shingles hashed in one go
_BLOCK = 1 << 16  # texts of a band looked at in one go
_COMPARED = 2048  # texts whose pairs are compared in one go: at most 480 each
_KEPT = 4096  # texts whose shingles are kept for the next comparison
_FELLOWS = 8  # of a crowd that agrees in a band, each is compared with the first so many
_FINALISTS = 4  # per text, so many of the likeliest by signature are compared exactly
_SLACK = 0.12  # a signature errs by less than this (3.7 standard deviations at 0.55)

Shingles = NDArray[np.uint32]
Signatures = NDArray[np.uint64]  # (_BANDS, texts), each of _ROWS numbers of 16 bits
Indices = NDArray[np.int32]


@dataclass(frozen=True)
class Pair:
    """Two texts that are nearly the same.

    Attributes:
        first: Index in `texts`.
        second: Index in `others`; within one list a later index in `texts`.
        similarity: From the threshold to 1.0: the same shingles, as a copy has them.
    """

    first: int
    second: int
    similarity: float


def near_duplicates(
    texts: Sequence[str], others: Sequence[str] | None = None, threshold: float = THRESHOLD
) -> list[Pair]:
    """`closest` as a list."""
    return list(closest(texts, others, threshold))


def closest(
    texts: Sequence[str],
    others: Sequence[str] | None = None,
    threshold: float = THRESHOLD,
    folder: Path | None = None,
) -> Iterator[Pair]:
    """For each text the one most like it among those before it; with `others`, among `texts`.

    A text is the `second` of one pair at most, so that a thousand copies are 999 pairs and not half
    a million. The result is in the order of `second` and depends on nothing but the arguments.
    Of a crowd of texts that are all alike some only are compared; the most alike is of these. Blank
    texts are alike. The similarity is exact; that a pair is looked at is a matter of chance with
    fixed dice (see above), nearly certain from 0.55 on, less so below.

    Args:
        texts: Read several times, in order and one by one.
        others: As `texts`.
        threshold: Of the similarity.
        folder: Near which signatures are put on disk.

    Raises:
        ValueError: if the threshold is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold}: expected more than 0, at most 1")
    every = _Plain(texts, others or ())
    first_of = table((len(every),), np.int32, folder)
    first_of[:] = _first_of(every)
    distinct = np.flatnonzero(is_first(first_of)).astype(np.int32)
    split = None if others is None else len(texts)
    split = None if others is None else len(texts)
    nearest = table((len(first_of),), np.int32, folder)  # one more than its number, 0: none
    alike = table((len(first_of),), np.float64, folder)
    for first, second, similarity in _found(every, distinct, split, threshold, folder):
        nearest[second], alike[second] = first + 1, similarity
    for index in range(split or 0, len(first_of)):
        same = int(first_of[index])
        if same < (index if split is None else split):
            yield Pair(same, index - (split or 0), 1.0)
        elif nearest[same]:
            yield Pair(int(nearest[same]) - 1, index - (split or 0), float(alike[same]))


class _Plain(Sequence[str]):
    """The texts of both lists, without what does not count."""

    def __init__(self, texts: Sequence[str], others: Sequence[str]) -> None:
        self._texts, self._others = texts, others

    def __len__(self) -> int:
        return len(self._texts) + len(self._others)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        behind = index - len(self._texts)
        return _plain(self._texts[index] if behind < 0 else self._others[behind])

    def __iter__(self) -> Iterator[str]:
        return map(_plain, itertools.chain(self._texts, self._others))


def _first_of(texts: _Plain) -> Indices:
    """For each text the first that is the same."""
    hashes = (
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for text in texts
    )
    numbers = (int.from_bytes(each, "little") for each in hashes)
    keys = np.fromiter(numbers, np.uint64, len(texts))
    return runs(keys)[1]


def is_first(first_of: Indices) -> NDArray[np.bool_]:
    """Whether each place is the first of its key; `first_of` as `runs` gives it."""
    found: NDArray[np.bool_] = first_of == np.arange(len(first_of), dtype=np.int32)
    return found


def runs(keys: NDArray[np.uint64]) -> tuple[Indices, Indices]:
    """The places in ascending order of their keys; and for each place the first of the same key."""
    order = np.argsort(keys, kind="stable").astype(np.int32)
    first_of = np.empty(len(keys), np.int32)
    first = np.int32(0)
    for start in range(0, len(keys), _BLOCK):
        some = order[start : start + _BLOCK]
        before = order[max(0, start - 1) : start - 1 + len(some)] if start else some[:-1]
        begins = np.ones(len(some), dtype=bool)
        begins[len(some) - len(before) :] = keys[some[len(some) - len(before) :]] != keys[before]
        last = np.maximum.accumulate(np.where(begins, np.arange(len(some)), -1))
        first_of[some] = np.where(last < 0, first, some[last])
        first = first_of[some[-1]]
    return order, first_of


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# --- shingles -------------------------------------------------------------------------------------


def _shingles(plain: str) -> Shingles:
    """The hashes of a text's shingles, ascending, each once. Never empty.

    A shingle begins at every character and in front of the first; at the end they are cut short.
    """
    padded = " " + plain + "\0" * (_LONG - 1)
    codes = np.frombuffer(padded.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    codes = _mixed(codes)
    count = len(codes) - (_LONG - 1)
    hashes = np.zeros(count, dtype=np.uint32)
    for place in range(_LONG):
        if place == _SHORT:
            short = hashes.copy()
        hashes = _mixed(hashes * np.uint32(0x9E3779B1) + codes[place : place + count])
    starts = np.frombuffer(padded.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)[:count]
    unspaced = np.zeros(count, dtype=bool)
    for low, high in (*_UNSPACED, _ASTRAL):
        unspaced |= (starts >= low) & (starts <= high)
    return np.unique(np.where(unspaced, short, hashes))


def _mixed(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A permutation of all 32-bit numbers that scatters them (Appleby's MurmurHash3 finalizer)."""
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))


def _jaccard(first: Shingles, second: Shingles) -> float:
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)


# --- which pairs to compare -----------------------------------------------------------------------


def _found(
    texts: _Plain, distinct: Indices, split: int | None, threshold: float, folder: Path | None
) -> Iterator[tuple[int, int, float]]:
    """(first, second, similarity) of each text that has a close one before it (before `split`).

    Compared are those of the numbers `distinct`, ascending.
    """
    if len(distinct) < 2:
        return

    @functools.lru_cache(_KEPT)
    def shingles_of(place: int) -> Shingles:
        return _shingles(texts[int(distinct[place])])

    signatures = _signatures(texts, distinct, folder)
    order, crowds = _banded(signatures, folder)
    border = None if split is None else int(np.searchsorted(distinct, split))
    for start in range(0, len(distinct), _COMPARED):
        members = np.arange(start, min(start + _COMPARED, len(distinct)), dtype=np.int32)
        first, second = _candidates(order, crowds, members, border)
        guess = _guesses(signatures, first, second)
        likely = guess >= threshold - _SLACK
        for fellows, member in _finalists(first[likely], second[likely], guess[likely]):
            alike = [(_jaccard(shingles_of(i), shingles_of(member)), -i) for i in fellows]
            similarity, index = max(alike)
            if similarity >= threshold:
                yield int(distinct[-index]), int(distinct[member]), similarity


def _finalists(
    first: Indices, second: Indices, guess: NDArray[np.float64]
) -> Iterator[tuple[list[int], int]]:
    """For each text the few that are most like it by signature."""
    ranks = np.lexsort((first, -guess, second))
    first, second = first[ranks], second[ranks]
    ends = np.flatnonzero(np.diff(second, append=-1)) + 1
    start = 0
    for end in ends.tolist():
        yield first[start : min(end, start + _FINALISTS)].tolist(), int(second[start])
        start = end


def _signatures(texts: _Plain, distinct: Indices, folder: Path | None) -> Signatures:
    """The least hash of each text's shingles under 240 hash functions: 16 bits of it."""
    salts = numpy_generator("near duplicates").integers(
        0, 1 << 32, size=_BANDS * _ROWS, dtype=np.uint32
    )
    signatures = table((_BANDS, len(distinct)), np.uint64, folder)

    def fill(part: tuple[int, list[Shingles]]) -> None:
        start, shingles = part
        offsets = np.concatenate(([0], np.cumsum([len(each) for each in shingles])[:-1]))
        joined = np.concatenate(shingles)
        least = np.empty((_BANDS, len(shingles), _ROWS), dtype=np.uint16)
        for column, salt in enumerate(salts):
            hashes = (joined ^ salt) * (salt | np.uint32(1))
            hashes ^= hashes >> np.uint32(15)
            hashes *= np.uint32(0x2C1B3C6D)
            least[column // _ROWS, :, column % _ROWS] = np.minimum.reduceat(hashes, offsets)
        signatures[:, start : start + len(shingles)] = least.view(np.uint64)[:, :, 0]

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        parts = _in_slices(texts, distinct)
        while some := list(itertools.islice(parts, workers)):
            for _ in pool.map(fill, some):
                pass
    return signatures


def _in_slices(texts: _Plain, distinct: Indices) -> Iterator[tuple[int, list[Shingles]]]:
    """The shingles of the texts that are compared, and the place of the first of each slice."""
    place, size, found = 0, 0, list[Shingles]()
    for number, text in enumerate(texts):
        if distinct[place + len(found)] != number:
            continue
        found.append(_shingles(text))
        size += len(found[-1])
        at_end = place + len(found) == len(distinct)
        if size >= _SLICE or at_end:
            yield place, found
            place, size, found = place + len(found), 0, []
        if at_end:
            return


def _banded(signatures: Signatures, folder: Path | None) -> tuple[Indices, Indices]:
    """Of each band the texts crowd by crowd, each in ascending order; and of each text the place
    where its crowd begins there."""
    order = table(signatures.shape, np.int32, folder)
    crowds = table(signatures.shape, np.int32, folder)
    for band in range(_BANDS):
        order[band], first_of = runs(np.asarray(signatures[band]))
        begins = np.empty(len(first_of), np.int32)
        begins[order[band]] = np.arange(len(first_of), dtype=np.int32)
        crowds[band] = begins[first_of]
    return order, crowds


def _candidates(
    order: Indices, crowds: Indices, members: Indices, border: int | None
) -> tuple[Indices, Indices]:
    """Pairs (first < second) that agree in a band; with `border`, first < border <= second."""
    count = order.shape[1]
    if border is not None:
        members = members[members >= border]
    found: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    for band in range(_BANDS):
        second, begins = members, crowds[band, members]
        for fellow in range(_FELLOWS):
            at = np.minimum(begins + fellow, count - 1)
            first = np.asarray(order[band, at])
            # those of a crowd ascend: behind one that is not before the text none is
            use = (first < second) & (crowds[band, first] == begins)
            second, begins, first = second[use], begins[use], first[use]
            across = slice(None) if border is None else first < border
            found.append(first[across].astype(np.int64) * count + second[across])
    pairs = np.unique(np.concatenate(found))
    return (pairs // count).astype(np.int32), (pairs % count).astype(np.int32)


def _guesses(signatures: Signatures, first: Indices, second: Indices) -> NDArray[np.float64]:
    """The share of the signature that both have: an unbiased guess of the similarity."""
    same = np.zeros(len(first), np.int64)
    for band in signatures:
        differing = band[first] ^ band[second]
        same += (differing.view(np.uint16).reshape(-1, _ROWS) == 0).sum(axis=1)
    guesses: NDArray[np.float64] = same / (_BANDS * _ROWS)
    return guesses
