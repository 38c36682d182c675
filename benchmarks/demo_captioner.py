"""Does the demo's captioner name things that it has not seen? Measured through the labeller's code.

    python scripts/demo_drawings.py draw      # only for the second set
    python benchmarks/demo_captioner.py [--model demo] [--drawings build/drawings] [--mistakes]

Two sets of drawings of things that the captioner knows from other hands:

* the 120 stencils of the demo's LoRA; no stencil at all was in the captioner's training;
* the drawings of `assets/demo/captioner_heldout.csv`, which were kept out of it: their styles were
  not. Left out when there are no drawings in `--drawings`.

Prints, for each, how many things are named rightly, how many captions are right to the letter
("a drawing of an owl"), and what guessing would reach: any of the names at random, and always the
name that comes most often in the set. `--mistakes` lists what was said of what.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_scripts.label import captioner
from lora_scripts.logs import quiet_libraries

DATA = Path("assets/demo")
STENCILS = (
    (DATA / "style_images", DATA / "style_images" / "metadata.csv"),
    (DATA / "heldout_images", DATA / "heldout.csv"),
)
HELD_OUT = DATA / "captioner_heldout.csv"
KNOWN = 159  # names that the captioner can say
FORM = re.compile(r"a drawing of [a-z][a-z -]*[a-z]")
BATCH = 32


@dataclass(frozen=True)
class Named:
    """A picture, what should be said of it, "a drawing of an owl", and what was said."""

    file: Path
    wanted: str
    caption: str

    @property
    def right(self) -> bool:
        """Is the right thing named?"""
        return thing(self.caption) == thing(self.wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=captioner.DEMO, help="a BLIP's folder, or `demo`")
    parser.add_argument("--drawings", type=Path, default=Path("build/drawings"))
    parser.add_argument("--mistakes", action="store_true", help="list them")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()
    quiet_libraries()
    path = captioner.find("blip", arguments.model)
    caption = captioner.load("blip", path, captioner.Settings(), "cpu")

    pictures = {"stencils (a style never seen)": [row for pair in STENCILS for row in rows(*pair)]}
    if arguments.drawings.is_dir():
        pictures["drawings kept out, in known styles"] = rows(arguments.drawings, HELD_OUT)
    started = time.monotonic()
    sets = {label: name_all(caption, listed) for label, listed in pictures.items()}
    seconds = time.monotonic() - started
    figures = {label: measure(named) for label, named in sets.items()}
    report(figures)
    count = sum(map(len, sets.values()))
    print(f"\n({count} pictures, {count / seconds:.0f} a second)")
    if arguments.mistakes:
        for named in sets.values():
            list_mistakes(named)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


def rows(folder: Path, table: Path) -> list[tuple[Path, str]]:
    """Each picture of a captions file and what should be said of it, "a drawing of an owl"."""
    with table.open(encoding="utf-8", newline="") as stream:
        listed = list(csv.DictReader(stream))
    said = [re.sub(r"^(a (drawing|picture) of )?", "a drawing of ", row["text"]) for row in listed]
    return [(folder / row["file_name"], text) for row, text in zip(listed, said, strict=True)]


def thing(text: str) -> str:
    """What a caption is about: "owl" of "a drawing of an owl"; all of it if it has another form."""
    return re.sub(r"^a drawing of (an? )?", "", text)


def name_all(caption: captioner.Caption, listed: Sequence[tuple[Path, str]]) -> list[Named]:
    """Caption every picture."""
    named = []
    for start in range(0, len(listed), BATCH):
        batch = listed[start : start + BATCH]
        said = caption([Image.open(file).convert("RGB") for file, _ in batch])
        named += [Named(*row, text) for row, text in zip(batch, said, strict=True)]
    return named


def measure(named: Sequence[Named]) -> dict[str, float]:
    """The figures of one set; the interval is Wilson's (1927) at 95%."""
    count, right = len(named), sum(one.right for one in named)
    low, high = wilson(right, count)
    commonest = Counter(one.wanted for one in named).most_common(1)[0][1]
    return {
        "pictures": count,
        "named": right,
        "share": right / count,
        "low": low,
        "high": high,
        "to the letter": sum(one.caption == one.wanted for one in named) / count,
        "of the form": sum(FORM.fullmatch(one.caption) is not None for one in named) / count,
        "chance": 1 / KNOWN,
        "commonest name": commonest / count,
    }


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Bounds of a share: (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n)."""
    share, square = right / count, z * z / count
    half = z * math.sqrt(share * (1 - share) / count + square / (4 * count))
    middle = share + square / 2
    return (middle - half) / (1 + square), (middle + half) / (1 + square)


def report(figures: dict[str, dict[str, float]]) -> None:
    """A Markdown table."""
    print("| pictures | named rightly | 95% | to the letter | form | chance | commonest name |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for label, row in figures.items():
        cells = [
            f"{row['named']} of {row['pictures']}, {row['share']:.0%}",
            f"{row['low']:.0%}-{row['high']:.0%}",
            *(f"{row[key]:.0%}" for key in ("to the letter", "of the form")),
            *(f"{row[key]:.1%}" for key in ("chance", "commonest name")),
        ]
        print(f"| {label} | " + " | ".join(cells) + " |")


def list_mistakes(named: Sequence[Named]) -> None:
    """What was said of what."""
    print()
    for one in named:
        if not one.right:
            print(f"{one.file.as_posix()}: {one.caption}")


if __name__ == "__main__":
    main()
