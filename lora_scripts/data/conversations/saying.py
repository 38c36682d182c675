"""What is wrong with a row, in words; and the small readers that all forms share."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lora_scripts.data.reading import Refused, is_unicode, kind, show, unix_lines
from lora_scripts.errors import Problem

_ODD = re.compile("[\x01-\x08\x0b\x0e-\x1f\x7f\ufffd]")  # a form feed is a book's page break
_DEPTH = 50  # of arguments and schemas; real ones have five or six


@dataclass
class Findings:
    """What is found in one row: `refuse` if it cannot be used, `remark` if it is used all the same.

    Attributes:
        unused: Fields of the row, or of a message, that nothing is made of -> the known names.
    """

    where: str
    problems: list[Problem] = field(default_factory=list)
    unused: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def refused(self) -> bool:
        return any(problem.severity == "error" for problem in self.problems)

    def refuse(self, what: str) -> None:
        self.problems.append(Problem(self.where, what))

    def remark(self, what: str) -> None:
        self.problems.append(Problem(self.where, what, "warning"))

    def ignore(self, names: Iterable[str], known: tuple[str, ...]) -> None:
        self.unused |= dict.fromkeys(names, known)


def checked(text: str, field: str, findings: Findings) -> str:
    """The text with Unix line ends. Raises `Refused` if it holds what no text may hold."""
    if not is_unicode(text):
        raise Refused(f"{field} holds a broken character (half of a surrogate pair)")
    if "\0" in text:
        raise Refused(f"{field} holds a NUL character (\\u0000); remove it")
    text = unix_lines(text)
    if odd := _ODD.search(text):
        line = text.count("\n", 0, odd.start()) + 1
        sign = "the sign of a broken encoding" if odd[0] == "\ufffd" else "a control character"
        findings.remark(f"{field} holds U+{ord(odd[0]):04X} in its line {line}, {sign}")
    return text


def read_text(value: Any, field: str, findings: Findings) -> str:
    """A field that must be a text. Raises `Refused`."""
    if not isinstance(value, str):
        raise Refused(f"{field} is {kind(value)}; expected a text in quotes")
    return checked(value, field, findings)


def check_within(value: Any, field: str, findings: Findings) -> None:
    """Every text inside a JSON value, keys too. Raises `Refused`."""
    for text in _texts(value):
        checked(text, field, findings)


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    if depth > _DEPTH:
        raise Refused(f"it is nested more than {_DEPTH} levels deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item, depth + 1)


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises `Refused` with the reason only, as `not valid JSON (…)`."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise Refused(f"not valid JSON ({error.msg} at {line}column {error.colno})") from None
    except (ValueError, RecursionError):
        raise Refused("not usable as JSON (a number or a nesting without end)") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Refused(f"the key {show(twice)} stands twice in one object")
    return found


def listed(names: Iterable[str]) -> str:
    return ", ".join(show(name) for name in names) or "nothing"


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that was probably meant, or ""."""
    close = difflib.get_close_matches(name.strip().lower(), list(known), n=1, cutoff=0.75)
    return close[0] if close else ""
