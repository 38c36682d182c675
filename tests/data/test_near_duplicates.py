"""Pictures that are nearly the same, in groups, and what is not."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from lora_scripts.data import looking, near_duplicates

DRAWINGS = sorted((Path(__file__).parents[2] / "assets/demo/style_images").glob("*.png"))


def groups(pictures: list[Image.Image], folder: Path) -> list[list[int]]:
    looks = []
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
        looks.append(looking.look(folder / f"{number}.png"))
    return grouped([look.pattern for look in looks], [look.colours for look in looks])


def grouped(patterns: Sequence[int], colours: Sequence[str]) -> list[list[int]]:
    pixels = np.array([[*bytes.fromhex(each)] for each in colours], np.uint8)
    return near_duplicates.groups(np.array(patterns, np.uint64), pixels)


def as_jpeg(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=60)
    return Image.open(file)


def test_drawings_are_not_alike_and_their_copies_are(tmp_path: Path) -> None:
    drawings = [Image.open(path).convert("RGB") for path in DRAWINGS[:40]]
    assert groups(drawings, tmp_path) == []
    for change in (
        lambda p: p.resize((p.width * 3, p.height * 3), Image.Resampling.LANCZOS),
        lambda p: ImageEnhance.Brightness(p).enhance(1.05),
        as_jpeg,
    ):
        found = groups([*drawings, *map(change, drawings)], tmp_path)
        assert all(len(group) == 2 and group[1] == group[0] + 40 for group in found)
        assert len(found) >= 32  # small flat drawings in few colours are the hardest case


def test_the_same_shape_in_other_colours_is_another_picture(tmp_path: Path) -> None:
    pictures = []
    for colour in ("red", "blue", "green"):
        picture = Image.new("RGB", (64, 64), "white")
        picture.paste(colour, (16, 16, 48, 48))
        pictures.append(picture)
    assert groups(pictures, tmp_path) == []
    assert groups([*pictures, pictures[0].resize((128, 128))], tmp_path) == [[0, 3]]


def test_plain_pictures_are_told_by_their_colour(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "#fe0101")]
    assert groups(pictures, tmp_path) == [[0, 2]]


def test_a_series_is_no_group_as_a_whole() -> None:
    """Each is like its neighbours; a group is what is like its first."""
    patterns = [(1 << bits) - 1 for bits in (0, 6, 12, 18)]
    black = "00" * 192
    assert grouped(patterns, [black] * 4) == [[0, 1], [2, 3]]
    assert grouped([0, 0b1_1111_1111], [black] * 2) == []  # 9 bits
    assert grouped([0, 0], [black, "15" * 192]) == []  # 21 steps
    assert grouped([0, 0], [black, "14" * 192]) == [[0, 1]]


@pytest.mark.parametrize("alike", [False, True])
def test_ten_thousand_take_seconds_at_most(alike: bool) -> None:
    random = np.random.default_rng(0)
    patterns = [0] * 10_000 if alike else random.integers(0, 1 << 63, 10_000).tolist()
    began = time.perf_counter()
    found = grouped(patterns, ["00" * 192] * 10_000)
    assert time.perf_counter() - began < 10
    assert found == ([list(range(10_000))] if alike else [])
