"""What a data set of pictures is like, in figures and as a contact sheet."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from lora_scripts import grid
from lora_scripts.data import buckets, fitting, pixels
from lora_scripts.data.caption_checks import Read, composed
from lora_scripts.data.looking import Look
from lora_scripts.data.reading import plain, shorten
from lora_scripts.data.validate import Row
from lora_scripts.errors import Problem, user_error
from lora_scripts.schema import ImageConfig

_PLACE = re.compile(r"(?P<file>.+) (?:line|row) (?P<line>\d+)(?:: .*)?", re.DOTALL)
TAGS = 20  # so many of the most frequent ones
ON_SHEET = 120  # pictures; of more, so many at even distances


@dataclass(frozen=True)
class Spread:
    """The least, the middle and the most of some numbers."""

    least: int
    middle: int
    most: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Spread:
        """Of at least one number."""
        return cls(min(numbers), round(median(numbers)), max(numbers))

    def __str__(self) -> str:
        return f"{self.least:,} to {self.most:,}, median {self.middle:,}"


@dataclass(frozen=True)
class Bucket:
    """How many pictures are trained at a size."""

    width: int
    height: int
    pictures: int


@dataclass(frozen=True)
class Report:
    """Figures of the pictures that can be used.

    Attributes:
        roles: How many there are for each role of datasets.
        width, height: In pixels, upright.
        buckets: From the tallest to the widest, empty ones left out.
        tokens: Of the captions as they are trained, prefix and trigger word included.
        tags: The most frequent parts of captions between commas, those seen once left out.
    """

    pictures: int
    captions: int
    roles: dict[str, int]
    width: Spread
    height: Spread
    buckets: list[Bucket]
    tokens: Spread
    tags: dict[str, int]

    def values(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For people."""
        roles = ", ".join(f"{number:,} {role}" for role, number in self.roles.items())
        yield f"Pictures: {self.pictures:,} ({roles}), captions: {self.captions:,}"
        yield f"Width: {self.width}. Height: {self.height}"
        dealt = ", ".join(f"{b.width}×{b.height}: {b.pictures:,}" for b in self.buckets)
        yield f"Trained at: {dealt}"
        yield f"Tokens of a caption: {self.tokens}"
        if self.tags:
            often = ", ".join(f"{shorten(tag, 40)} ({n:,})" for tag, n in self.tags.items())
            yield f"Most frequent tags: {often}"


def of_pictures(
    rows: Sequence[Row], looks: Sequence[Look], config: ImageConfig, read: Read
) -> Report:
    """Figures of at least one picture, all of them good."""
    sizes = fitting.sizes_of(config)
    dealt = Counter(sizes[buckets.assign(look.size, sizes)] for look in looks)
    prompts = (composed(t, config, data.role) for record, data in rows for t in record.captions)
    tokens = [each.tokens for each in read(prompts)]
    tags = Counter(tag for record, _ in rows for text in record.captions for tag in _tags(text))
    return Report(
        pictures=len(rows),
        captions=len(tokens),
        roles=dict(Counter(dataset.role for _, dataset in rows)),
        width=Spread.of([look.size[0] for look in looks]),
        height=Spread.of([look.size[1] for look in looks]),
        buckets=[Bucket(*size, dealt[size]) for size in sizes if dealt[size]],
        tokens=Spread.of(tokens),
        tags={tag: number for tag, number in tags.most_common(TAGS) if number > 1},
    )


def as_json(problems: Sequence[Problem], figures: Mapping[str, Any] | None) -> str:
    """Everything that was found, for machines. `figures` are null where the data cannot be used."""
    names = {"error": "errors", "warning": "warnings", "note": "notes"}
    found: dict[str, Any] = {name: [] for name in names.values()}
    for problem in problems:
        found[names[problem.severity]].append(_values(problem))
    return json.dumps({**found, "report": figures}, ensure_ascii=False, indent=2)


def _values(problem: Problem) -> dict[str, Any]:
    match = _PLACE.fullmatch(problem.where)
    return {
        "kind": problem.kind or "config",
        "severity": problem.severity,
        "where": problem.where,
        "file": match["file"] if match else problem.where,
        "line": int(match["line"]) if match else None,
        "what": problem.what,
    }


def _tags(caption: str) -> set[str]:
    return {tag for part in caption.split(",") if (tag := part.strip())}


def contact_sheet(rows: Sequence[Row], looks: Sequence[Look], path: Path) -> int:
    """Write the pictures with their names, sizes and captions as one PNG; how many are on it.

    Raises:
        UserError: if the file cannot be written, or a picture not be read.
    """
    step = max(1.0, len(rows) / ON_SHEET)
    chosen = [int(number * step) for number in range(min(len(rows), ON_SHEET))]
    small: list[Image.Image] = []
    labels = []
    for index in chosen:
        record, (width, height) = rows[index][0], looks[index].size
        picture = pixels.load_rgb(record.file)
        picture.thumbnail((384, 384))
        small.append(picture)
        labels.append([record.name, f"{width} x {height}", plain(record.captions[0])])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        grid.sheet(small, labels).save(path, "PNG")
    except OSError as error:
        what = f"cannot be written ({error.strerror or error})"
        raise user_error(f"--contact-sheet {path}", what) from None
    return len(chosen)
