"""The kinds of data file, read into rows: a place and named fields. What they mean is not asked.

An empty cell of a CSV file is a field that the row does not have, unless the header's form needs
it; a null in Parquet is one at any depth.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_scripts.data.conversations import forms
from lora_scripts.data.conversations.saying import listed, nearest, parse_json
from lora_scripts.data.csv_rows import csv_rows, has_odd_quotes, split_row
from lora_scripts.data.reading import Refused, kind, read_file, read_lines, show
from lora_scripts.errors import Problem

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

_EXAMPLE = '{"prompt": "a question", "completion": "the answer"}'
_LONGEST_CELL = 1 << 24  # characters; Python's own limit of 131,072 is less than a chapter
_TITLE = re.compile(r"[^\W\d][\w -]{0,29}")
_MARKS = ((";", "semicolons"), ("\t", "tabs"), ("，", "full-width commas"))


class Row(NamedTuple):
    """One row. `form` says how it was read where the fields do not: a CSV file without header."""

    where: str
    fields: Mapping[str, Any]
    form: str = ""


def read_rows(path: Path, name: str) -> Iterator[Row | Problem]:
    """The rows of a data file, in order; a `Problem` for each that cannot be read.

    Args:
        path: The file; its suffix (one of `SUFFIXES`) says what kind it is.
        name: What the places of rows and problems begin with.

    Raises:
        Refused: if the file as a whole cannot be read.
    """
    match path.suffix.lower():
        case ".jsonl":
            return _jsonl_rows(path, name)
        case ".json":
            return _json_rows(read_file(path), name)
        case ".csv":
            return iter(_csv_rows(read_file(path), name))
        case ".parquet":
            return _parquet_rows(path, name)
        case suffix:
            raise AssertionError(suffix)


# --- JSON -----------------------------------------------------------------------------------------


def _jsonl_rows(path: Path, name: str) -> Iterator[Row | Problem]:
    first = next((line.strip() for line in read_lines(path) if line.strip()), "")
    if first.startswith("["):
        raise Refused("this is one JSON list; rename it to .json, or write one object a line")
    if first == "{":
        raise Refused(f"an object takes several lines; expected one object a line: {_EXAMPLE}")
    return _lines(read_lines(path), name)


def _lines(lines: Iterable[str], name: str) -> Iterator[Row | Problem]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            yield _object_row(where, parse_json(line))
        except Refused as refused:
            yield Problem(where, f"{refused}; expected one object a line: {_EXAMPLE}")


def _object_row(where: str, found: Any) -> Row:
    if not isinstance(found, dict):
        raise Refused(f"found {kind(found)}")
    return Row(where, found)


def _json_rows(text: str, name: str) -> Iterator[Row | Problem]:
    if not text.strip():
        return iter(())
    try:
        found = parse_json(text)
    except Refused as refused:
        if "Extra data" in str(refused):
            what = "one JSON value behind another; if it is one object a line, rename it to .jsonl"
            raise Refused(f"{refused}: {what}") from None
        raise Refused(f"{refused}; expected a list of objects: [{_EXAMPLE}]") from None
    if isinstance(found, dict) and isinstance(found.get("data"), list):
        found = found["data"]
    if not isinstance(found, list):
        keys = f" with {listed(found)}" if isinstance(found, dict) else ""
        raise Refused(
            f"found {kind(found)}{keys}; expected a list of objects: [{_EXAMPLE}], or the list "
            'under the key "data"'
        )
    return _items(found, name)


def _items(items: Sequence[Any], name: str) -> Iterator[Row | Problem]:
    for number, item in enumerate(items, start=1):
        where = f"{name} row {number}"
        try:
            yield _object_row(where, item)
        except Refused as refused:
            yield Problem(where, f"{refused}; expected an object: {_EXAMPLE}")


# --- CSV ------------------------------------------------------------------------------------------


def _csv_rows(text: str, name: str) -> list[Row | Problem]:
    """All rows at once: the limit on a cell's length is Python's global one while they are read."""
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        return list(_read_csv(text, name))
    finally:
        csv.field_size_limit(before)


def _read_csv(text: str, name: str) -> Iterator[Row | Problem]:
    columns: _Columns | None = None
    for row in csv_rows(text, name, _split_row):
        if isinstance(row, Problem):
            yield row
            continue
        where, cells, raw = row
        if columns is None:
            try:
                columns = _columns(cells, raw)
            except Refused as refused:
                yield Problem(where, str(refused))
                return
            if columns.headed:
                continue
            if _like_titles(cells):
                what = f"{listed(cells)} is no known header; the line is read as a row"
                yield Problem(where, what, "warning")
        if len(cells) != len(columns.titles):
            yield Problem(where, _wrong_width(len(cells), columns))
        else:
            yield Row(where, columns.fields(cells), columns.form)


class _Columns(NamedTuple):
    """What the columns are called; `needs` are those of the header's form, empty or not."""

    titles: Sequence[str]
    needs: Sequence[str]
    headed: bool = True

    @property
    def form(self) -> str:
        return "" if self.headed else "prompt/completion (CSV without header)"

    def fields(self, cells: Sequence[str]) -> dict[str, str]:
        given = zip(self.titles, cells, strict=True)
        return {title: cell for title, cell in given if title and (cell or title in self.needs)}


