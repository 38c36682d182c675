"""Captions changed where they stand: every other byte of their file stays as it is.

Further columns and keys, the order of rows, quotes, blanks, line ends and a byte order mark are
kept. A cell of a CSV file that changes is written in quotes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from lora_scripts.data.csv_rows import CsvRow, csv_rows, quoted, split_row
from lora_scripts.data.folders import leads_out, stem_of
from lora_scripts.data.image_folder import CAPTION_SUFFIXES, list_folder
from lora_scripts.data.metadata import NAME_COLUMNS, READERS, TEXT_COLUMNS, Row
from lora_scripts.data.reading import Refused, is_unicode, read_file, show_path, unix_lines
from lora_scripts.errors import Problem, UserError, user_error

Edit = Callable[[str], str]
_BOM = "\ufeff"
_JSON_BLANKS = " \t\n\r"


@dataclass(frozen=True)
class Change:
    """One caption that changes: its place, and how it reads before and after."""

    where: str
    before: str
    after: str


@dataclass(frozen=True)
class FileEdit:
    """A file of captions as it is and as it shall be; both texts hold a BOM if the file has one.

    Attributes:
        captions: How many captions it holds, changed or not.
    """

    path: Path
    before: str
    after: str
    captions: int
    changes: list[Change]


def plan(path: Path, edit: Edit) -> list[FileEdit]:
    """What `edit` would do to the captions of a file, or of a folder. Nothing is written.

    Of a folder: `metadata.csv`, else `metadata.jsonl`, else the caption file beside each image.

    Raises:
        UserError: if there are no captions, or with every row and file that cannot be read.
    """
    if path.is_dir():
        usual = [path / "metadata.csv", path / "metadata.jsonl"]
        metadata = next((each for each in usual if each.is_file()), None)
        if metadata is not None and (why := leads_out(path, metadata.name, "file", "images")):
            raise user_error(show_path(metadata), why)
        return _plan_sidecars(path, edit) if metadata is None else [_plan_metadata(metadata, edit)]
    if path.suffix.lower() not in READERS or not path.is_file():
        what = "is no file of captions" if path.is_file() else "there is no such file or folder"
        expected = "expected a metadata.csv, a metadata.jsonl, or a folder of images"
        raise user_error(show_path(path), f"{what}; {expected}")
    return [_plan_metadata(path, edit)]


def _plan_metadata(path: Path, edit: Edit) -> FileEdit:
    text, mark = _text(path)
    rows = _rows(path, text)
    if not rows:
        raise user_error(show_path(path), "there is no row in it; expected one for each image")
    write = _csv_with if path.suffix.lower() == ".csv" else _jsonl_with
    changes = [Change(row.where, row.caption, edit(row.caption)) for row in rows]
    new = {change.where: change.after for change in changes if change.after != change.before}
    after = write(text, path.name, new)
    assert [row.caption for row in _rows(path, after)] == [c.after for c in changes], path
    changed = [change for change in changes if change.where in new]
    return FileEdit(path, mark + text, mark + after, len(rows), changed)


def _plan_sidecars(folder: Path, edit: Edit) -> list[FileEdit]:
    listing = list_folder(folder)
    problems = [problem for problem in listing.problems if problem.severity == "error"]
    keys = (stem_of(name) + suffix for name in listing.images for suffix in CAPTION_SUFFIXES)
    beside = dict.fromkeys(listing.captions[key] for key in keys if key in listing.captions)
    edits = []
    for name in beside:
        try:
            edits.append(_plan_sidecar(folder / name, name, edit))
        except UserError as error:
            problems += [Problem(name, problem.what) for problem in error.problems]
    if problems:
        raise UserError(problems)
    if not edits:
        what = "no captions found: no metadata.csv, no metadata.jsonl, no .txt beside an image"
        raise user_error(show_path(folder), what)
    return edits


def _plan_sidecar(path: Path, name: str, edit: Edit) -> FileEdit:
    text, mark = _text(path)
    caption = text.strip()
    before = unix_lines(caption)
    after = edit(before)
    change = Change(name, before, after)
    if after == before:
        return FileEdit(path, mark + text, mark + text, 1, [])
    start = len(text) - len(text.lstrip()) if caption else 0
    new = text[:start] + _line_ends_of(text, after) + text[start + len(caption) :]
    return FileEdit(path, mark + text, mark + new, 1, [change])


def _text(path: Path) -> tuple[str, str]:
    """A file's text, and its byte order mark or "". Raises `UserError`."""
    try:
        text = read_file(path)
        mark = _BOM if path.read_bytes().startswith(_BOM.encode()) else ""
    except (Refused, OSError) as error:
        raise user_error(show_path(path), str(error)) from None
    return text, mark


