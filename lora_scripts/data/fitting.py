"""How pictures fit the sizes they are trained at: enlarged, or cut. Reports, repairs nothing."""

from __future__ import annotations

from collections.abc import Iterable

from lora_scripts.data import buckets
from lora_scripts.data.buckets import Size
from lora_scripts.errors import Problem
from lora_scripts.schema import ImageConfig

ENLARGED = 1.1  # more than this is remarked on
CUT_AWAY = 0.25  # of a picture; a larger share is remarked on


def sizes_of(config: ImageConfig) -> list[Size]:
    """The sizes (width, height) that a run trains at."""
    if not config.aspect_ratio_buckets:
        return [(config.resolution, config.resolution)]
    return buckets.bucket_sizes(config.resolution, config.bucket_step)


def check(pictures: Iterable[tuple[str, str, Size]], config: ImageConfig) -> list[Problem]:
    """Warnings of pictures that are smaller than their bucket, and of those much cut to fit it.

    Args:
        pictures: Of each its path, the place that names it, and its (width, height), upright.
        config: Of the run, for its buckets.
    """
    trained_at = sizes_of(config)
    problems = []
    for path, place, size in pictures:
        bucket = trained_at[buckets.assign(size, trained_at)]
        scaled = buckets.scaled_to_cover(size, bucket)
        factor = scaled[0] / size[0]
        if factor > ENLARGED:
            what = (
                f"it has {_said(size)} pixels and is enlarged {factor:.1f} times to "
                f"{_said(bucket)}: the blur is learned, too. Use a larger picture, or lower "
                f"resolution ({place})"
            )
            problems.append(Problem(path, what, "warning", "small-image"))
        lost = 1 - bucket[0] * bucket[1] / (scaled[0] * scaled[1])
        if lost > CUT_AWAY:
            side = "left and right" if scaled[0] > bucket[0] else "top and bottom"
            what = (
                f"it has {_said(size)} pixels, and {lost:.0%} of it is cut away at {side} to fit "
                f"{_said(bucket)}; crop it yourself to keep what matters ({place})"
            )
            problems.append(Problem(path, what, "warning", "cut-away"))
    return problems


def _said(size: Size) -> str:
    return f"{size[0]}×{size[1]}"