def _columns(cells: Sequence[str], raw: str) -> _Columns:
    """The columns of a file that begins with these cells. Raises `Refused` if it says nothing."""
    titles = [cell.strip().lower() for cell in cells]
    if not _like_titles(cells) or not any(title in forms.KNOWN for title in titles):
        _check_headless(cells, raw)
        return _Columns(("prompt", "completion"), ("prompt", "completion"), headed=False)
    if twice := [title for title in titles if title and titles.count(title) > 1]:
        raise Refused(f"the column {show(twice[0])} stands twice in the header")
    form = next((form for form in forms.FORMS if set(form.needs) <= set(titles)), None)
    if form is None:
        strange = [title for title in titles if title not in forms.KNOWN]
        hints = [f'did you mean "{n}"? ' for title in strange if (n := _near(title))]
        what = f"this header fits no form; found {listed(titles)}; {''.join(hints[:1])}"
        raise Refused(what + forms.EXPECTED)
    return _Columns(titles, form.needs)


def _check_headless(cells: Sequence[str], raw: str) -> None:
    """Without a header there are two columns; said once, before every row says the same."""
    if len(cells) == 1 and (found := [name for mark, name in _MARKS if mark in raw]):
        raise Refused(f"cells are separated by commas, found {found[0]}")
    if len(cells) == 1 or (len(cells) > 2 and _like_titles(cells)):
        cells_found = f"{len(cells)} cell{'s' if len(cells) != 1 else ''} ({listed(cells)})"
        what = "expected two (prompt, completion), or a header of known names first"
        raise Refused(f"{cells_found} and no known header; {what}; {forms.EXPECTED}")


def _like_titles(cells: Sequence[str]) -> bool:
    """True if these may be titles of columns: short, and nothing like a sentence."""
    return all(_TITLE.fullmatch(cell.strip()) for cell in cells if cell.strip())


def _near(title: str) -> str:
    return nearest(title, forms.KNOWN)


def _split_row(lines: Sequence[str], at: int) -> tuple[list[str], int]:
    try:
        cells, taken = split_row(lines, at)
    except csv.Error as error:
        if "field larger" in str(error):
            what = f"a cell of more than {_LONGEST_CELL:,} characters, or a quote never closed"
            raise Refused(f"{what} in {show(lines[at].strip())}") from None
        raise Refused(_unbalanced(lines[at])) from None
    if has_odd_quotes(lines[at : at + taken]):
        raise Refused(_unbalanced(lines[at]))
    return cells, taken


def _unbalanced(line: str) -> str:
    return (
        f"unbalanced quotes in {show(line.strip())}; a cell that begins with a quote ends with "
        'one, and a quote inside it is written twice: a question,"say ""yes"", or no"'
    )


def _wrong_width(found: int, columns: _Columns) -> str:
    cells = f"{found} cell{'s' if found != 1 else ''} found, expected {len(columns.titles)}"
    as_in = "as in the header" if columns.headed else "(the prompt and the completion)"
    return f'{cells} {as_in}; a cell that holds a comma needs quotes: "one, two",three'


# --- Parquet --------------------------------------------------------------------------------------


def _parquet_rows(path: Path, name: str) -> Iterator[Row | Problem]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError:
        what = "Parquet files need pyarrow: pip install pyarrow"
        raise Refused(what) from None
    try:
        with parquet.ParquetFile(path) as file:
            items = (item for batch in file.iter_batches() for item in batch.to_pylist())
            for number, item in enumerate(items, start=1):
                yield Row(f"{name} row {number}", _without_nulls(item))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise Refused(f"the file cannot be read as Parquet ({reason})") from None


def _without_nulls(value: Any) -> Any:
    """Every record of a Parquet column has every key that one of them has, filled with nulls."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
