"""Masks: where a picture is learned. White is learned, black is not, grey in part.

A mask is a file of the picture's name in `mask_dir`; without that a file `NAME-masklabel.png` (as
OneTrainer writes them) or `NAME_mask.png` beside the picture, else the picture's own alpha channel.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_scripts.data import pixels
from lora_scripts.data.buckets import Size
from lora_scripts.data.folders import link_problem
from lora_scripts.data.image_folder import SUFFIXES
from lora_scripts.data.reading import count
from lora_scripts.data.records import Record
from lora_scripts.errors import Problem, UserError
from lora_scripts.files import AnyPath
from lora_scripts.schema import ImageDataset


def find(record: Record, dataset: ImageDataset) -> str | None:
    """The file that holds a picture's mask, the picture itself for its alpha; None without one.

    Raises:
        UserError: if `mask_dir` holds no mask of that name.
    """
    if dataset.mask_dir is not None:
        inside = os.path.relpath(record.file, dataset.path)
        without = os.path.join(dataset.mask_dir, os.path.splitext(inside)[0])
        for place in (without + suffix for suffix in SUFFIXES):
            if os.path.isfile(place):
                _refuse_link(dataset.mask_dir, place)
                return place
        what = f"no mask for {inside} in {dataset.mask_dir}; a white one learns all of it"
        raise UserError([Problem(record.where, what, "error", "no-mask")])
    if record.mask is not None:
        return record.mask
    with pixels.open_image(record.file) as image:
        return record.file if image.has_transparency_data else None


def _refuse_link(folder: Path, place: str) -> None:
    why = link_problem(folder, Path(place), thing="mask", home="the folder of masks")
    if why is not None:
        raise UserError([Problem(place, why, "error", "link")])


def check(rows: Sequence[tuple[Record, ImageDataset]]) -> list[Problem]:
    """Masks that are missing, of another shape than their picture, or black all over.

    Rows whose `mask_dir` is no folder are passed over: that is told once, by the key.
    """
    looked_at = [row for row in rows if row[1].mask_dir is None or row[1].mask_dir.is_dir()]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(_look, looked_at))
    problems = [problem for trouble in found if trouble is not None for problem in trouble]
    without = [
        record.name
        for (record, _), trouble in zip(looked_at, found, strict=True)
        if trouble is None
    ]
    if found and len(without) == len(found):
        what = "is true, but no picture has a mask: no mask_dir, no file NAME-masklabel, no alpha"
        problems.append(Problem("masked_loss", what, "error", "no-mask"))
    elif without:
        what = f"{count(without, 'picture')} without a mask: learned whole"
        problems.append(Problem("masked_loss", what, "warning", "without-mask"))
    return problems


def _look(row: tuple[Record, ImageDataset]) -> list[Problem] | None:
    """What is wrong with a picture's mask; None if it has none."""
    record, dataset = row
    try:
        place = find(record, dataset)
        return None if place is None else _trouble(record, place)
    except UserError as error:
        return error.problems


def _trouble(record: Record, place: str) -> list[Problem]:
    with pixels.open_image(record.file) as image:
        size = pixels.upright_size(image)
    mask = load(place, is_alpha=place == record.file)
    if abs(mask.width * size[1] - mask.height * size[0]) > 0.01 * size[0] * size[1]:
        found = f"{mask.width}×{mask.height}"
        what = f"this mask is {found}, its picture {size[0]}×{size[1]}: another shape"
        return [Problem(place, what, "error", "mask-shape")]
    if not mask.getbbox():
        what = "this mask is black all over: nothing would be learned"
        return [Problem(place, what, "error", "black-mask")]
    return []


def load(path: AnyPath, *, is_alpha: bool) -> Image.Image:
    """A mask as a grey picture (mode L), upright.

    Raises:
        UserError: naming the file, if it cannot be decoded.
    """
    if not is_alpha:
        return pixels.load_rgb(path).convert("L")
    alpha = pixels.load_alpha(path)
    assert alpha is not None  # `find` saw it
    return alpha


def to_bucket(
    mask: Image.Image, size: Size, bucket: Size, corner: tuple[int, int] | None
) -> NDArray[np.uint8]:
    """The mask cut as its picture of `size` is: mask_HW, 0 to 255."""
    whole = mask if mask.size == size else mask.resize(size, Image.Resampling.BOX)
    return pixels.to_bucket(whole, bucket, corner)
