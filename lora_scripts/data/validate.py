"""Checks of the images themselves, before anything is trained on. Reports all, repairs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_scripts.data import near_duplicates
from lora_scripts.data.duplicates import Indices, runs
from lora_scripts.data.folders import suffix_of
from lora_scripts.data.image_folder import FORMATS
from lora_scripts.data.looking import COLOURS, Look
from lora_scripts.data.reading import shorten
from lora_scripts.data.records import Record
from lora_scripts.data.spool import table
from lora_scripts.errors import Problem
from lora_scripts.schema import ImageDataset

Row = tuple[Record, ImageDataset]
_NAMED = 20  # of a group of pictures that are alike


def check(rows: Sequence[Row], looks: Sequence[Look], folder: Path | None = None) -> list[Problem]:
    """Everything wrong with the image files, in the order of the rows; then copies.

    Errors: a file that is not there, is no image, is damaged or cut short, is too large to be
    decoded safely. Warnings: what is odd about a file, an extension that does not fit its content,
    files of the same content, pictures that are nearly the same. A `Problem`'s place is the image;
    its text ends with the record's own place. Near `folder` lies on disk what would take much
    memory.
    """
    problems: list[Problem] = []
    for (record, _), look in zip(rows, looks, strict=True):
        where, place = record.file, f" ({record.where})"
        if look.error is not None:
            kind, what = look.error
            problems.append(Problem(where, what + place, "error", kind))
            continue
        for kind, what in (*look.remarks, *_misnamed(record, look)):
            problems.append(Problem(where, what + place, "warning", kind))
    good = np.fromiter((n for n, look in enumerate(looks) if look.error is None), np.int32)
    first_of = _first_of_content(looks, len(good))
    is_first = first_of == np.arange(len(good))
    repeated = zip(good[~is_first].tolist(), good[first_of[~is_first]].tolist(), strict=True)
    copies = [_copy(rows[number], rows[earlier]) for number, earlier in repeated]
    return problems + copies + _near_copies(rows, looks, good[is_first], folder)


def _misnamed(record: Record, look: Look) -> list[tuple[str, str]]:
    suffix = suffix_of(record.name)
    if look.format in FORMATS[suffix.lower()]:
        return []
    name = "JPEG" if look.format == "MPO" else look.format
    what = f"its content is {name}, its name ends in {suffix}; other programs may refuse it: rename"
    return [("content-extension", what)]


def _first_of_content(looks: Sequence[Look], count: int) -> Indices:
    """Of each good picture the first good one of the same content."""
    keys = (int(look.content[:16], 16) for look in looks if look.error is None)
    return runs(np.fromiter(keys, np.uint64, count))[1]


def _copy(row: Row, earlier: Row) -> Problem:
    """That a picture is one that came before."""
    (record, dataset), (first, first_data) = row, earlier
    same = f"the same image as {first.file} ({first.where}), byte for byte; "
    kind, why = _why(first_data.role, dataset.role, "it counts twice. Remove one")
    return Problem(record.file, f"{same}{why} ({record.where})", "warning", kind)


def _near_copies(
    rows: Sequence[Row], looks: Sequence[Look], different: Indices, folder: Path | None
) -> list[Problem]:
    hashes_N = np.empty(len(different), np.uint64)
    colours_NC = table((len(different), COLOURS * COLOURS * 3), np.uint8, folder)
    for place, number in enumerate(different.tolist()):
        look = looks[number]
        hashes_N[place] = look.pattern
        colours_NC[place] = np.frombuffer(bytes.fromhex(look.colours), np.uint8)
    problems = []
    for group in near_duplicates.groups(hashes_N, colours_NC):
        (record, _), *others = found = [rows[number] for number in different[group].tolist()]
        roles = {dataset.role for _, dataset in found}
        names = ", ".join(f"{shorten(other.name)} ({other.where})" for other, _ in
                          others[:_NAMED])  # fmt: skip
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        what = "what they show counts more often than the rest. Keep the best of them"
        held = "validation" in roles and len(roles) > 1
        _, why = _why("train", "validation" if held else "train", what)
        text = f"nearly the same picture as {names}{more}; {why} ({record.where})"
        problems.append(Problem(record.file, text, "warning", "near-duplicate"))
    return problems


def _why(role: str, other: str, usual: str) -> tuple[str, str]:
    """The kind of a copy, and why it is bad: what is learned cannot measure the learning."""
    if role != other and "validation" in (role, other):
        what = "one is learned and the other held out to measure what was learned. Remove one"
        return "held-out-copy", what
    return "duplicate-image", usual
