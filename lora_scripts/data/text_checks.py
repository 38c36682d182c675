"""Checks of texts across their rows: copies, answers that are always the same, held-out rows.

What one row alone has wrong (fields, roles, an empty answer) its reader has said already; which
rows are too long only the tokenizer knows (`data/text.py`). All that is found here is a warning.
Reports all, repairs nothing; needs no torch.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_scripts.data.conversations import TextRecord, TextRecords
from lora_scripts.data.duplicates import THRESHOLD, closest, is_first, runs
from lora_scripts.data.reading import show, show_path
from lora_scripts.data.rows import Rows
from lora_scripts.data.spool import table
from lora_scripts.errors import Problem
from lora_scripts.schema import TextDataset

ALIKE = 0.8  # above the 0.55 of held-out rows: people write one question in several ways on purpose
EVERYWHERE = 0.5  # an answer of so many of the conversations is remarked on
FEWEST = 10  # of fewer conversations nothing is said of their answers
LONGEST = 20_000  # characters; longer texts are compared whole only (see data/duplicates.py)
MOST_NAMED = 10  # findings of one kind; the last one counts the rest
PLACEHOLDERS = ("nan", "null", "n/a", "undefined", "todo", "tbd", "...", "…", "待补充", "暂无")

Texts = Rows[TextRecords, TextDataset]
Numbers = np.ndarray  # of rows, ascending: int32
Finding = Callable[[], Problem]  # which reads rows to say what was found


class _Line(NamedTuple):
    """What is said in a row."""

    said: str
    answer: str | None  # the last one; a raw text has none


def check(rows: Texts, folder: Path | None = None) -> list[Problem]:
    """Warnings of rows that stand twice, held-out rows that are learned, answers that say nothing.

    A row is held out if its dataset's role is validation. Copies are looked for among the rows
    that are learned, and among those held out; each group of them is one problem. System messages
    are not compared: they are the same in many rows.

    The rows are read several times and never kept. `folder`: near which signatures are put on disk.
    """
    lines = _Lines(rows)
    learned, held = lines.of_role("train"), lines.of_role("validation")
    return [
        *_few(_copies(lines, learned, "learned"), "groups of copies"),
        *_few(_copies(lines, held, "measured"), "groups of copies held out"),
        *_few(_near_copies(lines, learned, folder), "groups of rows nearly the same"),
        *_few(_leaks(lines, learned, held, folder), "held-out rows like one that is learned"),
        *_answers(lines),
    ]


class _Lines:
    """The rows by their numbers."""

    def __init__(self, rows: Texts) -> None:
        self.rows = rows
        self._homes = {
            dataset.path: dataset.path if dataset.path.is_dir() else dataset.path.parent
            for _, dataset in rows.parts
        }

    def of_role(self, role: str) -> Numbers:
        """The rows of the datasets of a role."""
        of_parts = zip(self.rows.parts, self.rows.numbers, strict=True)
        found = [np.arange(n.start, n.stop, dtype=np.int32) for (_, dataset), n in of_parts
                 if dataset.role == role]  # fmt: skip
        return np.concatenate([np.empty(0, np.int32), *found])

    def keys(self, numbers: Numbers) -> np.ndarray:
        """64 bits of each row: the same for the same content."""
        every = [records.keys() for records, _ in self.rows.parts] or [np.empty(0, np.uint64)]
        keys: np.ndarray = every[0] if len(every) == 1 else np.concatenate(every)
        return keys if len(keys) == len(numbers) else keys[numbers]

    def short(self, numbers: Numbers) -> Numbers:
        """Those that are not too long to be compared in part."""
        size = LONGEST // 2  # of the record; much less is sure to be short
        longer = [own[place] for (records, _), own
                  in zip(self.rows.parts, self.rows.numbers, strict=True)
                  for place in records.longer_than(size)]  # fmt: skip
        too_long = [number for number in longer if len(self.line(number).said) > LONGEST]
        return numbers[~np.isin(numbers, too_long)] if too_long else numbers

    def place(self, number: int) -> str:
        """Where a row stands; with its folder where rows come from several."""
        record, dataset = self.rows[int(number)]
        if len(set(self._homes.values())) < 2:
            return str(record.where)
        return show_path(self._homes[dataset.path] / record.where)

    def listed(self, numbers: Numbers) -> str:
        """The first places, and how many there are besides."""
        few = ", ".join(self.place(number) for number in numbers[:3])
        return f"{few} and {len(numbers) - 3:,} more" if len(numbers) > 3 else few

    def line(self, number: int) -> _Line:
        return _line(self.rows[int(number)][0])

    def __iter__(self) -> Iterator[tuple[_Line, str]]:
        """What each row says, and its role."""
        return ((_line(record), dataset.role) for record, dataset in self.rows)


class _Said(Sequence[str]):
    """What is said in some of the rows."""

    def __init__(self, lines: _Lines, numbers: Numbers) -> None:
        self._lines, self._numbers = lines, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return self._lines.line(self._numbers[index]).said


def _line(record: TextRecord) -> _Line:
    if record.text is not None:
        return _Line(record.text, None)
    said = "\n".join(_words(message) for message in record.messages if message["role"] != "system")
    answers = [_words(message) for message in record.messages if message["role"] == "assistant"]
    return _Line(said, answers[-1].strip())


def _words(message: Mapping[str, Any]) -> str:
    """What a message says; a call of a tool says its name and arguments."""
    calls = message.get("tool_calls", "")
    return f"{message['content']}{calls}"


def _few(findings: Iterator[Finding], what: str) -> Iterator[Problem]:
    """The first of them; of the rest the place where they begin, and how many there are."""
    for number, finding in enumerate(findings):
        problem = finding()
        if number == MOST_NAMED:
            more = 1 + sum(1 for _ in findings)
            said = f"from here on {more:,} more {what}"
            yield Problem(problem.where, said, "warning", problem.kind)
            return
        yield problem


# --- copies ---------------------------------------------------------------------------------------


def _groups(order: Numbers, first_of: Numbers) -> Iterator[Numbers]:
    """The places that are the same as another, each group in order; `order` and `first_of` as
    `runs` gives them."""
    firsts = first_of[order]  # group by group
    again = np.flatnonzero(firsts[1:] == firsts[:-1]) + 1
    begins = np.flatnonzero(np.diff(firsts[again], prepend=-1))
    ends = np.append(begins[1:], len(again))
    for group in np.argsort(firsts[again[begins]]):
        yield order[again[begins[group]] - 1 : again[ends[group] - 1] + 1]


def _copies(lines: _Lines, numbers: Numbers, what: str) -> Iterator[Finding]:
    for group in _groups(*runs(lines.keys(numbers))):
        yield partial(_copy, lines, numbers[group], what)


def _copy(lines: _Lines, group: Numbers, what: str) -> Problem:
    first, others = group[0], group[1:]
    times = "once more" if len(others) == 1 else f"{len(others):,} times more"
    said = (
        f"the row {show(lines.line(first).said)} stands {times}, in {lines.listed(others)}: each "
        f"copy is {what} again. Keep one (a dataset's weight shows rows more often)"
    )
    return Problem(lines.place(first), said, "warning", "duplicate-rows")


def _near_copies(lines: _Lines, numbers: Numbers, folder: Path | None) -> Iterator[Finding]:
    """One finding for each crowd of rows that are nearly, and not exactly, the same."""
    _, first_of = runs(lines.keys(numbers))
    firsts = lines.short(numbers[is_first(first_of)])
    del first_of
    crowd_of = table((len(firsts),), np.int32, folder)
    crowd_of[:] = np.arange(len(firsts), dtype=np.int32)
    for pair in closest(_Said(lines, firsts), threshold=ALIKE, folder=folder):
        crowd_of[pair.second] = crowd_of[pair.first]
    for crowd in _groups(np.argsort(crowd_of, kind="stable").astype(np.int32), crowd_of):
        yield partial(_near_copy, lines, firsts[crowd])


def _near_copy(lines: _Lines, crowd: Numbers) -> Problem:
    first, others = crowd[0], crowd[1:]
    number = "1 row is" if len(others) == 1 else f"{len(others):,} rows are"
    said = (
        f"{number} nearly the same as {show(lines.line(first).said)}: {lines.listed(others)}. "
        "Keep them if the difference is what shall be learned, else one of them"
    )
    return Problem(lines.place(first), said, "warning", "near-duplicate-rows")


def _leaks(
    lines: _Lines, learned: Numbers, held: Numbers, folder: Path | None
) -> Iterator[Finding]:
    """Held-out rows that stand, exactly or nearly, among those that are learned."""
    if not len(learned) or not len(held):
        return
    same = _same(lines.keys(learned), lines.keys(held))
    near = np.full(len(lines.rows), -1, np.int32)
    asked, short = lines.short(held), lines.short(learned)
    for pair in closest(_Said(lines, short), _Said(lines, asked), THRESHOLD, folder):
        near[asked[pair.second]] = short[pair.first]
    for number, place in zip(held, same, strict=True):
        if place >= 0:
            yield partial(_leak, lines, number, learned[place], "held out, but it also stands")
        elif near[number] >= 0:
            what = "held out, but nearly the same stands"
            yield partial(_leak, lines, number, near[number], what)


def _same(learned: np.ndarray, held: np.ndarray) -> np.ndarray:
    """For each key that is held out the first place among those learned, or -1."""
    order = np.argsort(learned, kind="stable")
    places = np.searchsorted(learned, held, sorter=order)
    found = order[np.minimum(places, len(order) - 1)]
    return np.where(learned[found] == held, found, -1)


def _leak(lines: _Lines, number: int, place: int, what: str) -> Problem:
    said = (
        f"this row is {what} among those that are learned, in {lines.place(place)}: the held-out "
        "loss looks better than it is. Remove one of them"
    )
    return Problem(lines.place(number), said, "warning", "held-out-learned")


# --- answers --------------------------------------------------------------------------------------


def _answers(lines: _Lines) -> Iterator[Problem]:
    """Answers that are no answer, and one answer to everything, found in one reading."""
    placeholders: dict[str, array[int]] = {}
    spoken, likely = 0, dict[str, int]()
    for number, (line, role) in enumerate(lines):
        if line.answer is not None and line.answer.lower() in PLACEHOLDERS:
            placeholders.setdefault(line.answer, array("l")).append(number)
        if line.answer and role == "train":
            spoken += 1
            likely = _counted(likely, line.answer)
    for answer, numbers in placeholders.items():
        yield _placeholder(lines, answer, np.array(numbers))
    # one of half of all is still counted a sixth of them when another is a third of them
    if spoken >= FEWEST and max(likely.values(), default=0) >= (EVERYWHERE - 1 / 3) * spoken:
        yield from _one_answer(lines, spoken, list(likely))


def _counted(counts: dict[str, int], answer: str) -> dict[str, int]:
    """Two counters, which end at those that are more than a third of all, if any is, and too low by
    at most a third of all (Misra and Gries, "Finding repeated elements", 1982)."""
    if answer in counts or len(counts) < 2:
        return {**counts, answer: counts.get(answer, 0) + 1}
    return {each: number - 1 for each, number in counts.items() if number > 1}


def _placeholder(lines: _Lines, answer: str, numbers: Numbers) -> Problem:
    """What programs write in place of an empty cell."""
    also = "" if len(numbers) == 1 else f" (and in {lines.listed(numbers[1:])})"
    what = (
        f"the answer is only {show(answer)}{also}, as programs fill an empty cell; it would be "
        "learned. Write the answer, or remove the row"
    )
    return Problem(lines.place(numbers[0]), what, "warning", "placeholder-answer")


def _one_answer(lines: _Lines, spoken: int, likely: Sequence[str]) -> Iterator[Problem]:
    """One answer to everything teaches to say it whatever is asked."""
    found: dict[str, array[int]] = {}
    for number, (line, role) in enumerate(lines):
        if line.answer is not None and role == "train" and line.answer in likely:
            found.setdefault(line.answer, array("l")).append(number)
    answer, numbers = max(found.items(), key=lambda each: len(each[1]))
    if len(numbers) >= EVERYWHERE * spoken:
        others = lines.listed(np.array(numbers[1:]))
        what = (
            f"{len(numbers):,} of {spoken:,} conversations end with the same answer, "
            f"{show(answer)} (also in {others}): the model will learn to say it whatever is asked. "
            "Were the answers put in the wrong column?"
        )
        yield Problem(lines.place(numbers[0]), what, "warning", "one-answer")
