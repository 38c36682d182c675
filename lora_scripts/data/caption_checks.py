"""Captions as the text encoder reads them: what is cut off, what it cannot read, what is the same.

All that is found here is a warning. Needs no torch: the tokenizer enters as a function.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from lora_scripts.data.captions import compose, holds_word
from lora_scripts.data.reading import shorten, show
from lora_scripts.data.records import Record
from lora_scripts.errors import Problem
from lora_scripts.schema import ImageConfig, ImageDataset

FEWEST = 4  # of fewer pictures nothing is said of their captions together
_LOST_SHOWN = 100  # characters of what is cut off

Row = tuple[Record, ImageDataset]


class Reading(NamedTuple):
    """How a prompt is read: its tokens, and from which character on nothing is (None: all is)."""

    tokens: int
    cut_at: int | None


Read = Callable[[Iterable[str]], Iterator[Reading]]


def composed(caption: str, config: ImageConfig, role: str) -> str:
    """A caption with the prefix, suffix and trigger word of a run; the role is its dataset's.

    Pictures for regularisation show what the words mean without the LoRA: theirs stand as written.
    """
    if role == "regularisation":
        return caption
    return compose(
        caption,
        prefix=config.caption_prefix,
        suffix=config.caption_suffix,
        trigger_word=config.trigger_word,
    )


def check(rows: Sequence[Row], config: ImageConfig, read: Read) -> list[Problem]:
    """Warnings of captions, in the order of the rows; last what concerns all of them.

    Args:
        rows: Records and the datasets they stand in; gone through several times.
        config: Of the run.
        read: How the base model's tokenizer reads prompts.
    """
    return [
        *_cut(rows, config, read),
        *_unreadable(rows),
        *_without_trigger(rows, config),
        *_repeated(rows),
    ]


def _learned(rows: Sequence[Row]) -> Iterator[tuple[Record, str]]:
    """Captions that are not blank, of pictures that are learned."""
    for record, dataset in rows:
        if dataset.role == "train":
            yield from ((record, text) for text in record.captions if text.strip())


def _cut(rows: Sequence[Row], config: ImageConfig, read: Read) -> list[Problem]:
    def prompts() -> Iterator[tuple[Record, str]]:
        for record, dataset in rows:
            yield from ((record, composed(t, config, dataset.role)) for t in record.captions)

    varied = "; as the tags are shuffled, other ones each time" if config.shuffle_tags else ""
    problems = []
    readings = read(prompt for _, prompt in prompts())
    for (record, prompt), reading in zip(prompts(), readings, strict=True):
        if reading.cut_at is None:
            continue
        lost = shorten(prompt[reading.cut_at :].strip(" ,"), _LOST_SHOWN)
        what = (
            f"the caption has {reading.tokens} tokens; {config.max_caption_tokens} are read "
            f'(max_caption_tokens), which leaves out "{lost}"{varied}. Shorten it'
        )
        if config.max_caption_tokens < 225:
            what += " or raise max_caption_tokens"
        problems.append(Problem(record.where, what, "warning", "caption-cut"))
    return problems


def _unreadable(rows: Sequence[Row]) -> list[Problem]:
    problems = []
    for record, _ in rows:
        found = next(filter(None, map(script_of, record.captions)), None)
        if found is None:
            continue
        what = (
            f"the caption is written in {found} letters, which the text encoder (CLIP) cannot "
            "read: it was trained on English and takes them for meaningless pieces. Translate it"
        )
        problems.append(Problem(record.where, what, "warning", "caption-script"))
    return problems


def _without_trigger(rows: Sequence[Row], config: ImageConfig) -> list[Problem]:
    """Captions that lack the trigger word where others hold it: often a typing mistake."""
    word = config.trigger_word
    if word is None:
        return []

    def holds(text: str) -> bool:
        return holds_word(config.caption_prefix + text + config.caption_suffix, word)

    holding = total = 0
    for _, text in _learned(rows):
        holding, total = holding + holds(text), total + 1
    if not holding:
        return []
    return [
        Problem(
            record.where,
            f"{show(word)} (trigger_word) is missing here, and stands in {holding} of "
            f"{total} captions; it is put in front. Is it mistyped?",
            "warning",
            "trigger-word",
        )
        for record, text in _learned(rows)
        if not holds(text)
    ]


def _repeated(rows: Sequence[Row]) -> list[Problem]:
    """A caption that more than half of the pictures have.

    Found by voting (Boyer and Moore, "MJRTY", 1981): whoever has a majority is left in the end.
    """
    text, lead = "", 0
    for _, caption in _learned(rows):
        if lead == 0:
            text = caption.strip()
        lead += 1 if caption.strip() == text else -1
    same = [0, 0]  # other captions, this one
    for _, caption in _learned(rows):
        same[caption.strip() == text] += 1
    times, total = same[1], sum(same)
    if total < FEWEST or times <= total / 2:
        return []
    first = next(record for record, caption in _learned(rows) if caption.strip() == text)
    what = (
        f"{times} of {total} captions are {show(text)}: what the pictures differ in has no "
        "word of its own and is learned with these. Describe each picture"
    )
    return [Problem(first.where, what, "warning", "repeated-caption")]


def script_of(text: str) -> str | None:
    """What a text is written in that CLIP does not know; None if it does, or for a letter or two.

    One Chinese, Japanese or Korean character is a word; of other scripts three letters are.
    """
    counts = Counter(map(_script, filter(str.isalpha, text)))
    if counts["Japanese"]:
        return "Japanese"
    for name in ("Chinese", "Korean"):
        if counts[name]:
            return name
    others = [(number, name) for name, number in counts.items() if name and number > 2]
    return max(others)[1] if others else None


def _script(letter: str) -> str:
    """The script of a letter; "" if CLIP reads it."""
    if letter < "\u0250":
        return ""
    first = unicodedata.name(letter, "").split(" ")[0]
    match first:
        case "HIRAGANA" | "KATAKANA":
            return "Japanese"
        case "CJK":
            return "Chinese"
        case "HANGUL":
            return "Korean"
        case "CYRILLIC" | "ARABIC" | "HEBREW" | "THAI" | "GREEK" | "DEVANAGARI":
            return first.capitalize()
        case "ARMENIAN" | "GEORGIAN" | "BENGALI" | "TAMIL" | "TELUGU" | "KHMER" | "ETHIOPIC":
            return first.capitalize()
        case _:
            return ""
