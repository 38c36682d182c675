"""A folder of images and its captions, read into `Record`s. The only file that knows the formats.

Three forms are read: `metadata.csv`, `metadata.jsonl`, and a `.txt` (or `.caption`) file beside
each image. Whatever is wrong becomes a `Problem` that names the file and the line; nothing is
repaired, and one bad row does not hide the next.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lora_scripts.errors import Problem

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_SUFFIXES = (".txt", ".caption")  # the first one found beside an image is its caption
NAME_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path")
TEXT_COLUMNS = ("text", "caption", "prompt")

_UNREAD_IMAGES = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jxl", ".psd", ".tif", ".tiff")
_KINDS = ", ".join(SUFFIXES)
_IMAGE_ROW = re.compile(r'[^",\r\n]+\.(?:png|jpe?g|webp|bmp)[ \t]*,', re.IGNORECASE)
_GUESSES = 20  # fuzzy matching costs milliseconds for each missing name in a large folder


@dataclass(frozen=True)
class Record:
    """One image and its caption. `where` is the place that says so: `metadata.csv line 45`."""

    path: Path
    caption: str
    where: str


class _Refused(Exception):
    """One row, file or name that cannot be used; the text is what the user is told."""


class _Row(NamedTuple):
    """A row that could be read, before its name is looked up in the folder."""

    where: str
    name: str
    caption: str


@dataclass
class _Folder:
    """What lies in the folder of images. Names are relative to it, with forward slashes."""

    path: Path
    images: list[str] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)  # with the suffix in lower case -> name
    refused: dict[str, str] = field(default_factory=dict)  # image -> why it is not used
    problems: list[Problem] = field(default_factory=list)


def read_images(folder: Path, metadata_path: Path | None) -> tuple[list[Record], list[Problem]]:
    """Read the images of `folder` with their captions.

    The captions come from `metadata_path` (`.csv` or `.jsonl`); when that is None, from
    `metadata.csv` in the folder, else from `metadata.jsonl`, else from the `.txt` or `.caption`
    file beside each image. Names in a metadata file are relative to `folder`; sub-folders are
    included, names that begin with a dot are not.

    Returns:
        The records that are good, in the order of the metadata file (or of their names), and
        every problem found. With a problem of severity "error" the records are incomplete.
    """
    listing = _list_folder(folder)
    problems = listing.problems
    if not listing.images and not listing.refused:
        if not any(problem.severity == "error" for problem in problems):
            problems.append(Problem(str(folder), f"no image found; expected files in {_KINDS}"))
        return [], problems
    try:
        metadata = _choose_metadata(folder, metadata_path)
    except _Refused as refused:
        return [], [*problems, Problem(_show_path(metadata_path or folder), str(refused))]
    if metadata is None:
        records, found = _read_sidecars(listing)
    else:
        records, found = _read_metadata(metadata, listing)
    return records, problems + found


def write_csv(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write (file name, caption) rows as a `metadata.csv` that `read_images` reads back.

    UTF-8, header `file_name,text`, captions always in quotes. The file is replaced in one step:
    a reader sees the old one or the new one, never a part.

    Raises:
        OSError: if the file cannot be written. UnicodeEncodeError: if a text holds half of a
            surrogate pair. The older file is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write("file_name,text\n")
            for name, caption in rows:
                plain = name == name.strip() and not any(mark in name for mark in '",\r\n')
                file.write(f"{name if plain else _quoted(name)},{_quoted(caption)}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# --- the folder ---------------------------------------------------------------------------------


def _list_folder(folder: Path) -> _Folder:
    """Walk the folder once, in the order of names, links to folders not followed."""
    listing = _Folder(folder)
    if not folder.is_dir():
        found = "this is a file" if folder.exists() else "there is no such folder"
        listing.problems.append(Problem(str(folder), f"{found}; expected the folder of images"))
        return listing
    unread: list[str] = []
    walk = os.walk(folder, onerror=lambda error: _note_unlisted(listing, error))
    for place, directories, files in walk:
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in directories:
            if (link := Path(place, name)).is_symlink():
                what = "is a link to another folder, which is not followed; copy its images in"
                listing.problems.append(Problem(_show_path(link), what, "warning"))
        for name in sorted(name for name in files if not name.startswith(".")):
            relative = Path(place, name).relative_to(folder).as_posix()
            suffix = PurePosixPath(name).suffix.lower()
            if suffix in SUFFIXES:
                _add_image(listing, relative)
            elif suffix in CAPTION_SUFFIXES:
                listing.captions[_stem(relative) + suffix] = relative
            elif suffix in _UNREAD_IMAGES:
                unread.append(relative)
    if unread:
        what = f"{_count(unread)} of a kind that is not read; save as PNG, JPEG or WebP to use"
        listing.problems.append(Problem(str(folder), what, "warning"))
    return listing


def _note_unlisted(listing: _Folder, error: OSError) -> None:
    what = f"this folder cannot be listed ({error.strerror})"
    listing.problems.append(Problem(_show_path(Path(error.filename)), what))


def _add_image(listing: _Folder, name: str) -> None:
    path = listing.path / name
    if not _is_unicode(name):
        listing.refused[name] = (
            "the file name is not valid UTF-8 (often from a zip made on a Chinese Windows); "
            "rename the file"
        )
    elif path.is_symlink() and (why := _link_problem(listing.path, path)):
        listing.refused[name] = why
    else:
        listing.images.append(name)


def _link_problem(folder: Path, link: Path) -> str | None:
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: how Python before 3.13 reports a loop
        return "this link leads nowhere; put the image itself in the folder"
    if not target.is_relative_to(folder.resolve()):
        return "this link leads out of the folder of images; put the image itself in the folder"
    return None


# --- which file holds the captions --------------------------------------------------------------


def _choose_metadata(folder: Path, metadata_path: Path | None) -> Path | None:
    """The metadata file to read, or None for caption files beside the images."""
    usual = [folder / "metadata.csv", folder / "metadata.jsonl"]
    if metadata_path is None:
        return next((path for path in usual if path.is_file()), None)
    if not metadata_path.is_file():
        raise _Refused(f"there is no such file. {_found_instead(metadata_path, usual)}")
    if metadata_path.suffix.lower() not in _READERS:
        raise _Refused("expected a .csv or a .jsonl file of captions")
    return metadata_path


def _found_instead(wanted: Path, usual: Sequence[Path]) -> str:
    beside = wanted.parent.iterdir() if wanted.parent.is_dir() else iter(())
    other = [path for path in beside if path.suffix.lower() in _READERS and path.is_file()]
    found = sorted({*other, *(path for path in usual if path.is_file())})
    if found:
        return f"Found instead: {', '.join(_show_path(path) for path in found)}"
    return (
        "No other .csv or .jsonl file is there. Leave metadata_path out to use the .txt file "
        f"beside each image, or make the file: {_label_command(wanted.parent, wanted)}"
    )


def _label_command(folder: Path, metadata: Path) -> str:
    return f"python tools/auto_label.py --input {folder} --output {metadata}"


def _read_sidecars(listing: _Folder) -> tuple[list[Record], list[Problem]]:
    records: list[Record] = []
    problems = [Problem(_show(name), why) for name, why in listing.refused.items()]
    missing: list[str] = []
    for name in listing.images:
        keys = (_stem(name) + suffix for suffix in CAPTION_SUFFIXES)
        beside = next((listing.captions[key] for key in keys if key in listing.captions), None)
        if beside is None:
            missing.append(name)
            records.append(Record(listing.path / name, "", name))
            continue
        try:
            caption = _unix_lines(_read_text(listing.path / beside)).strip()
        except _Refused as refused:
            problems.append(Problem(beside, str(refused)))
            continue
        if not caption:
            problems.append(Problem(beside, "the caption is empty", "warning"))
        records.append(Record(listing.path / name, caption, beside))
    if missing and len(missing) == len(listing.images):
        command = _label_command(listing.path, listing.path / "metadata.csv")
        what = (
            "no captions found: no metadata.csv, no metadata.jsonl, no .txt beside an image. "
            f"Make them with: {command} (to train without captions on purpose, put an empty "
            ".txt file beside each image)"
        )
        problems.append(Problem(str(listing.path), what))
    elif missing:
        what = f"{_count(missing)} without a .txt file beside them: their captions are empty"
        problems.append(Problem(str(listing.path), what, "warning"))
    return records, problems


# --- metadata.csv and metadata.jsonl ------------------------------------------------------------


def _read_metadata(metadata: Path, listing: _Folder) -> tuple[list[Record], list[Problem]]:
    file = metadata.name
    try:
        rows = list(_READERS[metadata.suffix.lower()](_read_text(metadata), file))
    except _Refused as refused:
        return [], [Problem(file, str(refused))]
    records: list[Record] = []
    problems: list[Problem] = []
    if not rows:
        problems.append(Problem(file, "there is no row in it; expected one for each image"))
    names = _Names(listing)
    for row in rows:
        if isinstance(row, Problem):
            problems.append(row)
            continue
        try:
            name = names.find(row.name, row.where)
            if not _is_unicode(row.caption):
                raise _Refused("the caption holds a broken character (half of a surrogate pair)")
        except _Refused as refused:
            problems.append(Problem(row.where, str(refused)))
            continue
        if not row.caption.strip():
            problems.append(Problem(row.where, f"the caption of {_show(name)} is empty", "warning"))
        records.append(Record(listing.path / name, row.caption, row.where))
    if unnamed := [name for name in listing.images if name not in names.seen]:
        what = f"{_count(unnamed)} in the folder not named in it: they are not used"
        problems.append(Problem(file, what, "warning"))
    return records, problems


def _csv_rows(text: str, file: str) -> Iterator[_Row | Problem]:
    """The rows of a CSV text. A row that fails is reported, and reading goes on one line below."""
    lines = list(io.StringIO(text, newline=""))
    name_at, text_at, width, at = 0, 1, 2, 0
    first = True
    while at < len(lines):
        where = f"{file} line {at + 1}"
        try:
            fields, taken = _csv_row(lines, at)
        except _Refused as refused:
            yield Problem(where, str(refused))
            at, first = at + 1, False
            continue
        raw = "".join(lines[at : at + taken])
        at += taken
        if not raw.strip():
            continue
        columns = [column.strip().lower() for column in fields]
        if first and (header := _header(columns)) is not None:
            name_at, text_at = header
            width = len(columns)
            yield from _unused_columns(where, [columns[i] for i in range(width) if i not in header])
        elif len(fields) != width:
            yield Problem(where, _wrong_width(fields, raw.strip("\r\n"), width))
        else:
            yield _Row(where, fields[name_at], _unix_lines(fields[text_at]))
        first = False


def _csv_row(lines: Sequence[str], at: int) -> tuple[list[str], int]:
    """The fields of the row that begins at `lines[at]`, and how many lines it takes."""
    rest = (lines[i] for i in range(at, len(lines)))
    reader = csv.reader(rest, strict=True, skipinitialspace=True)
    try:
        fields = next(reader)
    except csv.Error:
        raise _Refused(_unbalanced(lines[at])) from None
    taken = reader.line_num
    for below in range(at + 1, at + taken):
        if _IMAGE_ROW.match(lines[below]):
            what = f"a quote opens here and is still open in line {below + 1}, where"
            raise _Refused(f"{what} {_show(lines[below].strip())} seems to begin a new row")
    if sum(line.count('"') for line in lines[at : at + taken]) % 2:
        raise _Refused(_unbalanced(lines[at]))
    return fields, taken


def _header(columns: Sequence[str]) -> tuple[int, int] | None:
    """Where the name and the caption stand, if these are the titles of columns."""
    name = next((columns.index(title) for title in NAME_COLUMNS if title in columns), None)
    text = next((columns.index(title) for title in TEXT_COLUMNS if title in columns), None)
    return None if name is None or text is None else (name, text)


def _unused_columns(where: str, names: Sequence[str]) -> list[Problem]:
    if not names:
        return []
    what = f"not used: {', '.join(_show(name) for name in names)} (read: file name and caption)"
    return [Problem(where, what, "warning")]


def _unbalanced(line: str) -> str:
    name, _, caption = line.strip().partition(",")
    example = _quoted(_shorten(caption.strip().strip('"').replace('""', '"'), 40))
    return (
        f"unbalanced quotes in {_show(line.strip())}; a caption that begins with a quote ends with "
        f"one, and a quote inside it is written twice: {_plain(name)},{example}"
    )


def _wrong_width(fields: Sequence[str], raw: str, width: int) -> str:
    found = f"{len(fields)} field{'s' if len(fields) != 1 else ''} found, expected {width}"
    if width != 2:
        return f"{found} as in the header; a field that holds a comma needs quotes"
    if len(fields) == 1:
        for mark, name in ((";", "a semicolon"), ("\t", "a tab"), ("，", "a full-width comma")):
            if mark in raw:
                return f"{found}; file name and caption are separated by a comma, found {name}"
        return f'{found}; expected the file name, a comma, the caption: {_plain(raw)},"a caption"'
    name, _, caption = raw.partition(",")
    example = _quoted(_shorten(caption.strip().replace('"', ""), 60))
    curly = " (straight quotes, not “ ”)" if "“" in raw or "”" in raw else ""
    return f"{found}; a caption that holds a comma needs quotes{curly}: {_plain(name)},{example}"


def _jsonl_rows(text: str, file: str) -> Iterator[_Row | Problem]:
    if text.lstrip().startswith("["):
        raise _Refused(f"this is one JSON list; expected one object a line: {_JSON_EXAMPLE}")
    unused: dict[str, None] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            row, others = _json_row(line, where)
        except _Refused as refused:
            yield Problem(where, str(refused))
            continue
        yield row
        unused.update(dict.fromkeys(others))
    yield from _unused_columns(file, list(unused))


_JSON_EXAMPLE = '{"file_name": "img01.jpg", "text": "a caption"}'


def _json_row(line: str, where: str) -> tuple[_Row, list[str]]:
    """The row in one line, and the names of the keys that are not used."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        place = f"{error.msg} at column {error.colno}"
        raise _Refused(f"not valid JSON ({place}); expected {_JSON_EXAMPLE}") from None
    except (ValueError, RecursionError):
        raise _Refused(f"not usable as JSON; expected {_JSON_EXAMPLE}") from None
    if not isinstance(found, dict):
        raise _Refused(f"found {_json_kind(found)}; expected an object: {_JSON_EXAMPLE}")
    keys = [next((key for key in NAME_COLUMNS if key in found), NAME_COLUMNS[0])]
    keys.append(next((key for key in TEXT_COLUMNS if key in found), TEXT_COLUMNS[0]))
    for key in keys:
        if key not in found:
            has = ", ".join(_show(name) for name in found) or "no key"
            raise _Refused(f'no "{key}"; found {has}; expected {_JSON_EXAMPLE}')
        if not isinstance(found[key], str):
            raise _Refused(f'"{key}" is {_json_kind(found[key])}; expected a text in quotes')
    row = _Row(where, found[keys[0]], _unix_lines(found[keys[1]]))
    return row, [key for key in found if key not in keys]


