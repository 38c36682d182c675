"""What every reader of training data shares: a file's text, and words for what was found in it."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_scripts.data import encodings
from lora_scripts.errors import Problem
from lora_scripts.files import AnyPath

_SURROGATES = re.compile("[\ud800-\udfff]")
_BLOCK = 1 << 20  # bytes looked at in one go
_LONGEST = 60  # so many characters of what the user wrote are shown


class Refused(Exception):
    """A row, a file or a name that cannot be used; the text is what the user is told.

    `kind` is that of the `Problem` it becomes.
    """

    def __init__(self, what: str, kind: str = "") -> None:
        super().__init__(what)
        self.kind = kind

    def problem(self, where: str) -> Problem:
        """It as an error at a place."""
        return Problem(where, str(self), "error", self.kind)


# --- text -----------------------------------------------------------------------------------------


def read_file(path: AnyPath) -> str:
    """The UTF-8 text of a file (with or without BOM), line ends as they stand. Raises `Refused`."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise Refused(f"the file cannot be read ({error.strerror})", "unreadable-file") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        raise Refused("the file seems to be UTF-16; save it as UTF-8", "encoding")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Refused(
            f"the file is not UTF-8 (first bad byte in line {line}); it seems to be "
            f"{encodings.likely(data)}; save it as UTF-8 (in Excel: CSV UTF-8)",
            "encoding",
        ) from None


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a file as `read_file` gives it, one at a time, without their `\\n`.

    The whole file is looked at first, so that what `read_file` refuses is refused before a line.

    Raises:
        Refused: as `read_file`.
    """
    if not _is_plain_utf8(path):
        read_file(path)  # which says what is wrong with it
    with path.open("rb") as file:
        for number, line in enumerate(file):
            yield line.decode("utf-8" if number else "utf-8-sig").removesuffix("\n")


def _is_plain_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            if file.peek(2).startswith((b"\xff\xfe", b"\xfe\xff")):
                return False
            while block := file.read(_BLOCK):
                if b"\0" in block:
                    return False
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except (OSError, UnicodeDecodeError):
        return False
    return True


def unix_lines(text: str) -> str:
    """The text with every line end, of Windows or of old Macs, as `\\n`."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_unicode(text: str) -> bool:
    """False if it holds half of a surrogate pair, which no file or terminal can be given."""
    return text.isascii() or not _SURROGATES.search(text)


# --- words ----------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Text that can be printed on one line: what is not printable is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, length: int = _LONGEST) -> str:
    """Plain text of at most `length` characters; an ellipsis stands for what is cut off."""
    text = plain(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def show(text: str) -> str:
    """What the user wrote, shortened and in quotes."""
    return f'"{shorten(text)}"'


def show_path(path: AnyPath) -> str:
    """A path that can be printed on one line, whole."""
    return plain(str(path))


def count(names: Sequence[str], thing: str) -> str:
    """How many there are, and the first three: `4 images (a.png, b.png, c.png and 1 more)`."""
    few = ", ".join(shorten(name) for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {thing}{'s' if len(names) != 1 else ''} ({few}{more})"


def kind(value: object) -> str:
    """What a JSON value is, in words: `a list`."""
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
