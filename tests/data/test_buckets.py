from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_scripts.data.buckets import assign, bucket_sizes, crop_box, plan_batches

sides = st.integers(1, 20_000)
buckets_at = st.tuples(st.integers(8, 2048), st.sampled_from([8, 16, 32, 64])).filter(
    lambda pair: pair[0] >= pair[1]
)


def test_bucket_sizes_of_sd15() -> None:
    assert bucket_sizes(512, 64) == [
        (320, 768),
        (320, 704),
        (384, 640),
        (448, 576),
        (512, 512),
        (576, 448),
        (640, 384),
        (704, 320),
        (768, 320),
    ]


def test_bucket_sizes_of_the_demo_and_of_an_odd_resolution() -> None:
    assert bucket_sizes(64, 16) == [(48, 80), (64, 64), (80, 48)]
    assert (448, 448) in bucket_sizes(500, 64)
    assert bucket_sizes(512, 64, max_aspect=1.0) == [(512, 512)]
    assert bucket_sizes(8, 8) == [(8, 8)]


@given(buckets_at, st.floats(1, 8))
def test_bucket_sizes_keep_their_promises(pair: tuple[int, int], max_aspect: float) -> None:
    resolution, step = pair
    sizes = bucket_sizes(resolution, step, max_aspect)
    square = resolution // step * step
    assert (square, square) in sizes
    assert len(set(sizes)) == len(sizes)
    ratios = [Fraction(*size) for size in sizes]
    assert ratios == sorted(ratios)
    for width, height in sizes:
        assert width % step == height % step == 0 < width * height <= resolution**2
        assert max(width, height) <= max_aspect * min(width, height)
        assert (height, width) in sizes


@pytest.mark.parametrize(("resolution", "step"), [(32, 64), (512, 0)])
def test_bucket_sizes_refuses(resolution: int, step: int) -> None:
    with pytest.raises(ValueError, match="step is"):
        bucket_sizes(resolution, step)
    with pytest.raises(ValueError, match="max_aspect"):
        bucket_sizes(512, 64, max_aspect=0.5)


def test_assign_takes_the_nearest_shape() -> None:
    buckets = bucket_sizes(512, 64)
    shapes = [(100, 100), (1920, 1080), (1080, 1920), (10_000, 10), (10, 10_000), (4, 3), (3, 4)]
    assert [buckets[assign(shape, buckets)] for shape in shapes] == [
        (512, 512),
        (640, 384),
        (384, 640),
        (768, 320),
        (320, 768),
        (576, 448),
        (448, 576),
    ]
    assert assign((10, 10), [(64, 64), (128, 128), (128, 128)]) == 1  # the larger, then the first


@given(sides, sides, buckets_at)
def test_assign_is_nearest_in_the_logarithm(w: int, h: int, pair: tuple[int, int]) -> None:
    buckets = bucket_sizes(*pair)
    distances = [abs(np.log(w / h) - np.log(bw / bh)) for bw, bh in buckets]
    assert distances[assign((w, h), buckets)] <= min(distances) + 1e-9


@given(st.lists(st.integers(0, 6), max_size=200), st.integers(1, 9), st.integers(0, 2**32))
def test_plan_loses_no_sample(bucket_of: list[int], batch_size: int, seed: int) -> None:
    plan = plan_batches(bucket_of, batch_size, np.random.default_rng(seed))
    assert sorted(index for batch in plan for index in batch) == list(range(len(bucket_of)))
    incomplete: Counter[int] = Counter()
    for batch in plan:
        (bucket,) = {bucket_of[index] for index in batch}
        assert 1 <= len(batch) <= batch_size
        incomplete[bucket] += len(batch) < batch_size
    assert all(count <= 1 for count in incomplete.values())
    assert plan == plan_batches(bucket_of, batch_size, np.random.default_rng(seed))


def test_plan_is_shuffled_within_and_among_buckets() -> None:
    bucket_of = [0] * 40 + [1] * 40
    plan = plan_batches(bucket_of, 4, np.random.default_rng(1))
    order = [bucket_of[batch[0]] for batch in plan]
    assert order != sorted(order)
    assert any(batch != tuple(sorted(batch)) for batch in plan)
    assert plan != plan_batches(bucket_of, 4, np.random.default_rng(2))
    assert all(type(index) is int for batch in plan for index in batch)
    with pytest.raises(ValueError, match="batch_size is 0"):
        plan_batches(bucket_of, 0, np.random.default_rng(0))


def test_crop_box_by_hand() -> None:
    assert crop_box((1000, 500), (512, 512)) == ((1024, 512), (256, 0))
    assert crop_box((500, 1000), (512, 512)) == ((512, 1024), (0, 256))
    assert crop_box((100, 75), (64, 64)) == ((85, 64), (10, 0))  # 85.33 wide
    assert crop_box((512, 512), (512, 512)) == ((512, 512), (0, 0))
    assert crop_box((33, 64), (64, 64)) == ((64, 124), (0, 30))  # 124.12 high


@given(sides, sides, buckets_at, st.data())
def test_crop_box_covers(w: int, h: int, pair: tuple[int, int], data: st.DataObject) -> None:
    bucket = data.draw(st.sampled_from(bucket_sizes(*pair)))
    (across, down), (left, top) = crop_box((w, h), bucket)
    assert across >= bucket[0] and down >= bucket[1]
    assert across == bucket[0] or down == bucket[1]
    assert 0 <= left <= across - bucket[0] and 0 <= top <= down - bucket[1]
    assert abs(across - bucket[0] - 2 * left) <= 1 and abs(down - bucket[1] - 2 * top) <= 1
    assume(min(w, h) > 100)
    assert abs(across * h - down * w) <= max(w, h)  # the shape is kept to half a pixel
