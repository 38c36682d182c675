"""A page to check captions at a glance: thumbnails, captions, counts, all in one HTML file.

The page needs no network and no other file. Thumbnails are made and written a few at a time, so
memory does not grow with the folder; each takes 2 to 6 KB of the page.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from lora_scripts.data.pixels import load_rgb
from lora_scripts.errors import UserError
from lora_scripts.files import replace

SIDE = 160  # longest side of a thumbnail in pixels; shown at this size
QUALITY = 60  # of its JPEG
MOST_FREQUENT = 40  # tags and words that are listed
SHORTEST_WORD = 3  # letters of a word that is counted; shorter ones say little ("a", "of")


@dataclass(frozen=True)
class Entry:
    """An image of the page, its caption (blank: none), and whether it was made just now."""

    name: str
    caption: str
    is_new: bool


@dataclass(frozen=True)
class Card:
    """What the page shows of an entry: `source` is its thumbnail, or `why` there is none."""

    entry: Entry
    source: str = ""
    why: str = ""
    same: int = 1  # how many images have this caption


def write(path: Path, folder: Path, entries: Sequence[Entry], workers: int) -> None:
    """Write the page, whole or not at all.

    Args:
        path: The page.
        folder: What the names of the entries are relative to.
        entries: The images, in order.
        workers: Threads that decode.

    Raises:
        OSError: if it cannot be written.
    """
    import jinja2

    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (Path(__file__).parent / "review.html").read_text(encoding="utf-8")
    )
    captions = [entry.caption for entry in entries if entry.caption.strip()]
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(
                page.generate(
                    folder=folder,
                    count=len(entries),
                    new=sum(entry.is_new for entry in entries),
                    missing=len(entries) - len(captions),
                    different=len(set(captions)),
                    tags=_most_frequent(tag for text in captions for tag in _tags(text)),
                    words=_most_frequent(word for text in captions for word in _words(text)),
                    cards=_cards(folder, entries, workers),
                )
            )
            stream.flush()
            os.fsync(stream.fileno())
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _most_frequent(things: Iterator[str]) -> list[tuple[str, int]]:
    """How often each is there, the most frequent first; once says nothing."""
    found = [(thing, often) for thing, often in Counter(things).items() if often > 1]
    return sorted(found, key=lambda each: (-each[1], each[0]))[:MOST_FREQUENT]


def _tags(caption: str) -> set[str]:
    """The parts between commas, if there are several."""
    parts = {part.strip() for part in caption.split(",")} - {""}
    return parts if len(parts) > 1 else set()


def _words(caption: str) -> set[str]:
    return {
        word
        for word in re.findall(r"[^\W\d_][\w'’-]*", caption.casefold())
        if len(word) >= SHORTEST_WORD or not word.isascii()
    }


def _cards(folder: Path, entries: Sequence[Entry], workers: int) -> Iterator[Card]:
    """The entries with their thumbnails, a few of them ahead of the page."""
    often = Counter(entry.caption for entry in entries)
    pool = ThreadPoolExecutor(workers)
    left = iter(entries)
    ahead: deque[tuple[Entry, Future[str]]] = deque()
    try:
        while True:
            for entry in islice(left, 2 * workers - len(ahead)):
                ahead.append((entry, pool.submit(_thumbnail, folder / entry.name)))
            if not ahead:
                return
            entry, future = ahead.popleft()
            try:
                yield Card(entry, source=future.result(), same=often[entry.caption])
            except UserError as error:
                yield Card(entry, why=error.problems[0].what)
    finally:
        pool.shutdown(cancel_futures=True)


def _thumbnail(path: Path) -> str:
    """The picture in small, as a data URI. Raises `UserError` if it cannot be read."""
    image = load_rgb(path)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")
