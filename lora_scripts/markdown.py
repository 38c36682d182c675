"""Texts of somebody's in a Markdown file, where they are words and nothing else.

Not everything that shows Markdown leaves HTML, pictures and links of strangers out.
"""

from __future__ import annotations

import re

# CommonMark 0.31, section 2.4: any of these may be escaped by a backslash.
_MARKS = re.compile(r"([\\`*_{}\[\]()<>#+!|~$&])")


def words(text: str) -> str:
    """As part of a paragraph, a heading or a cell of a table: on one line, no mark acts."""
    return _MARKS.sub(r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """As code within a line, in as many backticks as it takes (CommonMark, section 6.1)."""
    line = " ".join(text.split())
    fence = _fence(line, 1)
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def block(text: str) -> str:
    """As a block of code, in as many backticks as it takes (CommonMark, section 4.5)."""
    fence = _fence(text, 3)
    return f"{fence}text\n{text}\n{fence}"


def _fence(text: str, least: int) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)
