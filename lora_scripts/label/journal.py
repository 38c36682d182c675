"""What a labelling has made so far, on disk as it is made: a file that is only ever appended to.

The first line says who makes the captions, each further line is one caption as the captioner said
it, with the size and time of its image. A killed labelling leaves whole lines, and at most a torn
one at the end. The file is removed when the captions file holds it all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_scripts import files
from lora_scripts.errors import WorkError, user_error

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Stamp:
    """How an image file looked when it was read: size in bytes, time of change in nanoseconds."""

    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Made:
    """One caption, in the captioner's own words, and the image that it was made from."""

    name: str
    said: str
    stamp: Stamp


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file as it is now."""
    found = path.stat()
    return Stamp(found.st_size, found.st_mtime_ns)


class Journal:
    """The captions of an unfinished labelling. Nothing is created before the first `append`."""

    def __init__(self, path: Path, maker: Mapping[str, Any]) -> None:
        """`maker`: captioner, model and settings, as JSON can hold them."""
        self.path = path
        self.maker = dict(maker)

    def read(self) -> list[Made]:
        """What was made before, oldest first; a torn end is passed over.

        Raises:
            UserError: if another captioner, model or settings made it, or it is not a journal.
        """
        if not self.path.exists():
            return []
        lines = self._whole_lines()
        if (found := _maker_in(self.path, lines)) != self.maker:
            raise user_error(str(self.path), _other_maker(found, self.maker, len(lines) - 1))
        return [_made_in(line) for line in lines[1:]]

    def is_of_another(self) -> bool:
        """Whether there is a journal of another captioner, model or settings.

        Raises:
            UserError: if the file is not a journal.
        """
        return self.path.exists() and _maker_in(self.path, self._whole_lines()) != self.maker

    def append(self, made: Sequence[Made]) -> None:
        """Write captions so that they are on the disk when this returns.

        Raises:
            WorkError: if they cannot be written.
        """
        rows = [
            {"name": each.name, "said": each.said, "stamp": [each.stamp.size, each.stamp.mtime_ns]}
            for each in made
        ]
        try:
            if not self.path.exists():
                head = {"format_version": FORMAT_VERSION, "maker": self.maker}
                files.write_text(self.path, _line(head))
                files.sync(self.path.parent)
            with self.path.open("a", encoding="utf-8", newline="\n") as stream:
                stream.write("".join(map(_line, rows)))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise WorkError(
                f"{self.path} cannot be written ({error.strerror}); what is in it is kept, and the "
                "same command goes on from there"
            ) from error

    def cut_torn_end(self) -> None:
        """Take away the part of a line that a kill left, so that the next line begins a new one."""
        if not self.path.exists():
            return
        whole = sum(map(len, self._whole_lines()))
        if whole != self.path.stat().st_size:
            with self.path.open("r+b") as stream:
                stream.truncate(whole)
                os.fsync(stream.fileno())

    def remove(self) -> None:
        """It is all in the captions file."""
        self.path.unlink(missing_ok=True)

    def _whole_lines(self) -> list[bytes]:
        """The lines up to the first that is not whole (or holds what a power cut leaves)."""
        lines: list[bytes] = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n") or not _is_object(line):
                break
            lines.append(line)
        return lines


def _line(row: Mapping[str, Any]) -> str:
    # ASCII only: no character in a caption can end the line or be torn in two
    return json.dumps(row) + "\n"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _maker_in(path: Path, lines: Sequence[bytes]) -> dict[str, Any]:
    head = json.loads(lines[0]) if lines else {}
    if head.get("format_version") != FORMAT_VERSION:
        what = "this is no list of captions that this version can go on with; delete or rename it"
        raise user_error(str(path), what)
    maker: dict[str, Any] = head["maker"]
    return maker


def _made_in(line: bytes) -> Made:
    row = json.loads(line)
    return Made(row["name"], row["said"], Stamp(*row["stamp"]))


def _other_maker(found: Mapping[str, Any], wanted: Mapping[str, Any], count: int) -> str:
    """In words: what is there, how this run differs, and the ways on."""
    differing = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    differences = "; ".join(
        f"{key}: {found.get(key)} there, {wanted.get(key)} now" for key in differing
    )
    return (
        f"an unfinished labelling of {count:,} images lies here, made otherwise ({differences}). "
        "Go on with what it was begun with, or begin anew with --overwrite or by deleting this file"
    )