def _rows(path: Path, text: str) -> list[Row]:
    """The rows of a file's text. Raises `UserError` with every one that cannot be read."""
    rows, problems = [], []
    try:
        for row in READERS[path.suffix.lower()](text, path.name, None):
            if isinstance(row, Row):
                rows.append(row)
                if not is_unicode(row.caption):
                    what = "the caption holds a broken character (half of a surrogate pair)"
                    problems.append(Problem(row.where, what))
            elif row.severity == "error":
                problems.append(row)
    except Refused as refused:
        problems.append(refused.problem(path.name))
    if problems:
        raise UserError(problems)
    return rows


def _line_ends_of(text: str, caption: str) -> str:
    return caption.replace("\n", "\r\n") if "\r\n" in text else caption


def _line_number(where: str, file: str) -> int:
    return int(where.removeprefix(f"{file} line "))


# --- CSV ------------------------------------------------------------------------------------------


def _csv_with(text: str, file: str, new: dict[str, str]) -> str:
    """The text with other captions in the rows at these places."""
    found = [row for row in csv_rows(text, file, split_row) if isinstance(row, CsvRow)]
    titles = [cell.strip().lower() for cell in found[0].cells] if found else []
    title = next((title for title in TEXT_COLUMNS if title in titles), None)
    headed = title is not None and any(name in titles for name in NAME_COLUMNS)
    column = titles.index(title) if headed and title is not None else 1
    raws = {row.where: row.raw for row in found}
    starts = [0, *accumulate(len(line) for line in io.StringIO(text, newline=""))]
    parts, done = [], 0
    for where, caption in new.items():
        first = starts[_line_number(where, file) - 1]
        start, end = list(_cells(raws[where]))[column]
        parts += [text[done : first + start], quoted(_line_ends_of(raws[where], caption))]
        done = first + end
    return "".join([*parts, text[done:]])


def _cells(raw: str) -> Iterator[tuple[int, int]]:
    """Where each cell of a row begins and ends, its quotes with it, blanks before it not."""
    at = 0
    while True:
        while raw[at : at + 1] == " ":
            at += 1
        start = at
        if raw[at : at + 1] == '"':
            at += 1
            while raw[at] != '"' or raw[at + 1 : at + 2] == '"':
                at += 2 if raw[at] == '"' else 1
            at += 1
        while at < len(raw) and raw[at] not in ",\r\n":
            at += 1
        yield start, at
        if raw[at : at + 1] != ",":
            return
        at += 1


# --- JSON lines -----------------------------------------------------------------------------------


def _jsonl_with(text: str, file: str, new: dict[str, str]) -> str:
    lines = text.split("\n")
    for where, caption in new.items():
        at = _line_number(where, file) - 1
        lines[at] = _json_line_with(lines[at], caption)
    return "\n".join(lines)


def _json_line_with(line: str, caption: str) -> str:
    """An object's line with another caption; its other keys and its blanks as they stand."""
    spans = dict(_values(line))
    start, end = next(spans[key] for key in TEXT_COLUMNS if key in spans)
    escaped = line[start:end].isascii() and not json.loads(line[start:end]).isascii()
    return line[:start] + json.dumps(caption, ensure_ascii=escaped) + line[end:]


def _values(line: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """The keys of the object in a line, and where the value of each begins and ends."""
    decoder = json.JSONDecoder()
    at = line.index("{") + 1
    while (at := _past_blanks(line, at)) < len(line) and line[at] == '"':
        key, at = decoder.raw_decode(line, at)
        start = _past_blanks(line, _past_blanks(line, at) + 1)  # past the colon
        _, end = decoder.raw_decode(line, start)
        yield key, (start, end)
        at = _past_blanks(line, end) + 1  # past the comma


def _past_blanks(line: str, at: int) -> int:
    while at < len(line) and line[at] in _JSON_BLANKS:
        at += 1
    return at
