"""Text records on disk: written as they are read from the user's files, read one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from lora_scripts.data.reading import Refused
from lora_scripts.data.spool import Column, Spool

_ENTRY = np.dtype([("end", "<u8"), ("content", "V32")])  # where a record ends, and its SHA-256


@dataclass(frozen=True)
class TextRecord:
    """One conversation, or one raw text.

    Attributes:
        where: The place that says so: `dialogues.jsonl line 12`, `data.json row 3`, `book.md`.
        messages: The conversation. A message has `role` (system, user, assistant or tool) and
            `content` (a text), and may have `reasoning_content` (a text), `tool_calls` (a list of
            `{"type": "function", "function": {"name": …, "arguments": {…}}}`, perhaps with `id`),
            `name` and `tool_call_id`. Empty where `text` is set.
        tools: The functions on offer, each `{"type": "function", "function": {"name": …, …}}`.
        text: A raw text, learned whole.
    """

    where: str
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None


class TextRecords(Sequence[TextRecord]):
    """Records in the order in which they were added, and a hash of what each says.

    Attributes:
        characters: Of all records, as JSON.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: where to put files, as `Spool` takes it."""
        self._entries = Column(_ENTRY, folder)
        self._records = Spool(folder)
        self.characters = 0

    def add(self, record: TextRecord) -> None:
        """Put a record at the end.

        Raises:
            Refused: if it holds a value that JSON does not know.
        """
        values = (record.where, record.messages, record.tools, record.text)
        try:
            text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
        except TypeError as error:
            raise Refused(f"it holds a value that is none of JSON's ({error})") from None
        self._records.append(text.encode("utf-8", "surrogatepass"))
        self._entries.append(np.array((self._records.size, digest_of(record)), _ENTRY))
        self.characters += len(text)

    def contents(self) -> Iterator[str]:
        """`content_of` each record; no record is read for it."""
        for block in self._entries.blocks():
            yield from (content.tobytes().hex() for content in block["content"])

    def keys(self) -> np.ndarray:
        """The first 64 bits of each content: the same for the same, uint64."""
        keys = np.empty(len(self), np.uint64)
        done = 0
        for block in self._entries.blocks():
            contents = np.ascontiguousarray(block["content"]).view(np.uint64)
            keys[done : done + len(block)] = contents.reshape(-1, 4)[:, 0]
            done += len(block)
        return keys

    def longer_than(self, size: int) -> Iterator[int]:
        """The records of more bytes, as JSON."""
        start = number = 0
        for block in self._entries.blocks():
            sizes = np.diff(block["end"].astype(np.int64), prepend=start)
            yield from (number + np.flatnonzero(sizes > size)).tolist()
            start, number = int(block["end"][-1]), number + len(block)

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> TextRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[TextRecord]: ...

    def __getitem__(self, index: int | slice) -> TextRecord | list[TextRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        ends = self._entries.read(max(0, place - 1), place + 1)["end"].tolist()
        return self._read(ends[-2] if place else 0, ends[-1])

    def __iter__(self) -> Iterator[TextRecord]:
        start = 0
        for block in self._entries.blocks():
            for end in block["end"].tolist():
                yield self._read(start, end)
                start = end

    def __eq__(self, other: object) -> bool:
        """As lists are equal."""
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def _read(self, start: int, end: int) -> TextRecord:
        text = self._records.read(start, end).decode("utf-8", "surrogatepass")
        where, messages, tools, raw = json.loads(text)
        return TextRecord(where, tuple(messages), tuple(tools), raw)


def digest_of(record: TextRecord) -> bytes:
    """SHA-256 of what a record says; its place does not count."""
    text = repr((record.messages, record.tools, record.text))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def content_of(record: TextRecord) -> str:
    """`digest_of` in hexadecimal digits."""
    return digest_of(record).hex()