def _json_kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case list():
            return "a list"
        case _:
            return "an object"


_READERS = {".csv": _csv_rows, ".jsonl": _jsonl_rows}


# --- names in metadata, and the files they mean -------------------------------------------------


class _Names:
    """Finds the file that a name in the metadata means; remembers which were named, and where."""

    def __init__(self, listing: _Folder) -> None:
        self.seen: dict[str, str] = {}
        self._refused = listing.refused
        self._exact = {unicodedata.normalize("NFC", name): name for name in listing.images}
        self._folded = {name.casefold(): name for name in listing.images}
        self._stems = {_stem(name).casefold(): name for name in listing.images}
        self._bases = {PurePosixPath(name).name.casefold(): name for name in listing.images}
        self._guesses_left = _GUESSES

    def find(self, typed: str, where: str) -> str:
        """The file's name in the folder. Raises `_Refused` if it cannot be used."""
        if not typed.strip():
            raise _Refused("the file name is empty; expected the name of an image")
        name = self._inside(typed)
        if (why := self._refused.get(name)) is not None:
            raise _Refused(f"{_show(typed)}: {why}")
        known = self._exact.get(unicodedata.normalize("NFC", name))
        if known is None:
            raise _Refused(f"{_show(typed)} is not there{self._hint(name)}")
        if known in self.seen:
            raise _Refused(f"{_show(typed)} was already named in {self.seen[known]}; keep one row")
        self.seen[known] = where
        return known

    def _inside(self, typed: str) -> str:
        name = typed.replace("\\", "/")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
            what = "leaves the folder of images; expected a name relative to it"
            raise _Refused(f"{_show(typed)} {what}")
        if path.suffix.lower() not in SUFFIXES:
            found = f'"{_plain(path.suffix)}"' if path.suffix else "none"
            hint = self._hint(str(path))
            raise _Refused(f"{_show(typed)}: extension {found}, expected one of {_KINDS}{hint}")
        return str(path)

    def _hint(self, name: str) -> str:
        folded = name.casefold()
        if folded in self._folded:
            near, why = self._folded[folded], ": upper and lower case differ"
        elif folded in self._stems:
            near, why = self._stems[folded], ": with its extension"
        elif _stem(folded) in self._stems:
            near, why = self._stems[_stem(folded)], ": the extension differs"
        elif PurePosixPath(folded).name in self._bases:
            near, why = self._bases[PurePosixPath(folded).name], ": in another folder"
        elif (guess := self._guess(folded)) is not None:
            near, why = guess, ""
        else:
            return ""
        return f"; the nearest is {_show(near)}{why}"

    def _guess(self, folded: str) -> str | None:
        if self._guesses_left == 0:
            return None
        self._guesses_left -= 1
        close = difflib.get_close_matches(folded, self._folded, n=1, cutoff=0.75)
        return self._folded[close[0]] if close else None


