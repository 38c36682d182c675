"""Checks of the images themselves, before anything is trained on. Reports all, repairs nothing."""

from __future__ import annotations

from collections.abc import Sequence

from lora_scripts.data import near_duplicates
from lora_scripts.data.image_folder import FORMATS
from lora_scripts.data.looking import Look
from lora_scripts.data.reading import shorten
from lora_scripts.data.records import Record
from lora_scripts.errors import Problem
from lora_scripts.schema import ImageDataset

Row = tuple[Record, ImageDataset]
_NAMED = 20  # of a group of pictures that are alike


def check(rows: Sequence[Row], looks: Sequence[Look]) -> list[Problem]:
    """Everything wrong with the image files, in the order of the rows; then copies.

    Errors: a file that is not there, is no image, is damaged or cut short, is too large to be
    decoded safely. Warnings: what is odd about a file, an extension that does not fit its content,
    files of the same content, pictures that are nearly the same. A `Problem`'s place is the image;
    its text ends with the record's own place.
    """
    problems: list[Problem] = []
    good: list[tuple[Row, Look]] = []
    for (record, dataset), look in zip(rows, looks, strict=True):
        where, place = str(record.path), f" ({record.where})"
        if look.error is not None:
            kind, what = look.error
            problems.append(Problem(where, what + place, "error", kind))
            continue
        for kind, what in (*look.remarks, *_misnamed(record, look)):
            problems.append(Problem(where, what + place, "warning", kind))
        good.append(((record, dataset), look))
    first, copies = _copies(good)
    return problems + copies + _near_copies(first)


def _misnamed(record: Record, look: Look) -> list[tuple[str, str]]:
    suffix = record.path.suffix
    if look.format in FORMATS[suffix.lower()]:
        return []
    name = "JPEG" if look.format == "MPO" else look.format
    what = f"its content is {name}, its name ends in {suffix}; other programs may refuse it: rename"
    return [("content-extension", what)]


def _copies(good: Sequence[tuple[Row, Look]]) -> tuple[list[tuple[Row, Look]], list[Problem]]:
    """The first picture of each content, and a warning for each that repeats one of them."""
    first: dict[str, tuple[Row, Look]] = {}
    problems = []
    for row, look in good:
        (earlier, earlier_data), _ = first.setdefault(look.content, (row, look))
        record, dataset = row
        if earlier is record:
            continue
        same = f"the same image as {earlier.path} ({earlier.where}), byte for byte; "
        kind, why = _why(earlier_data.role, dataset.role, "it counts twice. Remove one")
        problems.append(Problem(str(record.path), f"{same}{why} ({record.where})", "warning", kind))
    return list(first.values()), problems


def _near_copies(different: Sequence[tuple[Row, Look]]) -> list[Problem]:
    looks = [look for _, look in different]
    problems = []
    for group in near_duplicates.groups(
        [look.pattern for look in looks], [look.colours for look in looks]
    ):
        (record, _), _ = different[group[0]]
        others = [different[i][0] for i in group[1:]]
        roles = {dataset.role for _, dataset in (different[i][0] for i in group)}
        names = ", ".join(f"{shorten(other.path.name)} ({other.where})" for other, _ in
                          others[:_NAMED])  # fmt: skip
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        what = "what they show counts more often than the rest. Keep the best of them"
        held = "validation" in roles and len(roles) > 1
        _, why = _why("train", "validation" if held else "train", what)
        text = f"nearly the same picture as {names}{more}; {why} ({record.where})"
        problems.append(Problem(str(record.path), text, "warning", "near-duplicate"))
    return problems


def _why(role: str, other: str, usual: str) -> tuple[str, str]:
    """The kind of a copy, and why it is bad: what is learned cannot measure the learning."""
    if role != other and "validation" in (role, other):
        what = "one is learned and the other held out to measure what was learned. Remove one"
        return "held-out-copy", what
    return "duplicate-image", usual
