"""The files that captions are written to, with all that a person has put into them.

`metadata.csv`, `metadata.jsonl`, or a `.txt` file beside each image. Whatever is in such a file
stays: rows keep their order and their further columns, and a row that is not changed keeps its
bytes. A file that cannot be read without a problem is refused, not replaced.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from lora_scripts.data.csv_rows import CsvRow, csv_rows, quoted, split_row
from lora_scripts.data.folders import stem_of
from lora_scripts.data.image_folder import CAPTION_SUFFIXES, ImageFolder
from lora_scripts.data.metadata import NAME_COLUMNS, READERS, TEXT_COLUMNS, Row
from lora_scripts.data.reading import Refused, is_unicode, read_file, show, unix_lines
from lora_scripts.data.records import write_csv
from lora_scripts.errors import Problem, UserError
from lora_scripts.files import write_text

FORMATS = ("csv", "jsonl", "txt")
_BOM = "\ufeff"


class CaptionsFile(Protocol):
    """Where captions are stored: one file for all, or one beside each image."""

    @property
    def place(self) -> str:
        """What the user is told: a file, or files of a folder."""
        ...

    def read(self) -> dict[str, str]:
        """The captions that are there, by `key` of the image's name; blank ones, too.

        Raises:
            UserError: with everything that cannot be read.
        """
        ...

    def write(self, captions: Mapping[str, str], *, overwrite: bool) -> None:
        """Store captions by the image's name; what is there and not blank stays.

        Args:
            captions: The image's name -> its caption.
            overwrite: These captions take the place of those that are there.

        Raises:
            UserError: if what is there cannot be read. OSError: if it cannot be written.
        """
        ...


def key(name: str) -> str:
    """What is the same for all spellings of an image's name: slashes, `./`, composed letters."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name.replace("\\", "/"))))


def captions_file(format: str, listing: ImageFolder, path: Path) -> CaptionsFile:
    """The file (or files) of this format; `path` is not used by txt."""
    match format:
        case "csv":
            return CsvFile(path)
        case "jsonl":
            return JsonLinesFile(path)
        case "txt":
            return TextFiles(listing)
        case _:
            raise ValueError(f"format {format!r}")


# --- metadata.csv -------------------------------------------------------------------------------


@dataclass(frozen=True)
class CsvFile:
    """`metadata.csv`, with or without a header, with further columns or not."""

    path: Path

    @property
    def place(self) -> str:
        return str(self.path)

    def read(self) -> dict[str, str]:
        return _read(self.path)

    def write(self, captions: Mapping[str, str], *, overwrite: bool) -> None:
        text = _text(self.path) if self.path.exists() else ""
        if not text.strip():
            write_csv(self.path, captions.items())
            return
        rows = _rows(self.path, text)
        raws = [row for row in csv_rows(text, self.path.name, split_row) if isinstance(row, CsvRow)]
        header = raws[: len(raws) - len(rows)]
        name_at, text_at, width = _columns(header)
        end = "\r\n" if raws[0].raw.endswith("\r\n") else "\n"

        def line(cells: Sequence[str], caption: str) -> str:
            return ",".join(
                quoted(caption) if at == text_at else _cell(cell) for at, cell in enumerate(cells)
            )

        lines = [row.raw.rstrip("\r\n") for row in header]
        changes = _new_captions(rows, captions, overwrite=overwrite)
        for raw, new in zip(raws[len(header) :], changes, strict=True):
            lines.append(raw.raw.rstrip("\r\n") if new is None else line(raw.cells, new))
        for name, caption in _added(rows, captions):
            cells = [name if at == name_at else "" for at in range(width)]
            lines.append(line(cells, caption))
        mark = _BOM if self.path.read_bytes().startswith(_BOM.encode()) else ""
        write_text(self.path, mark + "".join(text + end for text in lines))


def _columns(header: Sequence[CsvRow]) -> tuple[int, int, int]:
    """Where the name and the caption stand, and how many columns there are."""
    if not header:
        return 0, 1, 2
    titles = [cell.strip().lower() for cell in header[0].cells]
    name_at = next(titles.index(title) for title in NAME_COLUMNS if title in titles)
    text_at = next(titles.index(title) for title in TEXT_COLUMNS if title in titles)
    return name_at, text_at, len(titles)


def _cell(text: str) -> str:
    bare = text == text.strip() and not any(mark in text for mark in '",\r\n')
    return text if bare else quoted(text)


# --- metadata.jsonl -----------------------------------------------------------------------------


