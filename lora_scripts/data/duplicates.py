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
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_scripts.randomness import numpy_generator

# Between what was measured in tests/data/test_duplicates.py: sentences with a few changed words
# have 0.61 and more, sentences of one topic or from one pattern 0.48 and less.
THRESHOLD = 0.55

_LONG, _SHORT = 5, 2  # characters of a shingle; the short one begins in an unspaced script
_UNSPACED = ((0x1100, 0x11FF), (0x2E80, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF))
_ASTRAL = (0x20000, 0x3FFFF)  # the rarer Chinese characters
_BANDS, _ROWS = 60, 4
_SLICE = 1 << 20  # shingles hashed, or pairs compared, in one go: tens of megabytes
_FELLOWS = 8  # of a crowd that agrees in a band, each is compared with the first so many
_FINALISTS = 4  # per text, so many of the likeliest by signature are compared exactly
_SLACK = 0.12  # a signature errs by less than this (3.7 standard deviations at 0.55)

Shingles = NDArray[np.uint32]
Signatures = NDArray[np.uint32]  # (texts, _BANDS * _ROWS)
Indices = NDArray[np.int64]


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
    """For each text the one most like it among those before it; with `others`, among `texts`.

    A text is the `second` of one pair at most, so that a thousand copies are 999 pairs and not half
    a million. The result is in the order of `second` and depends on nothing but the arguments.
    Of a crowd of texts that are all alike some only are compared; the most alike is of these. Blank
    texts are alike. The similarity is exact; that a pair is looked at is a matter of chance with
    fixed dice (see above), nearly certain from 0.55 on, less so below.

    Raises:
        ValueError: if the threshold is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold}: expected more than 0, at most 1")
    plain = [_plain(text) for text in [*texts, *(others or ())]]
    first_of: dict[str, int] = {}
    for index, text in enumerate(plain):
        first_of.setdefault(text, index)
    distinct = list(first_of.values())  # ascending
    split = len(distinct)
    if others is not None:
        split = sum(index < len(texts) for index in distinct)
    best = _closest([plain[i] for i in distinct], None if others is None else split, threshold)
    closest = {distinct[second]: (distinct[first], alike) for first, second, alike in best}
    return list(_pairs(plain, first_of, closest, None if others is None else len(texts)))


def _pairs(
    plain: Sequence[str],
    first_of: dict[str, int],
    closest: dict[int, tuple[int, float]],
    split: int | None,
) -> Iterator[Pair]:
    """The pairs of all texts, from those of the first of each set of copies."""
    for index in range(split or 0, len(plain)):
        same = first_of[plain[index]]
        if same < (index if split is None else split):
            yield Pair(same, index - (split or 0), 1.0)
        elif same in closest:
            first, similarity = closest[same]
            yield Pair(first, index - (split or 0), similarity)


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


def _closest(
    plain: Sequence[str], split: int | None, threshold: float
) -> Iterator[tuple[int, int, float]]:
    """(first, second, similarity) of each text that has a close one before it (before `split`)."""
    if len(plain) < 2:
        return
    shingles = [_shingles(text) for text in plain]
    signatures = _signatures(shingles)
    first, second = _candidates(signatures, split)
    guess = _guesses(signatures, first, second)
    likely = guess >= threshold - _SLACK
    first, second, guess = first[likely], second[likely], guess[likely]
    order = np.lexsort((first, -guess, second))
    first, second = first[order], second[order]
    ends = np.flatnonzero(np.diff(second, append=-1)) + 1
    start = 0
    for end in ends.tolist():
        member = int(second[start])
        finalists = first[start : min(end, start + _FINALISTS)].tolist()
        alike = [(_jaccard(shingles[i], shingles[member]), -i) for i in finalists]
        similarity, index = max(alike)
        if similarity >= threshold:
            yield -index, member, similarity
        start = end


def _signatures(shingles: Sequence[Shingles]) -> Signatures:
    """The least hash of each text's shingles under 240 hash functions."""
    salts = numpy_generator("near duplicates").integers(
        0, 1 << 32, size=_BANDS * _ROWS, dtype=np.uint32
    )
    signatures = np.empty((len(shingles), len(salts)), dtype=np.uint32)

    def fill(start: int, end: int) -> None:
        lengths = [len(shingles[i]) for i in range(start, end)]
        offsets = np.concatenate(([0], np.cumsum(lengths)[:-1]))
        joined = np.concatenate(shingles[start:end])
        for column, salt in enumerate(salts):
            hashes = (joined ^ salt) * (salt | np.uint32(1))
            hashes ^= hashes >> np.uint32(15)
            hashes *= np.uint32(0x2C1B3C6D)
            signatures[start:end, column] = np.minimum.reduceat(hashes, offsets)

    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(fill, start, end) for start, end in _slices(shingles)]:
            done.result()
    return signatures


def _slices(shingles: Sequence[Shingles]) -> Iterator[tuple[int, int]]:
    start, size = 0, 0
    for index, one in enumerate(shingles):
        size += len(one)
        if size >= _SLICE // 8 or index == len(shingles) - 1:
            yield start, index + 1
            start, size = index + 1, 0


def _candidates(signatures: Signatures, split: int | None) -> tuple[Indices, Indices]:
    """Pairs (first < second) that agree in a band; with `split`, first < split <= second."""
    count = len(signatures)
    found: list[Indices] = []
    for band in range(_BANDS):
        rows = np.ascontiguousarray(signatures[:, band * _ROWS : (band + 1) * _ROWS])
        _, crowd = np.unique(rows.view(np.dtype((np.void, rows.strides[0]))), return_inverse=True)
        members = np.argsort(crowd.ravel(), kind="stable")  # of each crowd in ascending order
        crowd = crowd.ravel()[members]
        starts = np.searchsorted(crowd, crowd)  # where the crowd of each begins
        for fellow in range(_FELLOWS):
            at = np.minimum(starts + fellow, count - 1)
            use = at < np.arange(count)
            first, second = members[at[use]], members[use]
            if split is not None:
                across = (first < split) & (second >= split)
                first, second = first[across], second[across]
            found.append(first.astype(np.int64) * count + second)
    pairs = np.unique(np.concatenate(found))
    return pairs // count, pairs % count


def _guesses(signatures: Signatures, first: Indices, second: Indices) -> NDArray[np.float64]:
    """The share of the signature that both have: an unbiased guess of the similarity."""
    guesses = np.empty(len(first), dtype=np.float64)
    step = _SLICE // signatures.shape[1]
    for start in range(0, len(first), step):
        part = slice(start, start + step)
        guesses[part] = (signatures[first[part]] == signatures[second[part]]).mean(axis=1)
    return guesses
