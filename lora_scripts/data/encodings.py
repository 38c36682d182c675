"""Which encoding a text that is not UTF-8 seems to be in, so that the user can be told its name.

charset-normalizer says in which encodings the bytes make sense, and how messy they look there. On
texts as short as a few captions several do, so that the commonness of the letters is weighed, too.
"""

from __future__ import annotations

from collections.abc import Callable

# Codec -> what the user knows it as. Of about equally good ones the first wins.
NAMES = {
    "gb18030": "GBK, as Chinese Windows writes it",
    "big5": "Big5, as Windows in Taiwan and Hong Kong writes it",
    "cp932": "Shift-JIS, as Japanese Windows writes it",
    "cp949": "EUC-KR, as Korean Windows writes it",
    "cp1252": "Windows-1252, as Western European Windows writes it",
    "cp1251": "Windows-1251, as Russian Windows writes it",
}
_AS_GOOD = 0.05
_ENOUGH = 1 << 16  # bytes of the file that are looked at


def likely(data: bytes) -> str:
    """The encoding in words; "an 8-bit encoding" if none makes sense."""
    from charset_normalizer import from_bytes

    sample = _whole_lines(data)
    found = {m.encoding: 1 - m.chaos for m in from_bytes(sample, cp_isolation=list(NAMES))}
    found.setdefault("cp1252", 0.5)  # a few marks are too little for the library
    scores = {codec: _share_of_common(sample, codec) * found.get(codec, 0) for codec in NAMES}
    best = max(scores.values())
    if best == 0:
        return "an 8-bit encoding"
    return NAMES[next(codec for codec in NAMES if scores[codec] >= best - _AS_GOOD)]


def _whole_lines(data: bytes) -> bytes:
    """The lines with letters beyond ASCII, as far as they are looked at."""
    lines = [line for line in data.splitlines(keepends=True) if not line.isascii()]
    return b"".join(lines)[:_ENOUGH]


def _share_of_common(data: bytes, codec: str) -> float:
    """How many of the letters beyond ASCII are common ones in the language of this encoding."""
    text = data.decode(codec, errors="replace")
    beyond = [character for character in text if character > "\x7f"]
    return sum(map(_IS_COMMON[codec], beyond)) / len(beyond) if beyond else 0.0


def _first_byte(codec: str, first: int, last: int) -> Callable[[str], bool]:
    """Characters whose code begins with a byte in this range: where a standard has common ones."""
    return lambda character: first <= character.encode(codec, errors="replace")[0] <= last


def _japanese(character: str) -> bool:
    is_kana = "\u3040" <= character <= "\u30ff"
    return is_kana or 0x88 <= character.encode("cp932", errors="replace")[0] <= 0x97


# GB 2312 and JIS have their common characters in a first level, Big5 has them in front, EUC-KR its
# syllables; Western text has letters with accents and typographic marks.
_IS_COMMON: dict[str, Callable[[str], bool]] = {
    "gb18030": _first_byte("gb18030", 0xB0, 0xD7),
    "big5": _first_byte("big5", 0xA4, 0xC6),
    "cp932": _japanese,
    "cp949": _first_byte("cp949", 0xB0, 0xC8),
    "cp1252": lambda character: character in "àâäåæçèéêëìíîïñòóôöøùúûüýßœÀÄÅÇÉÖØÜ‘’“”–—…€°",
    "cp1251": lambda character: "\u0410" <= character <= "\u044f",
}