@dataclass(frozen=True)
class JsonLinesFile:
    """`metadata.jsonl`: an object a line, with further keys or not."""

    path: Path

    @property
    def place(self) -> str:
        return str(self.path)

    def read(self) -> dict[str, str]:
        return _read(self.path)

    def write(self, captions: Mapping[str, str], *, overwrite: bool) -> None:
        text = _text(self.path) if self.path.exists() else ""
        rows = _rows(self.path, text)
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        names = (NAME_COLUMNS[0], TEXT_COLUMNS[0])
        for at, new in enumerate(_new_captions(rows, captions, overwrite=overwrite)):
            found = json.loads(lines[at])
            names = _json_keys(found) if at == 0 else names
            if new is not None:
                lines[at] = _json({**found, _json_keys(found)[1]: new})
        for name, caption in _added(rows, captions):
            lines.append(_json({names[0]: name, names[1]: caption}))
        write_text(self.path, "".join(f"{line}\n" for line in lines))


def _json_keys(found: Mapping[str, object]) -> tuple[str, str]:
    """The keys that hold name and caption; `READERS` has seen that both are there."""
    name = next(title for title in NAME_COLUMNS if title in found)
    return name, next(title for title in TEXT_COLUMNS if title in found)


def _json(row: Mapping[str, object]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    return text if is_unicode(text) else json.dumps(row)


# --- what both have in common -------------------------------------------------------------------


def _read(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    return {key(row.name): row.caption for row in _rows(path, _text(path))}


def _text(path: Path) -> str:
    try:
        return read_file(path)
    except Refused as refused:
        raise UserError([Problem(str(path), _left_alone(str(refused)))]) from None


def _rows(path: Path, text: str) -> list[Row]:
    """The rows of a file's text.

    Raises:
        UserError: naming every row that cannot be read, and every image named twice.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    try:
        for row in READERS[path.suffix.lower()](text, path.name):
            if isinstance(row, Row):
                rows.append(row)
            elif row.severity == "error":
                problems.append(row)
    except Refused as refused:
        problems.append(Problem(path.name, str(refused)))
    problems += _named_twice(rows)
    if problems:
        raise UserError([Problem(each.where, _left_alone(each.what)) for each in problems])
    return rows


def _named_twice(rows: Iterable[Row]) -> Iterator[Problem]:
    first: dict[str, Row] = {}
    for row in rows:
        earlier = first.setdefault(key(row.name), row)
        if earlier is not row:
            what = f"{show(row.name)} was already named in {earlier.where}; keep one row"
            yield Problem(row.where, what)


def _left_alone(what: str) -> str:
    return f"{what}. Mend it first: what is in it is not overwritten unread"


def _new_captions(
    rows: Iterable[Row], captions: Mapping[str, str], *, overwrite: bool
) -> Iterator[str | None]:
    """The caption that each row gets, or None if it stays as it is."""
    by_key = {key(name): caption for name, caption in captions.items()}
    for row in rows:
        yield by_key.get(key(row.name)) if overwrite or not row.caption.strip() else None


def _added(rows: Iterable[Row], captions: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    there = {key(row.name) for row in rows}
    return ((name, text) for name, text in captions.items() if key(name) not in there)


# --- .txt files -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextFiles:
    """A `.txt` file beside each image; a `.caption` file that is there counts as one."""

    listing: ImageFolder

    @property
    def place(self) -> str:
        return f"a .txt file beside each image of {self.listing.path}"

    def read(self) -> dict[str, str]:
        captions: dict[str, str] = {}
        problems = list(self._shared())
        for name in self.listing.images:
            if (beside := self._beside(name)) is None:
                continue
            try:
                captions[key(name)] = unix_lines(read_file(beside)).strip()
            except Refused as refused:
                problems.append(Problem(str(beside), _left_alone(str(refused))))
        if problems:
            raise UserError(problems)
        return captions

    def write(self, captions: Mapping[str, str], *, overwrite: bool) -> None:
        there = self.read()
        for name, caption in captions.items():
            if overwrite or not there.get(key(name), "").strip():
                path = self._beside(name) or self.listing.path / f"{stem_of(name)}.txt"
                write_text(path, caption)

    def _beside(self, name: str) -> Path | None:
        """The file that holds the caption of an image now."""
        paths = [self.listing.path / f"{stem_of(name)}{suffix}" for suffix in CAPTION_SUFFIXES]
        listed = (self.listing.captions.get(stem_of(name) + suffix) for suffix in CAPTION_SUFFIXES)
        found = [self.listing.path / each for each in listed if each is not None]
        return next((path for path in [*found, *paths] if path.is_file()), None)

    def _shared(self) -> Iterator[Problem]:
        """Images of one name but for the extension, which would have one caption between them."""
        first: dict[str, str] = {}
        for name in self.listing.images:
            earlier = first.setdefault(stem_of(name), name)
            if earlier != name:
                what = (
                    f"shares {stem_of(name)}.txt with {show(earlier)}; rename one of them, or "
                    "write one file for all with --format csv"
                )
                yield Problem(show(name), what)
