"""Text training data: conversations and raw texts, read from files into `TextRecord`s.

Read are `.jsonl`, `.json` (a list of objects), `.csv` and `.parquet` files of rows, and `.txt` and
`.md` files, each of them one raw text. A row is a conversation as OpenAI, ShareGPT or Alpaca write
it, a question with its answer, or a raw text. Whatever is wrong becomes a `Problem` that names the
file, the row and the field; nothing is repaired, and one bad row does not hide the next.

Here are the files and the records; `rows` reads the kinds of file, `forms` tells by its fields what
form a row has, `turns` reads and checks the messages, `saying` holds the words for what is wrong,
`store` keeps the records.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath

from lora_scripts.data.conversations import forms, rows
from lora_scripts.data.conversations.saying import Findings, checked, nearest
from lora_scripts.data.conversations.store import TextRecord, TextRecords, content_of
from lora_scripts.data.folders import link_problem, refuse_link, walk_files
from lora_scripts.data.reading import Refused, count, is_unicode, read_file, show, show_path
from lora_scripts.errors import Problem

__all__ = ["TextRecord", "TextRecords", "Texts", "content_of", "read_texts"]

DATA_SUFFIXES = rows.SUFFIXES
RAW_SUFFIXES = (".txt", ".md")

_KINDS = ", ".join((*DATA_SUFFIXES, *RAW_SUFFIXES))
_USUAL = ("metadata.csv", "metadata.jsonl")
_RAW_FORM = "raw text files"
_NAMED = 10  # so many unused fields are named


@dataclass(frozen=True)
class Texts:
    """What was read.

    Attributes:
        records: Those that are good, in the order of the files and their rows.
        problems: All that was found. With one of severity "error" the records are incomplete.
        forms: How many records each form gave, for the log: `{"OpenAI messages": 120}`.
    """

    records: TextRecords
    problems: list[Problem]
    forms: dict[str, int]


@dataclass
class _Folder:
    """What lies in the folder of texts. Names are relative to it, with forward slashes."""

    path: Path
    data: list[str] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass
class _Reading:
    """What has been read so far. `root` is where the files that rows name are looked for."""

    root: Path
    records: TextRecords
    problems: list[Problem] = field(default_factory=list)
    forms: Counter[str] = field(default_factory=Counter)
    named: set[str] = field(default_factory=set)  # files that a row's file_name has asked for

    def done(self, path: Path) -> Texts:
        if not self.records and all(p.severity != "error" for p in self.problems):
            what = "nothing to learn is in it: what was found is empty"
            self.problems.append(Problem(show_path(path), what))
        return Texts(self.records, self.problems, dict(self.forms))


def read_texts(path: Path, metadata_path: Path | None, spool_dir: Path | None = None) -> Texts:
    """Read the texts of a file or a folder; what was read lies on disk, near `spool_dir`.

    Of a folder are read: `metadata_path`; when that is None, `metadata.csv`, else
    `metadata.jsonl`, else every data file in it (`.jsonl`, `.json`, `.csv`, `.parquet`), else
    every `.txt` and `.md` file. Sub-folders are included, names that begin with a dot are not;
    files come in the order of their names.

    Line ends become Unix line ends, content parts are joined by a line break, and the JSON texts
    of tools and arguments are parsed; every other character stays as it is.
    """
    if not path.is_dir():
        return _read_one(path, metadata_path, TextRecords(spool_dir))
    listing = _list_folder(path)
    reading = _Reading(path, TextRecords(spool_dir), listing.problems)
    try:
        metadata = _choose_metadata(path, metadata_path)
    except Refused as refused:
        reading.problems.append(Problem(show_path(metadata_path or path), str(refused)))
        return reading.done(path)
    if metadata is not None:
        _read_data(reading, metadata, metadata.name)
        _note_unread(reading, listing, metadata)
    elif listing.data:
        for name in listing.data:
            _read_data(reading, path / name, name)
        _note_unread(reading, listing, None)
    else:
        for name in listing.raw:
            _read_raw(reading, path / name, name)
        if not listing.raw and not any(p.severity == "error" for p in listing.problems):
            what = f"no text data found; expected files in {_KINDS}"
            reading.problems.append(Problem(show_path(path), what))
    return reading.done(path)


# --- which files are read -------------------------------------------------------------------------


def _read_one(path: Path, metadata_path: Path | None, records: TextRecords) -> Texts:
    reading = _Reading(path.parent, records)
    suffix = path.suffix.lower()
    if not path.is_file():
        what = f"there is no such file or folder; expected a folder, or a file in {_KINDS}"
        reading.problems.append(Problem(show_path(path), what))
    elif metadata_path is not None:
        what = "this is a file; a metadata_path goes with a folder. Leave one of them out"
        reading.problems.append(Problem(show_path(path), what))
    elif suffix in DATA_SUFFIXES:
        _read_data(reading, path, path.name)
    elif suffix in RAW_SUFFIXES:
        _read_raw(reading, path, path.name)
    else:
        found = show(path.suffix) if path.suffix else "none"
        what = f"extension {found}, expected one of {_KINDS}"
        reading.problems.append(Problem(show_path(path), what))
    return reading.done(path)


def _list_folder(folder: Path) -> _Folder:
    """Walk the folder once, in the order of names, links to folders not followed."""
    listing = _Folder(folder)
    others: list[str] = []
    for name in walk_files(folder, "files", listing.problems):
        suffix = PurePosixPath(name).suffix.lower()
        if suffix not in (*DATA_SUFFIXES, *RAW_SUFFIXES):
            others.append(name)
        elif (why := _unusable(folder, name)) is not None:
            listing.problems.append(Problem(show(name), why))
        else:
            (listing.data if suffix in DATA_SUFFIXES else listing.raw).append(name)
    if others:
        what = f"{count(others, 'file')} of a kind that is not read; read are {_KINDS}"
        listing.problems.append(Problem(show_path(folder), what, "warning"))
    return listing


def _unusable(folder: Path, name: str) -> str | None:
    if not is_unicode(name):
        return "the file name is not valid UTF-8; rename the file"
    return link_problem(folder, folder / name, thing="file", home="the folder")


def _choose_metadata(folder: Path, metadata_path: Path | None) -> Path | None:
    """The one data file to read, or None for all that are there."""
    if metadata_path is None:
        found = next((folder / name for name in _USUAL if (folder / name).is_file()), None)
        if found is not None:
            refuse_link(folder, found, "texts")
        return found
    if not metadata_path.is_file():
        raise Refused("there is no such file; leave metadata_path out to read all in the folder")
    if metadata_path.suffix.lower() not in DATA_SUFFIXES:
        raise Refused(f"expected a data file, one of {', '.join(DATA_SUFFIXES)}")
    return metadata_path


def _note_unread(reading: _Reading, listing: _Folder, metadata: Path | None) -> None:
    """Name the files that could have been read, and why they were not."""
    raw = [name for name in listing.raw if name not in reading.named]
    data = [] if metadata is None else [n for n in listing.data if listing.path / n != metadata]
    if not raw and not data:
        return
    read = metadata.name if metadata is not None else count(listing.data, "file")
    what = f"{count([*data, *raw], 'file')} in the folder not read: the data is in {read}"
    reading.problems.append(Problem(show_path(listing.path), what, "warning"))


# --- what is in them ------------------------------------------------------------------------------


def _read_raw(reading: _Reading, path: Path, name: str) -> None:
    findings = Findings(name)
    try:
        text = checked(read_file(path), "it", findings)
    except Refused as refused:
        findings.refuse(str(refused))
    else:
        if text.strip():
            reading.records.add(TextRecord(name, text=text))
            reading.forms[_RAW_FORM] += 1
        else:
            findings.remark("the file is empty; it is passed over")
    reading.problems += findings.problems


def _read_data(reading: _Reading, path: Path, name: str) -> None:
    unused: dict[str, tuple[str, ...]] = {}
    is_empty = True
    try:
        for row in rows.read_rows(path, name):
            is_empty = False
            if isinstance(row, Problem):
                reading.problems.append(row)
            else:
                unused |= _read_row(reading, row)
    except Refused as refused:
        reading.problems.append(Problem(name, str(refused)))
        return
    if is_empty:
        what = "there is no row in it; expected one for each conversation or text"
        reading.problems.append(Problem(name, what))
    if unused:
        said = [_unused(field, known) for field, known in islice(unused.items(), _NAMED)]
        more = f" and {len(unused) - _NAMED} more" if len(unused) > _NAMED else ""
        reading.problems.append(Problem(name, f"not used: {', '.join(said)}{more}", "warning"))


def _unused(field: str, known: Sequence[str]) -> str:
    near = nearest(field, known)
    return f'{show(field)} (did you mean "{near}"?)' if near else show(field)


def _read_row(reading: _Reading, row: rows.Row) -> dict[str, tuple[str, ...]]:
    """Add the row to the reading; returns the fields that were not used."""
    findings = Findings(row.where)
    content = forms.read_row(row.fields, lambda name: _named_file(reading, name), findings)
    if content is not None:
        try:
            reading.records.add(
                TextRecord(row.where, content.messages, content.tools, content.text)
            )
            reading.forms[row.form or content.form.name] += 1
        except Refused as refused:
            findings.refuse(str(refused))
    reading.problems += findings.problems
    return findings.unused


def _named_file(reading: _Reading, typed: str) -> str:
    """The text of the file that a row's `file_name` means. Raises `Refused`."""
    name = PurePosixPath(typed.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or re.match(r"[A-Za-z]:", str(name)):
        raise Refused(f'"file_name": {show(typed)} leaves the folder; expected a name in it')
    if name.suffix.lower() not in RAW_SUFFIXES:
        kinds = " or ".join(RAW_SUFFIXES)
        what = f"expected a {kinds} file, which holds the prompt (pictures go with the task_type"
        raise Refused(f'"file_name": {show(typed)}: {what} image-generation)')
    path = reading.root / name
    try:
        is_there = path.is_file()
    except OSError as error:  # a name too long
        raise Refused(f'"file_name": {show(typed)}: {error.strerror}') from None
    if not is_there:
        what = f"there is no such file in {show_path(reading.root)}; it would hold the prompt"
        raise Refused(f'"file_name": {show(typed)}: {what}')
    if (why := _unusable(reading.root, str(name))) is not None:
        raise Refused(f'"file_name": {show(typed)}: {why}')
    reading.named.add(str(name))
    try:
        return read_file(path)
    except Refused as refused:
        raise Refused(f'"file_name": {show(typed)}: {refused}') from None
