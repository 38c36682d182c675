"""Checks of texts across their rows: copies, answers that are always the same, held-out rows.

What one row alone has wrong (fields, roles, an empty answer) its reader has said already; which
rows are too long only the tokenizer knows (`data/text.py`). All that is found here is a warning.
Reports all, repairs nothing; needs no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_scripts.data.conversations import TextRecord
from lora_scripts.data.duplicates import THRESHOLD, near_duplicates
from lora_scripts.data.reading import show, show_path
from lora_scripts.errors import Problem
from lora_scripts.schema import TextDataset

ALIKE = 0.8  # above the 0.55 of held-out rows: people write one question in several ways on purpose
EVERYWHERE = 0.5  # an answer of so many of the conversations is remarked on
FEWEST = 10  # of fewer conversations nothing is said of their answers
LONGEST = 20_000  # characters; longer texts are compared whole only (see data/duplicates.py)
MOST_NAMED = 10  # findings of one kind; the last one counts the rest
PLACEHOLDERS = ("nan", "null", "n/a", "undefined", "todo", "tbd", "...", "…", "待补充", "暂无")

Row = tuple[TextRecord, TextDataset]


class _Line(NamedTuple):
    """A row: its place, what it is by itself, and what is said in it."""

    place: str
    content: str
    said: str
    answer: str | None  # the last one; a raw text has none


def check(rows: Sequence[Row]) -> list[Problem]:
    """Warnings of rows that stand twice, held-out rows that are learned, answers that say nothing.

    A row is held out if its dataset's role is validation. Copies are looked for among the rows
    that are learned, and among those held out; each group of them is one problem. System messages
    are not compared: they are the same in many rows.
    """
    places = _places(rows)
    lines = [_line(place, record) for place, (record, _) in zip(places, rows, strict=True)]
    held = [line for line, row in zip(lines, rows, strict=True) if row[1].role == "validation"]
    learned = [line for line, row in zip(lines, rows, strict=True) if row[1].role == "train"]
    return [
        *_few(_copies(learned, "learned"), "groups of copies"),
        *_few(_copies(held, "measured"), "groups of copies held out"),
        *_few(_near_copies(learned), "groups of rows nearly the same"),
        *_few(_leaks(learned, held), "held-out rows like one that is learned"),
        *_placeholders(lines),
        *_one_answer(learned),
    ]


def _places(rows: Sequence[Row]) -> list[str]:
    """The place of each row; with its folder where rows come from several."""
    homes: dict[Path, Path] = {}
    for _, dataset in rows:
        if dataset.path not in homes:
            homes[dataset.path] = dataset.path if dataset.path.is_dir() else dataset.path.parent
    if len(set(homes.values())) < 2:
        return [record.where for record, _ in rows]
    return [show_path(homes[dataset.path] / record.where) for record, dataset in rows]


def _line(place: str, record: TextRecord) -> _Line:
    content = repr((record.messages, record.tools, record.text))
    if record.text is not None:
        return _Line(place, content, record.text, None)
    said = "\n".join(_words(message) for message in record.messages if message["role"] != "system")
    answers = [_words(message) for message in record.messages if message["role"] == "assistant"]
    return _Line(place, content, said, answers[-1].strip())


def _words(message: Mapping[str, Any]) -> str:
    """What a message says; a call of a tool says its name and arguments."""
    calls = message.get("tool_calls", "")
    return f"{message['content']}{calls}"


def _few(problems: Iterator[Problem], what: str) -> Iterator[Problem]:
    """The first of them; of the rest the place where they begin, and how many there are."""
    for number, problem in enumerate(problems):
        if number == MOST_NAMED:
            more = 1 + sum(1 for _ in problems)
            said = f"from here on {more:,} more {what}"
            yield Problem(problem.where, said, "warning", problem.kind)
            return
        yield problem


def _listed(places: Sequence[str]) -> str:
    few = ", ".join(places[:3])
    return f"{few} and {len(places) - 3:,} more" if len(places) > 3 else few


# --- copies ---------------------------------------------------------------------------------------


def _groups(lines: Sequence[_Line]) -> list[list[_Line]]:
    """The rows that are exactly the same, each group in order; most groups are of one."""
    found: dict[str, list[_Line]] = {}
    for line in lines:
        found.setdefault(line.content, []).append(line)
    return list(found.values())


def _copies(lines: Sequence[_Line], what: str) -> Iterator[Problem]:
    for first, *others in _groups(lines):
        if others:
            times = "once more" if len(others) == 1 else f"{len(others):,} times more"
            places = _listed([line.place for line in others])
            said = (
                f"the row {show(first.said)} stands {times}, in {places}: each copy is {what} "
                "again. Keep one (a dataset's weight shows rows more often)"
            )
            yield Problem(first.place, said, "warning", "duplicate-rows")


def _near_copies(lines: Sequence[_Line]) -> Iterator[Problem]:
    """One problem for each crowd of rows that are nearly, and not exactly, the same."""
    firsts = [group[0] for group in _groups(lines) if len(group[0].said) <= LONGEST]
    crowd_of: dict[int, int] = {}
    crowds: dict[int, list[int]] = {}
    for pair in near_duplicates([line.said for line in firsts], threshold=ALIKE):
        crowd = crowd_of.setdefault(pair.first, pair.first)
        crowd_of[pair.second] = crowd
        crowds.setdefault(crowd, []).append(pair.second)
    for crowd, members in sorted(crowds.items()):
        others = _listed([firsts[member].place for member in members])
        number = "1 row is" if len(members) == 1 else f"{len(members):,} rows are"
        said = (
            f"{number} nearly the same as {show(firsts[crowd].said)}: {others}. Keep them if the "
            "difference is what shall be learned, else one of them"
        )
        yield Problem(firsts[crowd].place, said, "warning", "near-duplicate-rows")


def _leaks(learned: Sequence[_Line], held: Sequence[_Line]) -> Iterator[Problem]:
    """Held-out rows that stand, exactly or nearly, among those that are learned."""
    if not learned or not held:
        return
    at = {line.content: line.place for line in reversed(learned)}
    short = [line for line in learned if len(line.said) <= LONGEST]
    asked = [line for line in held if len(line.said) <= LONGEST]
    pairs = near_duplicates([line.said for line in short], [line.said for line in asked], THRESHOLD)
    near = {asked[pair.second].place: short[pair.first].place for pair in pairs}
    for line in held:
        what = "held out, but it also stands"
        place = at.get(line.content)
        if place is None and (place := near.get(line.place)) is not None:
            what = "held out, but nearly the same stands"
        if place is not None:
            said = (
                f"this row is {what} among those that are learned, in {place}: the held-out loss "
                "looks better than it is. Remove one of them"
            )
            yield Problem(line.place, said, "warning", "held-out-learned")


# --- answers --------------------------------------------------------------------------------------


def _placeholders(lines: Sequence[_Line]) -> Iterator[Problem]:
    """Answers that are no answer: what programs write in place of an empty cell."""
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.answer is not None and line.answer.lower() in PLACEHOLDERS:
            found.setdefault(line.answer, []).append(line.place)
    for answer, places in found.items():
        also = "" if len(places) == 1 else f" (and in {_listed(places[1:])})"
        what = (
            f"the answer is only {show(answer)}{also}, as programs fill an empty cell; it would be "
            "learned. Write the answer, or remove the row"
        )
        yield Problem(places[0], what, "warning", "placeholder-answer")


def _one_answer(lines: Sequence[_Line]) -> Iterator[Problem]:
    """One answer to everything teaches to say it whatever is asked."""
    spoken = [line for line in lines if line.answer]
    if len(spoken) < FEWEST:
        return
    answer, often = Counter(line.answer for line in spoken).most_common(1)[0]
    if often >= EVERYWHERE * len(spoken):
        first, *others = [line.place for line in spoken if line.answer == answer]
        what = (
            f"{often:,} of {len(spoken):,} conversations end with the same answer, "
            f"{show(answer or '')} (also in {_listed(others)}): the model will learn to say it "
            "whatever is asked. Were the answers put in the wrong column?"
        )
        yield Problem(first, what, "warning", "one-answer")
