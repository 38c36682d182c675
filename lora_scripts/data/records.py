"""A folder of images and its captions, read into `Record`s that lie on disk.

Three forms are read: `metadata.csv`, `metadata.jsonl`, and a `.txt` (or `.caption`) file beside
each image; the rows of the first two are read by `metadata`, the files beside images by `sidecars`.
Whatever is wrong becomes a `Problem` that names the file and the line; nothing is repaired, and one
bad row does not hide the next.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lora_scripts.data.csv_rows import quoted
from lora_scripts.data.folders import joined, refuse_link
from lora_scripts.data.image_folder import (
    SUFFIXES,
    ImageFolder,
    find_kohyas_folders,
    list_folder,
)
from lora_scripts.data.metadata import READERS, Row
from lora_scripts.data.names import Names
from lora_scripts.data.reading import Refused, count, is_unicode, read_file, show, show_path
from lora_scripts.data.sidecars import ignored_sidecars, label_command, read_sidecars
from lora_scripts.data.spool import Stored
from lora_scripts.errors import Problem

_KINDS = ", ".join(SUFFIXES)


@dataclass(frozen=True)
class Record:
    """One image and its caption.

    Attributes:
        file: Its path.
        where: The place that says so: `metadata.csv line 45`.
        others: Captions of further columns.
        repeats: How often the name of its folder (kohya's `10_name`) wants it shown.
        mask: A file `NAME-masklabel.png` or `NAME_mask.png` beside it.
    """

    file: str
    caption: str
    where: str
    others: tuple[str, ...] = ()
    repeats: int = 1
    mask: str | None = None

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return os.path.basename(self.file)

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions that are not blank; the first one if all are."""
        found = tuple(text for text in (self.caption, *self.others) if text.strip())
        return found or (self.caption,)

    def to_value(self) -> tuple[Any, ...]:
        """As JSON can hold it."""
        return self.file, self.caption, self.where, self.others, self.repeats, self.mask

    @classmethod
    def from_value(cls, value: Sequence[Any]) -> Self:
        """The reverse of `to_value`."""
        file, caption, where, others, repeats, mask = value
        return cls(file, caption, where, tuple(others), repeats, mask)


class Records(Stored[Record]):
    """The records of a dataset, on disk."""

    def add(self, record: Record) -> None:
        """Put one at the end."""
        self._values.append(record.to_value())

    def _made(self, value: Any) -> Record:
        return Record.from_value(value)


def read_images(
    folder: Path,
    metadata_path: Path | None,
    caption_keys: Sequence[str] | None = None,
    spool_dir: Path | None = None,
) -> tuple[Records, list[Problem]]:
    """Read the images of `folder` with their captions.

    The captions come from `metadata_path` (`.csv` or `.jsonl`); when that is None, from
    `metadata.csv` in the folder, else from `metadata.jsonl`, else from the `.txt` or `.caption`
    file beside each image. Names in a metadata file are relative to `folder`; sub-folders are
    included, names that begin with a dot are not. `caption_keys` names the columns or keys that
    hold captions. The records are put on disk near `spool_dir`.

    Where a folder without a metadata file holds images only in sub-folders named as kohya's
    scripts want them, `10_a cat`, each image counts ten times, and one without a caption file has
    the caption `a cat`.

    Returns:
        The records that are good, in the order of the metadata file (or of their names), and
        every problem found. With a problem of severity "error" the records are incomplete.
    """
    listing = list_folder(folder)
    problems = listing.problems
    if not listing.images and not listing.refused:
        if not any(problem.severity == "error" for problem in problems):
            what = f"no image found; expected files in {_KINDS}"
            problems.append(Problem(str(folder), what, "error", "no-images"))
        return Records(spool_dir), problems
    try:
        metadata = _choose_metadata(folder, metadata_path)
    except Refused as refused:
        return Records(spool_dir), [*problems, refused.problem(show_path(metadata_path or folder))]
    if metadata is None:
        find_kohyas_folders(listing)
        rows, found = read_sidecars(listing)
        records = Records(spool_dir)
        for row in rows:
            records.add(_record(listing, row.name, row))
        if caption_keys is not None:
            what = "needs a metadata.csv or metadata.jsonl: captions are in files beside the images"
            found.append(Problem("caption_keys", what, "error", "caption-column"))
    else:
        records, found = _read_metadata(metadata, listing, caption_keys, spool_dir)
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
                bare = name == name.strip() and not any(mark in name for mark in '",\r\n')
                file.write(f"{name if bare else quoted(name)},{quoted(caption)}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# --- which file holds the captions --------------------------------------------------------------


def _choose_metadata(folder: Path, metadata_path: Path | None) -> Path | None:
    """The metadata file to read, or None for caption files beside the images."""
    usual = [folder / "metadata.csv", folder / "metadata.jsonl"]
    if metadata_path is None:
        found = next((path for path in usual if path.is_file()), None)
        if found is not None:
            refuse_link(folder, found, "images")
        return found
    if not metadata_path.is_file():
        what = f"there is no such file. {_found_instead(metadata_path, usual)}"
        raise Refused(what, "metadata-missing")
    if metadata_path.suffix.lower() not in READERS:
        raise Refused("expected a .csv or a .jsonl file of captions", "metadata-missing")
    return metadata_path


def _found_instead(wanted: Path, usual: Sequence[Path]) -> str:
    beside = wanted.parent.iterdir() if wanted.parent.is_dir() else iter(())
    other = [path for path in beside if path.suffix.lower() in READERS and path.is_file()]
    found = sorted({*other, *(path for path in usual if path.is_file())})
    if found:
        return f"Found instead: {', '.join(show_path(path) for path in found)}"
    return (
        "No other .csv or .jsonl file is there. Leave metadata_path out to use the .txt file "
        f"beside each image, or make the file: {label_command(wanted.parent, wanted)}"
    )


# --- metadata.csv and metadata.jsonl ------------------------------------------------------------


def _read_metadata(
    metadata: Path,
    listing: ImageFolder,
    caption_keys: Sequence[str] | None,
    spool_dir: Path | None,
) -> tuple[Records, list[Problem]]:
    file, records = metadata.name, Records(spool_dir)
    try:
        rows = list(READERS[metadata.suffix.lower()](read_file(metadata), file, caption_keys))
    except Refused as refused:
        return records, [refused.problem(file)]
    problems = ignored_sidecars(listing, file)
    if all(isinstance(row, Problem) and row.severity != "error" for row in rows):
        what = "there is no row in it; expected one for each image"
        problems.append(Problem(file, what, "error", "no-rows"))
    names = Names(listing)
    for row in rows:
        if isinstance(row, Problem):
            problems.append(row)
            continue
        try:
            name = names.find(row.name, row.where)
            if not all(is_unicode(text) for text in (row.caption, *row.others)):
                what = "the caption holds a broken character (half of a surrogate pair)"
                raise Refused(what, "broken-character")
        except Refused as refused:
            problems.append(refused.problem(row.where))
            continue
        if not any(text.strip() for text in (row.caption, *row.others)):
            what = f"the caption of {show(name)} is empty"
            problems.append(Problem(row.where, what, "warning", "empty-caption"))
        records.add(_record(listing, name, row))
    if unnamed := [name for name in listing.images if name not in names.seen]:
        what = f"{count(unnamed, 'image')} in the folder not named in it: they are not used"
        problems.append(Problem(file, what, "warning", "image-not-named"))
    return records, problems


def _record(listing: ImageFolder, name: str, row: Row) -> Record:
    repeats = listing.repeats.get(name.split("/")[0], 1)
    mask = listing.mask_of(name)
    return Record(joined(listing.path, name), row.caption, row.where, row.others, repeats, mask)
