"""From what a captioner says to the caption that is stored. Pure functions."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from lora_scripts.data.captions import compose, holds_word
from lora_scripts.data.reading import unix_lines


@dataclass(frozen=True)
class Wording:
    """What is done to a caption, in this order: blacklist, max_tags, prefix and suffix, trigger.

    Attributes:
        prefix: Stands in front of it, exactly as typed.
        suffix: Stands behind it, exactly as typed.
        trigger: Put in front, followed by ", ", where the caption does not hold it: what
            `trigger_word` does in a config.
        blacklist: Of tags, whole tags that are left out; of sentences, words or phrases.
        max_tags: So many parts between commas are kept, the first ones.
    """

    prefix: str = ""
    suffix: str = ""
    trigger: str | None = None
    blacklist: tuple[str, ...] = ()
    max_tags: int | None = None


def cleaned(said: str, wording: Wording, *, tags: bool) -> str:
    """What is left of the captioner's words; empty if it said nothing of use.

    Line ends become `\\n`. Control characters go, which would make a captions file unreadable, and
    so do blanks at both ends.
    """
    text = "".join(c for c in unix_lines(said) if c in "\n\t" or not _is_unwritable(c)).strip()
    text = without_tags(text, wording.blacklist) if tags else without_words(text, wording.blacklist)
    if wording.max_tags is None:
        return text
    return ", ".join(_parts(text)[: wording.max_tags])


def worded(kept: str, wording: Wording) -> str:
    """The caption as it is stored: what `cleaned` left, with prefix, suffix and trigger word."""
    return compose(kept, prefix=wording.prefix, suffix=wording.suffix, trigger_word=wording.trigger)


def without_tags(text: str, blacklist: Iterable[str]) -> str:
    """Comma-separated tags without those of the list, upper and lower case, `_` and blank alike."""
    unwanted = {_same_tag(tag) for tag in blacklist}
    if not unwanted:
        return text
    return ", ".join(tag for tag in _parts(text) if _same_tag(tag) not in unwanted)


def without_words(text: str, blacklist: Iterable[str]) -> str:
    """A sentence without the words or phrases of the list, and without the gaps that they leave.

    A word is found whole, upper and lower case alike; in scripts without spaces, anywhere. The
    longest are taken first, so that "street lamp" goes before "street".
    """
    left = text
    for word in sorted(blacklist, key=len, reverse=True):
        left = _without_word(left, word)
    return text if left == text else _closed_gaps(left)


def _without_word(text: str, word: str) -> str:
    def left_of(found: re.Match[str]) -> str:
        around = text[max(0, found.start() - 1) : found.end() + 1]
        return "" if holds_word(around, word) else found[0]

    return re.sub(re.escape(word), left_of, text, flags=re.IGNORECASE)


def _closed_gaps(text: str) -> str:
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" +([,.;:!?])", r"\1", text)
    text = re.sub(r",(?:\s*,)+", ",", text)
    return re.sub(r"^[\s,;]+|[\s,;]+$", "", text)


def _parts(text: str) -> list[str]:
    return [part for part in (part.strip() for part in text.split(",")) if part]


def _same_tag(tag: str) -> str:
    return tag.replace("_", " ").replace("\\", "").strip().casefold()


def _is_unwritable(character: str) -> bool:
    """True for control characters and halves of surrogate pairs."""
    return unicodedata.category(character) in ("Cc", "Cs")
