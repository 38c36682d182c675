"""The header of a .gguf file: its facts and whether the tensors are all there. No tensor is read.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_scripts.errors import user_error

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 8  # of a tensor; ggml has 4
_ALIGNMENT = 32  # of the tensors, where general.alignment is not set
_STRING, _ARRAY = 8, 9
# value type -> how struct reads it: u8 i8 u16 i16 u32 i32 f32 bool, u64 i64 f64
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip

Fact = str | int | float | bool


@dataclass(frozen=True)
class GgufHeader:
    """What a .gguf file says of itself.

    Attributes:
        facts: Its keys and values. Of a list only the length, under the key followed by `#`.
        tensors: How many tensors it holds.
    """

    facts: Mapping[str, Fact]
    tensors: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Read a .gguf file's facts; its size must be what its tensors need.

    Raises:
        UserError: The file is of another version, is damaged or was cut short.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            header, end = _Reader(content).read()
        except (struct.error, LookupError, ValueError, TypeError, ArithmeticError, RecursionError):
            what = "its header cannot be read: the file is damaged or was cut short; fetch it again"
            raise user_error(str(path), what) from None
        if end > len(content):
            raise user_error(
                str(path),
                f"the file is damaged: its header describes {end:,} bytes, there are "
                f"{len(content):,}. A download that was cut short looks like this: fetch it again",
            )
    return header


class _Reader:
    """Reads values one after the other."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._at = len(MAGIC)

    def read(self) -> tuple[GgufHeader, int]:
        """The header, and where the last tensor ends."""
        if self._number("I") not in _VERSIONS:
            raise KeyError("version")
        count, entries = int(self._number("Q")), int(self._number("Q"))
        facts: dict[str, Fact] = {}
        for _ in range(entries):
            key, kind = self._string(), int(self._number("I"))
            if kind == _ARRAY:
                facts[f"{key}#"] = self._skip_array()
            else:
                facts[key] = self._value(kind)
        ends = [self._tensor_end() for _ in range(count)]
        alignment = int(facts.get("general.alignment", _ALIGNMENT))
        start = -(-self._at // alignment) * alignment
        return GgufHeader(facts, count), start + max(ends) if ends else self._at

    def _number(self, kind: str) -> Fact:
        (value,) = struct.unpack_from(f"<{kind}", self._content, self._at)
        self._at += struct.calcsize(f"<{kind}")
        found: Fact = value
        return found

    def _string(self) -> str:
        start = self._skip_string()
        return self._content[start : self._at].decode("utf-8")

    def _skip_string(self) -> int:
        """Where the string that was skipped begins."""
        length = int(self._number("Q"))
        if length > len(self._content) - self._at:
            raise struct.error("a text goes beyond the end of the file")
        start = self._at
        self._at += length
        return start

    def _value(self, kind: int) -> Fact:
        return self._string() if kind == _STRING else self._number(_NUMBERS[kind])

    def _skip_array(self) -> int:
        """The length of the list that was skipped."""
        kind, length = int(self._number("I")), int(self._number("Q"))
        if kind not in (_STRING, _ARRAY):
            self._at += length * struct.calcsize(f"<{_NUMBERS[kind]}")
            return length
        for _ in range(length):
            if kind == _STRING:
                self._skip_string()
            else:
                self._skip_array()
        return length

    def _tensor_end(self) -> int:
        """Where a tensor ends, counted from where the tensors begin."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        self._string()
        numbers, dimensions = 1, int(self._number("I"))
        if dimensions > _MAX_DIMENSIONS:
            raise KeyError("dimensions")
        for _ in range(dimensions):
            numbers *= int(self._number("Q"))
        kind, offset = int(self._number("I")), int(self._number("Q"))
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except ValueError:
            return offset  # a type of a later gguf; the model's reader will name it
        return offset + numbers // int(block) * int(size)
