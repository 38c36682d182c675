"""Pictures as a training set: which bucket, which caption, which cache entries, which order."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from lora_scripts.data import buckets, captions, pixels, records, validate
from lora_scripts.errors import Problem, UserError
from lora_scripts.files import file_hash
from lora_scripts.randomness import numpy_generator, seed_of
from lora_scripts.schema import ImageConfig, ImageDataset

Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True)
class Picture:
    """One picture with everything that does not change while training."""

    record: records.Record
    caption: str  # prefix, trigger word and suffix included
    bucket: Size
    repeats: int
    content: str  # SHA-256 of the file


@dataclass(frozen=True)
class PictureSet:
    """Pictures and their views: view i of an epoch shows `pictures[picture_of_view[i]]`."""

    pictures: list[Picture]
    picture_of_view: np.ndarray

    @classmethod
    def repeated(cls, pictures: list[Picture]) -> PictureSet:
        """Every picture as often as its dataset says."""
        repeats = [picture.repeats for picture in pictures]
        return cls(pictures, np.repeat(np.arange(len(pictures)), repeats))

    @classmethod
    def measured(cls, pictures: list[Picture], views: int) -> PictureSet:
        """Every picture in turn, at least once each, until there are about `views`."""
        rounds = max(1, round(views / len(pictures)))
        return cls(pictures, np.tile(np.arange(len(pictures)), rounds))

    def __len__(self) -> int:
        """The number of views."""
        return len(self.picture_of_view)

    def at(self, view: int) -> Picture:
        """The picture that a view shows."""
        return self.pictures[int(self.picture_of_view[view])]

    def batches(self, batch_size: int, *key: int | str) -> list[tuple[int, ...]]:
        """All views in shuffled micro-batches of one bucket each; the order follows from `key`."""
        sizes = {bucket: i for i, bucket in enumerate(sorted({p.bucket for p in self.pictures}))}
        bucket_of_view = [sizes[self.at(view).bucket] for view in range(len(self))]
        return buckets.plan_batches(bucket_of_view, batch_size, numpy_generator(*key))


@dataclass(frozen=True)
class Gathered:
    """The data of a run: what is learned from and what is measured."""

    train: list[Picture]
    validation: list[Picture]


def gather(
    rows: Sequence[tuple[records.Record, ImageDataset]], config: ImageConfig, pixel_multiple: int
) -> Gathered:
    """Deal checked rows into buckets and splits.

    Raises:
        UserError: if the model cannot work on the buckets' sizes.
    """
    sizes = bucket_sizes(config, pixel_multiple)
    found = [record for record, _ in rows]
    with ThreadPoolExecutor() as pool:
        contents = list(pool.map(file_hash, [record.path for record in found]))
    pictures = [
        Picture(
            record=record,
            caption=captions.compose(
                record.caption,
                prefix=config.caption_prefix,
                suffix=config.caption_suffix,
                trigger_word=config.trigger_word,
            ),
            bucket=sizes[buckets.assign(size, sizes)],
            repeats=dataset.repeats,
            content=content,
        )
        for (record, dataset), size, content in zip(
            rows, validate.image_sizes(found), contents, strict=True
        )
    ]
    train, validation = _split(pictures, [dataset.role for _, dataset in rows], config)
    return Gathered(train, validation)


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
    if not config.aspect_ratio_buckets:
        return [(config.resolution, config.resolution)]
    return buckets.bucket_sizes(config.resolution, config.bucket_step)


def _split(
    pictures: list[Picture], roles: Sequence[str], config: ImageConfig
) -> tuple[list[Picture], list[Picture]]:
    """Training and held-out pictures: by the datasets' roles, or a share drawn by the seed."""
    train = [p for p, role in zip(pictures, roles, strict=True) if role == "train"]
    validation = [p for p, role in zip(pictures, roles, strict=True) if role == "validation"]
    if not config.validation_split or len(train) < 2:
        return train, validation
    held_out = max(1, round(len(train) * config.validation_split))
    # Keyed by name, so that adding a picture does not move the others between the two.
    order = sorted(
        range(len(train)),
        key=lambda i: seed_of(config.seed, "split", train[i].record.path.name, train[i].content),
    )
    chosen = set(order[:held_out])
    return (
        [p for i, p in enumerate(train) if i not in chosen],
        [p for i, p in enumerate(train) if i in chosen],
    )


def pixels_of(picture: Picture, *, mirrored: bool) -> torch.Tensor:
    """The picture cut to its bucket: float32 in [-1, 1], shape (3, height, width)."""
    array_HWC = pixels.to_bucket(pixels.load_rgb(picture.record.path), picture.bucket)
    if mirrored:
        array_HWC = np.ascontiguousarray(array_HWC[:, ::-1])
    return torch.from_numpy(array_HWC).permute(2, 0, 1).float() / 127.5 - 1
