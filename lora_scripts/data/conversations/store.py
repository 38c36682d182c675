"""Text records on disk: written as they are read from the user's files, read one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_scripts.data.reading import Refused
from lora_scripts.data.spool import Column, Stored


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


class TextRecords(Stored[TextRecord]):
    """Records in the order in which they were added, and a hash of what each says."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        self._contents = Column("V32", folder)

    @property
    def characters(self) -> int:
        """Of all records, as JSON."""
        return self._values.characters

    def add(self, record: TextRecord) -> None:
        """Put a record at the end.

        Raises:
            Refused: if it holds a value that JSON does not know.
        """
        try:
            self._values.append((record.where, record.messages, record.tools, record.text))
        except TypeError as error:
            raise Refused(f"it holds a value that is none of JSON's ({error})") from None
        self._contents.append(np.void(digest_of(record)))

    def contents(self) -> Iterator[str]:
        """`content_of` each record; no record is read for it."""
        return (content.tobytes().hex() for block in self._contents.blocks() for content in block)

    def keys(self) -> np.ndarray:
        """The first 64 bits of each content: the same for the same, uint64."""
        keys = np.empty(len(self), np.uint64)
        done = 0
        for block in self._contents.blocks():
            keys[done : done + len(block)] = block.view(np.uint64).reshape(-1, 4)[:, 0]
            done += len(block)
        return keys

    def longer_than(self, size: int) -> Iterator[int]:
        """The numbers of the records of more bytes, as JSON."""
        return self._values.longer_than(size)

    def _made(self, value: Any) -> TextRecord:
        where, messages, tools, text = value
        return TextRecord(where, tuple(messages), tuple(tools), text)


def digest_of(record: TextRecord) -> bytes:
    """SHA-256 of what a record says; its place does not count."""
    text = repr((record.messages, record.tools, record.text))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def content_of(record: TextRecord) -> str:
    """`digest_of` in hexadecimal digits."""
    return digest_of(record).hex()
