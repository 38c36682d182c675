"""Pictures as a training set: which bucket, which captions, which split; cut for a view."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from lora_scripts.data import buckets, fitting, looking, masks, picture_memory, pixels, records
from lora_scripts.data.caption_checks import composed
from lora_scripts.data.pictures import Picture, Pictures, Size
from lora_scripts.errors import Problem, UserError
from lora_scripts.randomness import seed_of
from lora_scripts.schema import ImageConfig, ImageDataset

_ROLES = ("train", "validation", "regularisation")
_AT_ONCE = 512  # pictures whose contents and sizes are asked for


@dataclass(frozen=True)
class Gathered:
    """The data of a run: what is learned from, what is measured, what is to be kept."""

    train: Pictures
    validation: Pictures
    regularisation: Pictures


@dataclass(frozen=True)
class View:
    """How a picture is cut for a view.

    `corner`: (left, top) in the picture scaled to cover its bucket, before it is mirrored.
    """

    picture: Picture
    corner: tuple[int, int]
    mirrored: bool

    @property
    def shown_corner(self) -> tuple[int, int]:
        """The corner as it is in the mirrored picture."""
        if not self.mirrored:
            return self.corner
        width, _ = buckets.scaled_to_cover(self.picture.size, self.picture.bucket)
        return width - self.corner[0] - self.picture.bucket[0], self.corner[1]


def gather(
    rows: Sequence[tuple[records.Record, ImageDataset]], config: ImageConfig, pixel_multiple: int
) -> Gathered:
    """Deal checked rows into buckets and splits.

    Raises:
        UserError: if the model cannot work on the buckets' sizes, or the weights show nothing.
    """
    sizes = bucket_sizes(config, pixel_multiple)
    with picture_memory.opened(config.cache_dir) as memory:
        pictures = Pictures.of(_pictures(rows, config, sizes, memory), config.cache_dir)
    roles = np.fromiter((_ROLES.index(dataset.role) for _, dataset in rows), np.int8)
    train, validation, kept = (pictures.take(roles == number) for number in range(len(_ROLES)))
    if config.validation_split and len(train) > 1:
        held_out = _drawn(train, config)
        train, validation = train.take(~held_out), train.take(held_out)
    shown = config.epochs * float(train.weights.sum())
    if shown < 1:
        what = f"by their weights {config.epochs} epochs show {shown:g} pictures; raise the weights"
        raise UserError([Problem("datasets", what)])
    return Gathered(train, validation, kept)


def _pictures(
    rows: Iterable[tuple[records.Record, ImageDataset]],
    config: ImageConfig,
    sizes: Sequence[Size],
    memory: picture_memory.PictureMemory,
) -> Iterator[Picture]:
    """Each row's picture.

    Raises:
        UserError: naming every file that cannot be read, once all were looked at.
    """
    left, problems = iter(rows), list[Problem]()
    while some := list(itertools.islice(left, _AT_ONCE)):
        try:
            found = looking.contents_and_sizes([record.file for record, _ in some], memory)
        except UserError as error:
            problems += error.problems
            continue
        for (record, dataset), content, size in zip(some, *found, strict=True):
            yield Picture(
                record=record,
                captions=tuple(composed(text, config, dataset.role) for text in record.captions),
                role=dataset.role,
                size=size,
                bucket=sizes[buckets.assign(size, sizes)],
                weight=record.repeats * dataset.repeats * dataset.weight,
                content=content,
                mask=masks.find(record, dataset) if config.masked_loss else None,
            )
    if problems:
        raise UserError(problems)


def bucket_sizes(config: ImageConfig, pixel_multiple: int) -> list[Size]:
    """The buckets of a run.

    Raises:
        UserError: if the model cannot work on sides that are multiples of `bucket_step`.
    """
    if config.bucket_step % pixel_multiple:
        what = (
            f"found {config.bucket_step}; this model needs a multiple of {pixel_multiple}, "
            "because it halves the picture several times"
        )
        raise UserError([Problem("bucket_step", what)])
    return fitting.sizes_of(config)


def _drawn(train: Pictures, config: ImageConfig) -> np.ndarray:
    """Of each picture whether it is held out: a share, the least drawn."""
    # Keyed by name, so that adding a picture does not move the others between the two.
    draws = np.fromiter(
        (seed_of(config.seed, "split", p.record.name, p.content) for p in train), np.int64
    )
    chosen = max(1, round(len(train) * config.validation_split))
    held_out = np.zeros(len(train), dtype=bool)
    held_out[np.argsort(draws, kind="stable")[:chosen]] = True
    return held_out


def view_of(picture: Picture, chance: np.random.Generator | None, *, mirrored: bool) -> View:
    """The picture cut from its middle, or at a place that `chance` draws.

    A place that is drawn shows at least one point that the mask leaves.
    """
    (wide, high), middle = buckets.crop_box(picture.size, picture.bucket)
    if chance is None:
        return View(picture, middle, mirrored)
    room = wide - picture.bucket[0], high - picture.bucket[1]
    corner = int(chance.integers(room[0] + 1)), int(chance.integers(room[1] + 1))
    if picture.mask is not None and room != (0, 0):
        corner = _around_a_point(picture, (wide, high), corner, chance)
    return View(picture, corner, mirrored)


def _around_a_point(
    picture: Picture, scaled: Size, corner: tuple[int, int], chance: np.random.Generator
) -> tuple[int, int]:
    """The corner, moved as little as shows one point, drawn, where the mask is bright."""
    grey_HW = np.asarray(_mask(picture).resize(scaled))
    rows, columns = np.nonzero(grey_HW >= max(1, grey_HW.max() // 2))
    if not len(rows):
        return corner
    point = int(chance.integers(len(rows)))
    places = []
    for at, place, side in zip(corner, (columns[point], rows[point]), picture.bucket, strict=True):
        places.append(int(min(max(at, place - side + 1), place)))
    limits = scaled[0] - picture.bucket[0], scaled[1] - picture.bucket[1]
    return min(max(places[0], 0), limits[0]), min(max(places[1], 0), limits[1])


def pixels_of(view: View) -> torch.Tensor:
    """The picture cut to its bucket: float32 in [-1, 1], shape (3, height, width)."""
    rgb = pixels.load_rgb(view.picture.record.file)
    array_HWC = pixels.to_bucket(rgb, view.picture.bucket, view.corner)
    if view.mirrored:
        array_HWC = np.ascontiguousarray(array_HWC[:, ::-1])
    return torch.from_numpy(array_HWC).permute(2, 0, 1).float() / 127.5 - 1


def mask_of(view: View) -> torch.Tensor:
    """What is learned of a view, in [0, 1]: float32, shape (1, height, width)."""
    width, height = view.picture.bucket
    if view.picture.mask is None:
        return torch.ones(1, height, width)
    mask_HW = masks.to_bucket(
        _mask(view.picture), view.picture.size, view.picture.bucket, view.corner
    )
    mask_1HW = torch.from_numpy(mask_HW)[None].float() / 255
    return mask_1HW.flip(-1) if view.mirrored else mask_1HW


def _mask(picture: Picture) -> Image.Image:
    assert picture.mask is not None
    return masks.load(picture.mask, is_alpha=picture.mask == picture.record.file)
