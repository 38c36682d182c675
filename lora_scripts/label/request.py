"""What the user asks of a labelling, and what is wrong with that before anything is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lora_scripts.data.reading import is_unicode, show
from lora_scripts.errors import Problem
from lora_scripts.label import captioner
from lora_scripts.label.captioner import Settings
from lora_scripts.label.rows import FORMATS
from lora_scripts.label.wording import Wording

DEVICES = ("auto", "cpu", "cuda")
TAGGER = "wd14"
OF_PARTS = (TAGGER, "vlm")  # captioners whose captions may be lists of tags
REVIEW_SUFFIXES = (".html", ".htm")
MOST_WORKERS = 8


@dataclass(frozen=True)
class LabelRequest:
    """What `lora-scripts label` is asked for.

    Attributes:
        input: The folder of images.
        output: The captions file; default: `metadata.csv` or `.jsonl` in the folder.
        captioner: One of `captioner.NAMES`; default: what the folder of `model` is, else blip.
        model: A folder, a hub id or `demo`; default: the captioner's usual weights.
        format: One of `FORMATS`; default: by the ending of `output`, else csv.
        recursive: Images in sub-folders, too.
        dry_run: Say what would be done, show a few captions, write nothing.
        overwrite: Images that have a caption get a new one.
        review: The page to write.
        batch_size: Images that are captioned together.
        workers: Threads that decode; default: one for each core, at most `MOST_WORKERS`.
        device: One of `DEVICES`.
    """

    input: Path
    output: Path | None = None
    captioner: str | None = None
    model: str | None = None
    settings: Settings = field(default_factory=Settings)
    wording: Wording = field(default_factory=Wording)
    format: str | None = None
    recursive: bool = False
    dry_run: bool = False
    overwrite: bool = False
    review: Path | None = None
    batch_size: int = 8
    workers: int | None = None
    device: str = "auto"

    @property
    def format_name(self) -> str:
        """The format that captions are written in."""
        if self.format is not None:
            return self.format
        suffix = "" if self.output is None else self.output.suffix.lower().removeprefix(".")
        return suffix if suffix in FORMATS else FORMATS[0]

    @property
    def output_path(self) -> Path:
        """The captions file (not used by txt)."""
        return self.output or self.input / f"metadata.{self.format_name}"

    @property
    def threads(self) -> int:
        """How many images are decoded at a time."""
        return self.workers or min(MOST_WORKERS, os.cpu_count() or 1)


def problems(request: LabelRequest) -> list[Problem]:
    """Everything wrong with the options and the places that they name."""
    found: list[Problem] = []
    for option, value, choices in (
        ("--captioner", request.captioner, captioner.NAMES),
        ("--format", request.format, FORMATS),
        ("--device", request.device, DEVICES),
    ):
        if value is not None and value not in choices:
            found.append(Problem(f"{option} {value}", f"must be one of {', '.join(choices)}"))
    found += _of_places(request)
    found += _of_wording(request.wording)
    return found


def problems_with(request: LabelRequest, name: str) -> list[Problem]:
    """What would do nothing with the captioner of this name."""
    found = captioner.misfits(name, request.settings)
    if request.wording.max_tags is not None and name not in OF_PARTS:
        what = f"is for lists of tags; {name} writes sentences. Leave it out, or take --captioner "
        found.append(Problem("--max-tags", what + " or ".join(OF_PARTS)))
    return found


def _of_places(request: LabelRequest) -> Iterator[Problem]:
    output, review = request.output, request.review
    if output is not None and request.format_name == "txt":
        what = "txt files lie beside the images; leave it out, or take --format csv or jsonl"
        yield Problem(f"--output {output}", what)
    elif output is not None:
        wanted = request.format_name
        if wanted in FORMATS and output.suffix.lower() != f".{wanted}":
            yield Problem(f"--output {output}", f"must end with .{wanted}, or give --format")
        yield from _of_file("--output", output)
    if review is not None:
        if review.suffix.lower() not in REVIEW_SUFFIXES:
            yield Problem(f"--review {review}", "is a page: must end with .html")
        yield from _of_file("--review", review)


def _of_file(option: str, path: Path) -> Iterator[Problem]:
    if path.is_dir():
        yield Problem(f"{option} {path}", "this is a folder; name a file in it")
    elif not path.parent.is_dir():
        yield Problem(f"{option} {path}", f"there is no folder {path.parent}; make it first")


def _of_wording(wording: Wording) -> Iterator[Problem]:
    texts = {"--prefix": [wording.prefix], "--suffix": [wording.suffix]}
    texts |= {"--trigger": [wording.trigger or ""], "--blacklist": list(wording.blacklist)}
    for option, each in texts.items():
        if bad := [text for text in each if not is_unicode(text) or "\0" in text]:
            yield Problem(f"{option} {show(bad[0])}", "holds a character that no file can hold")
    if wording.trigger is not None and not wording.trigger.strip():
        yield Problem("--trigger", "is blank; leave it out")
