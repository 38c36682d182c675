"""Weights, regularisation, captions and crops: what an epoch shows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lora_scripts.data import captions
from lora_scripts.data.images import mask_of, pixels_of, view_of
from lora_scripts.data.pictures import Picture, Pictures
from lora_scripts.data.records import Record
from lora_scripts.data.views import PictureSet
from lora_scripts.data.weights import times


def picture(name: str, weight: float = 1.0, bucket: tuple[int, int] = (64, 64)) -> Picture:
    return Picture(Record(name, name, name), (name,), bucket, bucket, weight, name)


def repeated(train: list[Picture], kept: list[Picture] | None = None) -> PictureSet:
    every = Pictures.of([*train, *(kept or ())])
    return PictureSet.repeated(every[: len(train)], every[len(train) :])


def names(pictures: PictureSet, epoch: int) -> Counter[str]:
    batches = pictures.batches(4, 7, "order", epoch=epoch)
    views = [view for batch in batches for view in batch]
    assert len(set(views)) == len(views)  # each has noise of its own
    return Counter(pictures.at(view).content for view in views)


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=20), st.integers(0, 50))
def test_weights_are_kept_over_the_epochs(weights: list[float], seed: int) -> None:
    array = np.array(weights)
    shown = sum(times(array, seed, epoch=epoch) for epoch in range(40))
    assert np.abs(shown - 40 * array).max() <= 1


def test_a_picture_is_shown_as_often_as_its_weight_says() -> None:
    pictures = repeated([picture("a", 2.5), picture("b"), picture("c", 0.25)])
    total: Counter[str] = sum((names(pictures, epoch) for epoch in range(8)), Counter())
    assert total == {"a": 20, "b": 8, "c": 2}


def test_no_picture_is_lost_in_mixed_buckets() -> None:
    """Two folders, two buckets, regularisation, batches that do not come out even."""
    train = [picture(f"t{i}", 2, (64, 64) if i % 3 else (96, 48)) for i in range(7)]
    kept = [picture(f"r{i}", 1, (64, 64) if i % 2 else (96, 48)) for i in range(5)]
    pictures = repeated(train, kept)
    for epoch in range(3):
        for batch in pictures.batches(4, 7, "order", epoch=epoch):
            assert len({pictures.at(view).bucket for view in batch}) == 1
        found = names(pictures, epoch)
        assert all(found[f"t{i}"] == 2 for i in range(7))
        assert sum(found[f"r{i}"] for i in range(5)) == 14


def test_other_regularisation_pictures_come_in_the_next_epoch() -> None:
    pictures = repeated([picture("t")], [picture(f"r{i}") for i in range(4)])
    kept = [names(pictures, epoch) - Counter("t") for epoch in range(4)]
    assert sorted(name for found in kept for name in found if name != "t") == [
        "r0",
        "r1",
        "r2",
        "r3",
    ]


# --- captions -------------------------------------------------------------------------------------


def vary(caption: str, seed: int, **options: float) -> str:
    values = {"keep": 0, "shuffle": False, "dropout": 0.0, **options}
    return captions.vary(caption, chance=np.random.default_rng(seed), **values)  # type: ignore[arg-type]


def test_tags_are_shuffled_but_the_first_ones_stay() -> None:
    found = {vary("a, b, c , d,e", seed, keep=2, shuffle=True) for seed in range(100)}
    assert found == {
        f"a, b, {x}, {y}, {z}" for x, y, z in ("cde", "ced", "dce", "dec", "ecd", "edc")
    }


def test_tags_are_left_out_by_their_share() -> None:
    tags = ", ".join(f"t{i}" for i in range(20))
    found = [vary(tags, seed, keep=5, dropout=0.4) for seed in range(200)]
    counts = Counter(tag for caption in found for tag in caption.split(", "))
    assert all(counts[f"t{i}"] == 200 for i in range(5))
    assert sum(counts[f"t{i}"] for i in range(5, 20)) / (15 * 200) == pytest.approx(0.6, abs=0.03)
    assert all(caption.split(", ") == sorted(caption.split(", "), key=lambda t: int(t[1:]))
               for caption in found)  # fmt: skip


# --- crops and masks ------------------------------------------------------------------------------


@pytest.fixture
def wide(tmp_path: Path) -> Picture:
    """128 × 64: red rises from left to right; its mask is white in a column on the right alone."""
    red = np.zeros((64, 128, 3), np.uint8)
    red[:, :, 0] = np.arange(128) * 2
    Image.fromarray(red).save(tmp_path / "a.png")
    mask = np.zeros((64, 128), np.uint8)
    mask[:, 120:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    record = Record(str(tmp_path / "a.png"), "a", "a")
    return Picture(record, ("a",), (128, 64), (64, 64), 1, "a", str(tmp_path / "mask.png"))


def test_crops_are_drawn_and_the_mask_follows(wide: Picture) -> None:
    corners = set()
    for seed in range(40):
        view = view_of(wide, np.random.default_rng(seed), mirrored=bool(seed % 2))
        corners.add(view.corner)
        pixels_CHW, mask_1HW = pixels_of(view), mask_of(view)
        assert pixels_CHW.shape == (3, 64, 64)
        assert mask_1HW.any()  # the crop is moved to show some of it
        # the left edge of the cut is as red as its place says
        left = pixels_CHW[0, 0, -1 if view.mirrored else 0]
        assert float(left + 1) * 127.5 == pytest.approx(2 * view.corner[0], abs=3)
        white = mask_1HW[0, 0].nonzero().flatten() if not view.mirrored else None
        if white is not None:
            assert int(white[0]) == 120 - view.corner[0]
        assert view.shown_corner[0] == (64 - view.corner[0] if view.mirrored else view.corner[0])
    assert len(corners) > 3


def test_the_middle_is_cut_without_chance(wide: Picture) -> None:
    assert view_of(wide, None, mirrored=False).corner == (32, 0)
