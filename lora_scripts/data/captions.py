"""The prompt that an image is trained with, put together from its caption. Pure functions."""

from __future__ import annotations

import re

import numpy as np

# Scripts that are written without spaces (or, as Korean, with endings joined to the word): a word
# may begin and end anywhere in them, so a neighbour of one of these never extends a word.
_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\u1780-\u17ff"  # Burmese, Khmer
    "\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han, kana, bopomofo
    "\u1100-\u11ff\uac00-\ud7af"  # Hangul
    "\uff66-\uff9f"  # half-width kana
)
_LETTER = rf"[^\W{_UNSPACED}]"


def compose(caption: str, *, prefix: str, suffix: str, trigger_word: str | None) -> str:
    """The prompt: `prefix + caption + suffix`, exactly as typed, no separator invented.

    The trigger word is put in front, followed by ", ", if the composed text does not hold it yet
    (as a whole word, upper and lower case alike; in scripts without spaces, anywhere). If the
    composed text is blank, the prompt is the trigger word alone.
    """
    composed = prefix + caption + suffix
    if trigger_word is None or holds_word(composed, trigger_word):
        return composed
    return f"{trigger_word}, {composed}" if composed.strip() else trigger_word


def vary(
    caption: str, *, keep: int, shuffle: bool, dropout: float, chance: np.random.Generator
) -> str:
    """A caption of comma-separated tags in another order, some of them left out.

    The first `keep` tags stay where they are and are never left out.
    """
    tags = [tag for tag in (part.strip() for part in caption.split(",")) if tag]
    kept, others = tags[:keep], tags[keep:]
    others = [tag for tag, drawn in zip(others, chance.random(len(others)), strict=True)
              if drawn >= dropout]  # fmt: skip
    if shuffle:
        others = [others[place] for place in chance.permutation(len(others))]
    return ", ".join([*kept, *others])


def holds_word(text: str, word: str) -> bool:
    """Whether the text holds the word whole, or anywhere in scripts without spaces."""
    return re.search(_whole(word.casefold()), text.casefold()) is not None


def replace_word(text: str, word: str, by: str) -> str:
    """The text with every whole `word` (as in `holds_word`, but letters as typed) replaced."""
    return re.sub(_whole(word), lambda _: by, text)


def _whole(word: str) -> str:
    before = rf"(?<!{_LETTER})" if re.match(_LETTER, word) else ""
    after = rf"(?!{_LETTER})" if re.match(_LETTER, word[-1:]) else ""
    return before + re.escape(word) + after
