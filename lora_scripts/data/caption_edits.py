"""What `lora-scripts captions` does to one caption. Pure functions.

The edits of one command are made in this order, whatever the order they were typed in:

1. `remove`: tags that are dropped whole;
2. `replace`: whole words or tags, one pair after the other as typed;
3. `add`: tags put at the end, unless they are there;
4. `suffix`, then `prefix`: text put behind and before, exactly as typed, unless it is there;
5. `trigger`: the word put in front, followed by ", ", unless the caption holds it.

Tags stand between commas. In tags and in the trigger word upper and lower case do not count, nor
does `_` for a blank in tags; in `replace` letters count as typed. So the same command typed again
changes nothing, unless a replacement holds the word that it replaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora_scripts.data.captions import compose, replace_word


@dataclass(frozen=True)
class Edits:
    """What shall be done to every caption. Tags hold no comma, and no blank at their ends."""

    remove: Sequence[str] = ()
    replace: Sequence[tuple[str, str]] = ()
    add: Sequence[str] = ()
    suffix: str = ""
    prefix: str = ""
    trigger: str | None = None

    def each(self) -> Iterator[tuple[str, Edits]]:
        """As it is typed, and alone, each edit of these."""
        yield from ((f"--remove {tag}", Edits(remove=(tag,))) for tag in self.remove)
        yield from ((f"--replace {old}={new}", Edits(replace=((old, new),)))
                    for old, new in self.replace)  # fmt: skip
        yield from ((f"--add {tag}", Edits(add=(tag,))) for tag in self.add)
        if self.suffix:
            yield f"--suffix {self.suffix}", Edits(suffix=self.suffix)
        if self.prefix:
            yield f"--prefix {self.prefix}", Edits(prefix=self.prefix)
        if self.trigger is not None:
            yield f"--trigger {self.trigger}", Edits(trigger=self.trigger)


def edited(caption: str, edits: Edits) -> str:
    """The caption after all edits. What none of them concerns stays as it is, blanks too."""
    for tag in edits.remove:
        caption = _without_tag(caption, tag)
    for old, new in edits.replace:
        caption = replace_word(caption, old, new)
    for tag in edits.add:
        caption = _with_tag(caption, tag)
    if not caption.rstrip().endswith(edits.suffix.rstrip()):
        caption += edits.suffix
    if not f"{caption} ".startswith(edits.prefix):
        caption = edits.prefix + caption
    return compose(caption, prefix="", suffix="", trigger_word=edits.trigger)


def tags_of(text: str) -> list[str]:
    """The tags between commas, without blanks around them; none that is empty."""
    return [tag for tag in (part.strip() for part in text.split(",")) if tag]


def _without_tag(caption: str, tag: str) -> str:
    parts = caption.split(",")
    kept = [part for part in parts if _same(part) != _same(tag)]
    if len(kept) == len(parts):
        return caption
    return ",".join(kept).lstrip() if _same(parts[0]) == _same(tag) else ",".join(kept)


def _with_tag(caption: str, tag: str) -> str:
    if _same(tag) in map(_same, caption.split(",")):
        return caption
    before = caption.rstrip(", \t\r\n")
    return f"{before}, {tag}" if before else tag


def _same(tag: str) -> str:
    return tag.replace("_", " ").strip().casefold()
