"""Captions in files beside the images: `img01.txt` or `img01.caption` beside `img01.png`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_scripts.data.folders import joined, stem_of, suffix_of
from lora_scripts.data.image_folder import CAPTION_SUFFIXES, ImageFolder
from lora_scripts.data.metadata import Row
from lora_scripts.data.reading import Refused, count, read_file, show, unix_lines
from lora_scripts.errors import Problem

_NO_CAPTIONS = ("readme", "license", "licence")  # names of .txt files that are there to be read


def read_sidecars(listing: ImageFolder) -> tuple[list[Row], list[Problem]]:
    """A row for each image, in the order of their names, and every problem.

    An image without a caption file has the caption that kohya's folder names give it, or none.
    """
    rows: list[Row] = []
    problems = [refused.problem(show(name)) for name, refused in listing.refused.items()]
    missing: list[str] = []
    for name in listing.images:
        beside = _beside(listing, name)
        if beside is None:
            folder = name.split("/")[0]
            caption = folder.partition("_")[2] if folder in listing.repeats else ""
            if not caption:
                missing.append(name)
            rows.append(Row(name, name, caption))
            continue
        try:
            caption = unix_lines(read_file(joined(listing.path, beside))).strip()
        except Refused as refused:
            problems.append(refused.problem(beside))
            continue
        if not caption:
            problems.append(Problem(beside, "the caption is empty", "warning", "empty-caption"))
        rows.append(Row(beside, name, caption))
    problems += _shared(listing) + _not_read(listing)
    return rows, problems + _missing(listing, missing)


def ignored_sidecars(listing: ImageFolder, file: str) -> list[Problem]:
    """A warning where caption files lie beside the images but a metadata file is read."""
    beside = [_beside(listing, name) for name in listing.images]
    if not (found := [name for name in beside if name is not None]):
        return []
    what = (
        f"{count(found, 'caption file')} beside the images not read, because the captions come "
        f"from {file}; remove or rename the one that you do not want"
    )
    return [Problem(str(listing.path), what, "warning", "caption-file-ignored")]


def label_command(folder: Path, metadata: Path) -> str:
    """The command that makes captions."""
    return f"python tools/auto_label.py --input {folder} --output {metadata}"


def _beside(listing: ImageFolder, image: str) -> str | None:
    keys = (stem_of(image) + suffix for suffix in CAPTION_SUFFIXES)
    return next((listing.captions[key] for key in keys if key in listing.captions), None)


def _shared(listing: ImageFolder) -> list[Problem]:
    """Images that differ only in their extension have one caption file."""
    problems = []
    first: dict[str, str] = {}
    for name in listing.images:
        beside = _beside(listing, name)
        if beside is not None and first.setdefault(beside, name) != name:
            what = (
                f"belongs to {show(first[beside])} and to {show(name)}, which differ only in the "
                "extension; give them other names, or remove one"
            )
            problems.append(Problem(beside, what, "warning", "shared-caption"))
    return problems


def _not_read(listing: ImageFolder) -> list[Problem]:
    """Files that seem to be captions, but by their names are those of no image."""
    images = {stem_of(name): name for name in listing.images}
    found = {
        name: _hint(name, listing, images)
        for name in listing.captions.values()
        if stem_of(name) not in images
        and stem_of(name).rpartition("/")[2].casefold() not in _NO_CAPTIONS
    }
    for name in listing.dotless:
        suffix = next(suffix for suffix in CAPTION_SUFFIXES if name.endswith(suffix[1:]))
        right = name.removesuffix(suffix[1:]) + suffix
        if stem_of(right) in images:
            found[name] = f'the dot before "{suffix[1:]}" is missing; rename it {show(right)}'
    what = "this caption is read for no image: "
    return [
        Problem(name, what + hint, "warning", "caption-without-image")
        for name, hint in found.items()
    ]


def _hint(name: str, listing: ImageFolder, images: Mapping[str, str]) -> str:
    """What to do with a caption file that has no image."""
    if stem_of(name) in listing.images:
        right = stem_of(stem_of(name)) + suffix_of(name)
        return f"the name of an image without its extension is needed; rename it {show(right)}"
    folded = stem_of(name).casefold()
    near = next((image for each, image in images.items() if each.casefold() == folded), None)
    if near is not None:
        return f"the nearest is {show(near)}, where upper and lower case differ"
    return "none has its name; rename it, or remove it"


def _missing(listing: ImageFolder, missing: list[str]) -> list[Problem]:
    if missing and len(missing) == len(listing.images):
        command = label_command(listing.path, listing.path / "metadata.csv")
        what = (
            "no captions found: no metadata.csv, no metadata.jsonl, no .txt beside an image. "
            f"Make them with: {command} (to train without captions on purpose, put an empty "
            ".txt file beside each image)"
        )
        if listing.tables:
            what += f"; {show(listing.tables[0])} is there: to read it, name it as metadata_path"
        return [Problem(str(listing.path), what, "error", "no-captions")]
    if missing:
        what = "without a .txt file beside them: their captions are empty"
        found = f"{count(missing, 'image')} {what}"
        return [Problem(str(listing.path), found, "warning", "captions-missing")]
    return []
