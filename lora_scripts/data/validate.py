"""Checks of the images themselves, before anything is trained on. Reports all, repairs nothing."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from PIL import ImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from lora_scripts.data.buckets import Size
from lora_scripts.data.pixels import open_image, orientation, profile_fits, upright_size
from lora_scripts.data.records import Record
from lora_scripts.errors import Problem, UserError

_TAIL = 1 << 16  # where the end mark of a JPEG is looked for: cameras append data behind it
T = TypeVar("T")


def check(records: Sequence[Record]) -> list[Problem]:
    """Everything wrong with the image files, in the order of the records.

    Errors: a file that is not there, is no image, is damaged or cut short, is too large to be
    decoded safely. Warnings: animations, unreadable EXIF or colour profiles, files with exactly the
    same content. Headers, check sums and end marks are read; pixels are decoded only where these
    look wrong. A `Problem`'s place is the image; its text ends with the record's own place.
    """
    problems: list[Problem] = []
    good: list[Record] = []
    for record, found in zip(records, _in_threads(_check_file, records), strict=True):
        problems += found
        if all(problem.severity == "warning" for problem in found):
            good.append(record)
    return problems + _duplicates(good)


def image_sizes(records: Sequence[Record]) -> list[Size]:
    """(width, height) in pixels of each image, upright; reads the headers only.

    Raises:
        UserError: naming every file whose header cannot be read.
    """
    sizes: list[Size] = []
    problems: list[Problem] = []
    for found in _in_threads(_size_or_problems, records):
        if isinstance(found, UserError):
            problems += found.problems
        else:
            sizes.append(found)
    if problems:
        raise UserError(problems)
    return sizes


def _in_threads(work: Callable[[Record], T], records: Sequence[Record]) -> list[T]:
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        return list(pool.map(work, records))


def _size_or_problems(record: Record) -> Size | UserError:
    try:
        with open_image(record.path) as image:
            return upright_size(image)
    except UserError as error:
        return error


def _check_file(record: Record) -> list[Problem]:
    where, place = str(record.path), f" ({record.where})"
    try:
        with open_image(record.path) as image:
            remarks = list(_remarks(image))
            whole = _seems_whole(image, record.path)
        if not whole:
            with open_image(record.path) as image:
                image.load()
    except UserError as error:
        return [Problem(where, problem.what + place) for problem in error.problems]
    return [Problem(where, remark + place, "warning") for remark in remarks]


def _remarks(image: ImageFile.ImageFile) -> Iterator[str]:
    if isinstance(image, PngImageFile | WebPImageFile) and image.is_animated:
        yield f"this is an animation of {image.n_frames} frames; only the first is used"
    if orientation(image) is None:
        yield "its EXIF data cannot be read; the image is taken as upright"
    profile = image.info.get("icc_profile")
    if profile and not profile_fits(profile, image.mode):
        yield "its colour profile does not fit or cannot be read; its colours are taken as sRGB"


def _seems_whole(image: ImageFile.ImageFile, path: Path) -> bool:
    """Cheap signs that the file is complete. False means: decode it to know."""
    size = path.stat().st_size
    match image.format:
        case "PNG":
            try:
                image.verify()  # the check sum of every chunk
            except (OSError, SyntaxError, ValueError):
                return False
            return True
        case "JPEG" | "MPO":
            tail = _read(path, max(0, size - _TAIL), _TAIL)
            # the end mark behind the last scan: a thumbnail in the header has one of its own
            return tail.rfind(b"\xff\xd9") > tail.rfind(b"\xff\xda")
        case "WEBP":
            return size >= 8 + int.from_bytes(_read(path, 4, 4), "little")
        case _:
            return False


def _read(path: Path, start: int, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(count)


def _duplicates(records: Sequence[Record]) -> list[Problem]:
    """A warning for each file that repeats an earlier one byte for byte."""
    sizes = [record.path.stat().st_size for record in records]
    often = Counter(sizes)
    alike = [record for record, size in zip(records, sizes, strict=True) if often[size] > 1]
    first: dict[bytes, Record] = {}
    problems: list[Problem] = []
    for record, digest in zip(alike, _in_threads(_digest, alike), strict=True):
        earlier = first.setdefault(digest, record)
        if earlier is not record:
            what = (
                f"the same image as {earlier.path} ({earlier.where}), byte for byte; it counts "
                f"twice. Remove one ({record.where})"
            )
            problems.append(Problem(str(record.path), what, "warning"))
    return problems


def _digest(record: Record) -> bytes:
    with record.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
