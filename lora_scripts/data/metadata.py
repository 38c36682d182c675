"""The rows of `metadata.csv` and `metadata.jsonl`: an image's name and its caption.

Columns and keys are found by their titles; those that are not known are named in a warning.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lora_scripts.data.csv_rows import csv_rows, has_odd_quotes, quoted, split_row
from lora_scripts.data.reading import Refused, kind, plain, shorten, show, unix_lines
from lora_scripts.errors import Problem

NAME_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path")
TEXT_COLUMNS = ("text", "caption", "prompt")

_IMAGE_ROW = re.compile(r'[^",\r\n]+\.(?:png|jpe?g|webp|bmp)[ \t]*,', re.IGNORECASE)
_JSON_EXAMPLE = '{"file_name": "img01.jpg", "text": "a caption"}'


class Row(NamedTuple):
    """A row that could be read, before its name is looked up in the folder."""

    where: str
    name: str
    caption: str
    others: tuple[str, ...] = ()  # captions of further columns


# --- CSV ------------------------------------------------------------------------------------------


def _csv_rows(
    text: str, file: str, caption_keys: Sequence[str] | None = None
) -> Iterator[Row | Problem]:
    name_at, texts_at, width = 0, [1], 2
    first = True
    for row in csv_rows(text, file, _split_row):
        if isinstance(row, Problem):
            yield row
            first = False
            continue
        where, fields, raw = row
        columns = [column.strip().lower() for column in fields]
        header = _header(columns, caption_keys) if first else None
        if header is not None:
            name_at, texts_at = header
            width = len(columns)
            used = {name_at, *texts_at}
            yield from _unused_columns(where, [columns[i] for i in range(width) if i not in used])
        elif len(fields) != width:
            yield Problem(where, _wrong_width(fields, raw.strip("\r\n"), width), "error", "fields")
        else:
            caption, *others = (unix_lines(fields[at]) for at in texts_at)
            yield Row(where, fields[name_at], caption, tuple(others))
        first = False


def _split_row(lines: Sequence[str], at: int) -> tuple[list[str], int]:
    try:
        fields, taken = split_row(lines, at)
    except csv.Error:
        raise Refused(_unbalanced(lines[at]), "quotes") from None
    for below in range(at + 1, at + taken):
        if _IMAGE_ROW.match(lines[below]):
            what = f"a quote opens here and is still open in line {below + 1}, where"
            what = f"{what} {show(lines[below].strip())} seems to begin a new row"
            raise Refused(what, "quotes")
    if has_odd_quotes(lines[at : at + taken]):
        raise Refused(_unbalanced(lines[at]), "quotes")
    return fields, taken


def _header(
    columns: Sequence[str], caption_keys: Sequence[str] | None
) -> tuple[int, list[int]] | None:
    """Where the name and the captions stand, if these are the titles of columns.

    Raises:
        Refused: if a column of `caption_keys` is not there.
    """
    name = next((columns.index(title) for title in NAME_COLUMNS if title in columns), None)
    if caption_keys is not None:
        missing = [key for key in caption_keys if key.strip().lower() not in columns]
        if name is None or missing:
            lacks = show(missing[0]) if missing else "of file names"
            has = ", ".join(show(column) for column in columns)
            what = f"no column {lacks}, which caption_keys needs; its first line: {has}"
            raise Refused(what, "caption-column")
        return name, [columns.index(key.strip().lower()) for key in caption_keys]
    text = next((columns.index(title) for title in TEXT_COLUMNS if title in columns), None)
    return None if name is None or text is None else (name, [text])


def _unused_columns(where: str, names: Sequence[str]) -> list[Problem]:
    if not names:
        return []
    what = f"not used: {', '.join(show(name) for name in names)} (read: file name and caption)"
    return [Problem(where, what, "warning", "unused-columns")]


def _unbalanced(line: str) -> str:
    name, _, caption = line.strip().partition(",")
    example = quoted(shorten(caption.strip().strip('"').replace('""', '"'), 40))
    return (
        f"unbalanced quotes in {show(line.strip())}; a caption that begins with a quote ends with "
        f"one, and a quote inside it is written twice: {plain(name)},{example}"
    )


def _wrong_width(fields: Sequence[str], raw: str, width: int) -> str:
    found = f"{len(fields)} field{'s' if len(fields) != 1 else ''} found, expected {width}"
    if width != 2:
        return f"{found} as in the header; a field that holds a comma needs quotes"
    if len(fields) == 1:
        for mark, name in ((";", "a semicolon"), ("\t", "a tab"), ("，", "a full-width comma")):
            if mark in raw:
                return f"{found}; file name and caption are separated by a comma, found {name}"
        return f'{found}; expected the file name, a comma, the caption: {plain(raw)},"a caption"'
    name, _, caption = raw.partition(",")
    example = quoted(shorten(caption.strip().replace('"', ""), 60))
    curly = " (straight quotes, not “ ”)" if "“" in raw or "”" in raw else ""
    return f"{found}; a caption that holds a comma needs quotes{curly}: {plain(name)},{example}"


# --- JSON lines -----------------------------------------------------------------------------------


def _jsonl_rows(
    text: str, file: str, caption_keys: Sequence[str] | None = None
) -> Iterator[Row | Problem]:
    if text.lstrip().startswith("["):
        what = f"this is one JSON list; expected one object a line: {_JSON_EXAMPLE}"
        raise Refused(what, "json")
    unused: dict[str, None] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            row, others = _json_row(line, where, caption_keys)
        except Refused as refused:
            yield refused.problem(where)
            continue
        yield row
        unused.update(dict.fromkeys(others))
    yield from _unused_columns(file, list(unused))


def _json_row(line: str, where: str, caption_keys: Sequence[str] | None) -> tuple[Row, list[str]]:
    """The row in one line, and the names of the keys that are not used."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        place = f"{error.msg} at column {error.colno}"
        raise Refused(f"not valid JSON ({place}); expected {_JSON_EXAMPLE}", "json") from None
    except (ValueError, RecursionError):
        raise Refused(f"not usable as JSON; expected {_JSON_EXAMPLE}", "json") from None
    if not isinstance(found, dict):
        raise Refused(f"found {kind(found)}; expected an object: {_JSON_EXAMPLE}", "fields")
    keys = [next((key for key in NAME_COLUMNS if key in found), NAME_COLUMNS[0])]
    usual = next((key for key in TEXT_COLUMNS if key in found), TEXT_COLUMNS[0])
    keys += [usual] if caption_keys is None else caption_keys
    for key in keys:
        if key not in found:
            has = ", ".join(show(name) for name in found) or "no key"
            raise Refused(f'no "{key}"; found {has}; expected {_JSON_EXAMPLE}', "fields")
        if not isinstance(found[key], str):
            what = f'"{key}" is {kind(found[key])}; expected a text in quotes'
            raise Refused(what, "fields")
    caption, *others = (unix_lines(found[key]) for key in keys[1:])
    row = Row(where, found[keys[0]], caption, tuple(others))
    return row, [key for key in found if key not in keys]


READERS = {".csv": _csv_rows, ".jsonl": _jsonl_rows}  # each may raise `Refused`
