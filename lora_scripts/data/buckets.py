"""Aspect-ratio buckets: a few sizes of nearly equal area, and each image in the one it fits best.

Pure functions of numbers. Sizes are (width, height) in pixels throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_scripts.data.samples import Batches

Size = tuple[int, int]
_BLOCK = 1 << 16  # samples looked at in one go


def bucket_sizes(resolution: int, step: int, max_aspect: float = 2.5) -> list[Size]:
    """The sizes that images are trained at, from the tallest to the widest.

    For every width there is the tallest height that keeps width · height <= resolution², both
    multiples of `step`; every such size also turned on its side; and the square. Sizes longer than
    `max_aspect` times their short side are left out. This is the rule of NovelAI and of kohya's
    scripts, with the limit put on the shape instead of on the length of a side. The default takes
    in 16:9, 2:1 and a telephone's 20:9.

    Args:
        resolution: side of the square in pixels; its area bounds the area of every size.
        step: what both sides are multiples of (8 for Stable Diffusion at the least, often 64).

    Raises:
        ValueError: if a square of side `step` is already larger, or `max_aspect` is below 1.
    """
    if not 0 < step <= resolution:
        raise ValueError(f"step is {step}; expected from 1 to the resolution, {resolution}")
    if max_aspect < 1:
        raise ValueError(f"max_aspect is {max_aspect}; expected 1 or more")
    area = resolution * resolution
    square = resolution // step * step
    sizes = {(square, square)}
    for width in range(step, area // step + 1, step):
        height = area // width // step * step
        if height > 0 and max(width, height) <= max_aspect * min(width, height):
            sizes |= {(width, height), (height, width)}
    return sorted(sizes, key=lambda size: (size[0] / size[1], size))


def assign(size: Size, buckets: Sequence[Size]) -> int:
    """The index of the bucket whose aspect ratio is nearest, |log(w/h) - log(W/H)| least.

    Among equally near ones the larger area wins, then the first.
    """
    width, height = size

    def distance(index: int) -> tuple[float, int]:
        across, down = width * buckets[index][1], height * buckets[index][0]
        # exp of the distance of the logarithms: the same order, the same on every machine
        return max(across, down) / min(across, down), -buckets[index][0] * buckets[index][1]

    return min(range(len(buckets)), key=distance)


def plan_batches(
    bucket_of: Sequence[int] | np.ndarray, batch_size: int, rng: np.random.Generator
) -> Batches:
    """A shuffled order of micro-batches of sample indices, each batch from one bucket.

    Every sample comes exactly once; a bucket leaves at most one batch that is not full; the
    batches of all buckets are shuffled among each other. A function of the arguments and of the
    state of `rng` alone.

    Args:
        bucket_of: the bucket of each sample.

    Raises:
        ValueError: if `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
    of_sample = np.asarray(bucket_of)
    samples = np.empty(len(of_sample), np.int32)
    starts, stops = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    end = 0
    for bucket in np.unique(of_sample):
        begin = end
        for start in range(0, len(of_sample), _BLOCK):
            members = start + np.flatnonzero(of_sample[start : start + _BLOCK] == bucket)
            samples[end : end + len(members)] = members
            end += len(members)
        rng.shuffle(samples[begin:end])
        starts.append(np.arange(begin, end, batch_size, dtype=np.int32))
        stops.append(np.minimum(starts[-1] + batch_size, end).astype(np.int32))
    order = rng.permutation(sum(map(len, starts)))
    return Batches(samples, np.concatenate(starts)[order], np.concatenate(stops)[order])


def crop_box(size: Size, bucket: Size) -> tuple[Size, tuple[int, int]]:
    """How an image of `size` fills `bucket`: scaled until it covers it, then the middle cut out.

    Returns:
        The (width, height) to scale the image to, and the (left, top) of the cut in it.
    """
    scaled = scaled_to_cover(size, bucket)
    return scaled, ((scaled[0] - bucket[0]) // 2, (scaled[1] - bucket[1]) // 2)


def scaled_to_cover(size: Size, bucket: Size) -> Size:
    """The (width, height) of an image of `size` made just as large as covers `bucket`."""
    width, height = size
    across, down = bucket
    if across * height >= down * width:  # the width decides
        return across, _rounded(height * across, width)
    return _rounded(width * down, height), down


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
