"""A folder of images and its captions, read into `Record`s.

Three forms are read: `metadata.csv`, `metadata.jsonl`, and a `.txt` (or `.caption`) file beside
each image; the rows of the first two are read by `lora_scripts.data.metadata`. Whatever is wrong
becomes a `Problem` that names the file and the line; nothing is repaired, and one bad row does not
hide the next.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_scripts.data.csv_rows import quoted
from lora_scripts.data.image_folder import (
    CAPTION_SUFFIXES,
    SUFFIXES,
    ImageFolder,
    find_kohyas_folders,
    list_folder,
    stem,
)
from lora_scripts.data.metadata import READERS
from lora_scripts.data.reading import (
    Refused,
    count,
    is_unicode,
    plain,
    read_file,
    show,
    show_path,
    unix_lines,
)
from lora_scripts.errors import Problem

_KINDS = ", ".join(SUFFIXES)
_GUESSES = 20  # fuzzy matching costs milliseconds for each missing name in a large folder


@dataclass(frozen=True)
class Record:
    """One image and its caption.

    Attributes:
        where: The place that says so: `metadata.csv line 45`.
        others: Captions of further columns.
        repeats: How often the name of its folder (kohya's `10_name`) wants it shown.
        mask: A file `NAME-masklabel.png` or `NAME_mask.png` beside it.
    """

    path: Path
    caption: str
    where: str
    others: tuple[str, ...] = ()
    repeats: int = 1
    mask: Path | None = None

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions that are not blank; the first one if all are."""
        found = tuple(text for text in (self.caption, *self.others) if text.strip())
        return found or (self.caption,)


def read_images(
    folder: Path, metadata_path: Path | None, caption_keys: Sequence[str] | None = None
) -> tuple[list[Record], list[Problem]]:
    """Read the images of `folder` with their captions.

    The captions come from `metadata_path` (`.csv` or `.jsonl`); when that is None, from
    `metadata.csv` in the folder, else from `metadata.jsonl`, else from the `.txt` or `.caption`
    file beside each image. Names in a metadata file are relative to `folder`; sub-folders are
    included, names that begin with a dot are not. `caption_keys` names the columns or keys that
    hold captions.

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
            problems.append(Problem(str(folder), f"no image found; expected files in {_KINDS}"))
        return [], problems
    try:
        metadata = _choose_metadata(folder, metadata_path)
    except Refused as refused:
        return [], [*problems, Problem(show_path(metadata_path or folder), str(refused))]
    if metadata is None:
        find_kohyas_folders(listing)
        records, found = _read_sidecars(listing)
        if caption_keys is not None:
            what = "needs a metadata.csv or metadata.jsonl: captions are in files beside the images"
            found.append(Problem("caption_keys", what))
    else:
        records, found = _read_metadata(metadata, listing, caption_keys)
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
        return next((path for path in usual if path.is_file()), None)
    if not metadata_path.is_file():
        raise Refused(f"there is no such file. {_found_instead(metadata_path, usual)}")
    if metadata_path.suffix.lower() not in READERS:
        raise Refused("expected a .csv or a .jsonl file of captions")
    return metadata_path


def _found_instead(wanted: Path, usual: Sequence[Path]) -> str:
    beside = wanted.parent.iterdir() if wanted.parent.is_dir() else iter(())
    other = [path for path in beside if path.suffix.lower() in READERS and path.is_file()]
    found = sorted({*other, *(path for path in usual if path.is_file())})
    if found:
        return f"Found instead: {', '.join(show_path(path) for path in found)}"
    return (
        "No other .csv or .jsonl file is there. Leave metadata_path out to use the .txt file "
        f"beside each image, or make the file: {_label_command(wanted.parent, wanted)}"
    )


def _label_command(folder: Path, metadata: Path) -> str:
    return f"python tools/auto_label.py --input {folder} --output {metadata}"


def _read_sidecars(listing: ImageFolder) -> tuple[list[Record], list[Problem]]:
    records: list[Record] = []
    problems = [Problem(show(name), why) for name, why in listing.refused.items()]
    missing: list[str] = []
    for name in listing.images:
        keys = (stem(name) + suffix for suffix in CAPTION_SUFFIXES)
        beside = next((listing.captions[key] for key in keys if key in listing.captions), None)
        folder = name.split("/")[0]
        repeats = listing.repeats.get(folder, 1)
        mask = listing.mask_of(name)
        if beside is None:
            caption = folder.partition("_")[2] if folder in listing.repeats else ""
            if not caption:
                missing.append(name)
            records.append(Record(listing.path / name, caption, name, (), repeats, mask))
            continue
        try:
            caption = unix_lines(read_file(listing.path / beside)).strip()
        except Refused as refused:
            problems.append(Problem(beside, str(refused)))
            continue
        if not caption:
            problems.append(Problem(beside, "the caption is empty", "warning"))
        records.append(Record(listing.path / name, caption, beside, (), repeats, mask))
    if missing and len(missing) == len(listing.images):
        command = _label_command(listing.path, listing.path / "metadata.csv")
        what = (
            "no captions found: no metadata.csv, no metadata.jsonl, no .txt beside an image. "
            f"Make them with: {command} (to train without captions on purpose, put an empty "
            ".txt file beside each image)"
        )
        problems.append(Problem(str(listing.path), what))
    elif missing:
        what = "without a .txt file beside them: their captions are empty"
        found = f"{count(missing, 'image')} {what}"
        problems.append(Problem(str(listing.path), found, "warning"))
    return records, problems


# --- metadata.csv and metadata.jsonl ------------------------------------------------------------


def _read_metadata(
    metadata: Path, listing: ImageFolder, caption_keys: Sequence[str] | None
) -> tuple[list[Record], list[Problem]]:
    file = metadata.name
    try:
        rows = list(READERS[metadata.suffix.lower()](read_file(metadata), file, caption_keys))
    except Refused as refused:
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
            if not all(is_unicode(text) for text in (row.caption, *row.others)):
                raise Refused("the caption holds a broken character (half of a surrogate pair)")
        except Refused as refused:
            problems.append(Problem(row.where, str(refused)))
            continue
        if not any(text.strip() for text in (row.caption, *row.others)):
            problems.append(Problem(row.where, f"the caption of {show(name)} is empty", "warning"))
        mask = listing.mask_of(name)
        records.append(Record(listing.path / name, row.caption, row.where, row.others, 1, mask))
    if unnamed := [name for name in listing.images if name not in names.seen]:
        what = f"{count(unnamed, 'image')} in the folder not named in it: they are not used"
        problems.append(Problem(file, what, "warning"))
    return records, problems


# --- names in metadata, and the files they mean -------------------------------------------------


class _Names:
    """Finds the file that a name in the metadata means; remembers which were named, and where."""

    def __init__(self, listing: ImageFolder) -> None:
        self.seen: dict[str, str] = {}
        what = "by its name this is the mask of another image; rename it to use it as an image"
        self._refused = listing.refused | dict.fromkeys(listing.masks.values(), what)
        self._exact = {unicodedata.normalize("NFC", name): name for name in listing.images}
        self._folded = {name.casefold(): name for name in listing.images}
        self._stems = {stem(name).casefold(): name for name in listing.images}
        self._bases = {PurePosixPath(name).name.casefold(): name for name in listing.images}
        self._guesses_left = _GUESSES

    def find(self, typed: str, where: str) -> str:
        """The file's name in the folder. Raises `Refused` if it cannot be used."""
        if not typed.strip():
            raise Refused("the file name is empty; expected the name of an image")
        name = self._inside(typed)
        if (why := self._refused.get(name)) is not None:
            raise Refused(f"{show(typed)}: {why}")
        known = self._exact.get(unicodedata.normalize("NFC", name))
        if known is None:
            raise Refused(f"{show(typed)} is not there{self._hint(name)}")
        if known in self.seen:
            raise Refused(f"{show(typed)} was already named in {self.seen[known]}; keep one row")
        self.seen[known] = where
        return known

    def _inside(self, typed: str) -> str:
        name = typed.replace("\\", "/")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
            what = "leaves the folder of images; expected a name relative to it"
            raise Refused(f"{show(typed)} {what}")
        if path.suffix.lower() not in SUFFIXES:
            found = f'"{plain(path.suffix)}"' if path.suffix else "none"
            hint = self._hint(str(path))
            raise Refused(f"{show(typed)}: extension {found}, expected one of {_KINDS}{hint}")
        return str(path)

    def _hint(self, name: str) -> str:
        folded = name.casefold()
        if folded in self._folded:
            near, why = self._folded[folded], ": upper and lower case differ"
        elif folded in self._stems:
            near, why = self._stems[folded], ": with its extension"
        elif stem(folded) in self._stems:
            near, why = self._stems[stem(folded)], ": the extension differs"
        elif PurePosixPath(folded).name in self._bases:
            near, why = self._bases[PurePosixPath(folded).name], ": in another folder"
        elif (guess := self._guess(folded)) is not None:
            near, why = guess, ""
        else:
            return ""
        return f"; the nearest is {show(near)}{why}"

    def _guess(self, folded: str) -> str | None:
        if self._guesses_left == 0:
            return None
        self._guesses_left -= 1
        close = difflib.get_close_matches(folded, self._folded, n=1, cutoff=0.75)
        return self._folded[close[0]] if close else None