# --- text -----------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    """The UTF-8 text of a file (with or without BOM), line ends as they stand."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _Refused(f"the file cannot be read ({error.strerror})") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        raise _Refused("the file seems to be UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _Refused(
            f"the file is not UTF-8 (first bad byte in line {line}); it seems to be "
            f"{_likely_encoding(data)}; save it as UTF-8 (in Excel: CSV UTF-8)"
        ) from None


def _likely_encoding(data: bytes) -> str:
    try:
        text = data.decode("gb18030")
    except UnicodeDecodeError:
        return "Windows-1252 or another 8-bit encoding"
    han = sum("\u4e00" <= character <= "\u9fff" for character in text)
    other = sum(character > "\x7f" for character in text) - han
    return "GBK, as Chinese Windows writes it" if han > other else "an 8-bit encoding"


def _unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _stem(name: str) -> str:
    return name.removesuffix(PurePosixPath(name).suffix)


def _is_unicode(text: str) -> bool:
    """False if it holds half of a surrogate pair, which no file or terminal can be given."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _plain(text: str) -> str:
    """Text that can be printed on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shorten(text: str, length: int) -> str:
    text = _plain(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _show(text: str) -> str:
    return f'"{_shorten(text, 60)}"'


def _show_path(path: Path) -> str:
    return _plain(str(path))


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _count(names: Sequence[str]) -> str:
    few = ", ".join(_shorten(name, 60) for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} image{'s' if len(names) != 1 else ''} ({few}{more})"
