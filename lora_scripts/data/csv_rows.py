"""CSV texts, row by row, with the line that each row begins in. What its cells mean is not asked.

A comma stands between cells, and a quote inside a quoted cell is written twice. What a row must be
besides, and what the user is told of one that is broken, its reader says: a `SplitRow`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from lora_scripts.data.reading import Refused
from lora_scripts.errors import Problem

# The cells of the row that begins at lines[at], and how many lines it takes; raises Refused
SplitRow = Callable[[Sequence[str], int], tuple[list[str], int]]


class CsvRow(NamedTuple):
    """A row that is not blank: its place, its cells, and its text as it stands in the file."""

    where: str
    cells: list[str]
    raw: str


def csv_rows(text: str, file: str, split: SplitRow) -> Iterator[CsvRow | Problem]:
    """The rows of a CSV text. A row that fails is reported, and reading goes on one line below."""
    lines = list(io.StringIO(text, newline=""))
    at = 0
    while at < len(lines):
        where = f"{file} line {at + 1}"
        try:
            cells, taken = split(lines, at)
        except Refused as refused:
            yield refused.problem(where)
            at += 1
            continue
        raw = "".join(lines[at : at + taken])
        at += taken
        if raw.strip():
            yield CsvRow(where, cells, raw)


def split_row(lines: Sequence[str], at: int) -> tuple[list[str], int]:
    """The cells of the row that begins at `lines[at]`, and how many lines it takes.

    Raises:
        csv.Error: if a quote stands where none may, or is never closed, or a cell is too long.
    """
    rest = (lines[i] for i in range(at, len(lines)))
    reader = csv.reader(rest, strict=True, skipinitialspace=True)
    cells = next(reader)
    return cells, reader.line_num


def has_odd_quotes(lines: Sequence[str]) -> bool:
    """True if a quote in these lines has no partner, which Python's reader does not always see."""
    return sum(line.count('"') for line in lines) % 2 == 1


def quoted(text: str) -> str:
    """The text as a cell in quotes."""
    return '"' + text.replace('"', '""') + '"'
