"""Masks: where they are found, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_scripts.data import masks
from lora_scripts.data.records import read_images
from lora_scripts.errors import Problem
from lora_scripts.schema import ImageDataset
from tests import toys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return toys.save_pictures(tmp_path / "data", count=3)


def half(path: Path, size: tuple[int, int] = (64, 64)) -> None:
    """A mask whose left half is white."""
    path.parent.mkdir(exist_ok=True)
    grey = np.zeros(size[::-1], np.uint8)
    grey[:, : size[0] // 2] = 255
    Image.fromarray(grey).save(path)


def checked(folder: Path, mask_dir: Path | None = None) -> list[Problem]:
    dataset = ImageDataset(path=folder, mask_dir=mask_dir)
    records, problems = read_images(folder, None)
    assert all("taken for masks" in problem.what for problem in problems)
    return masks.check([(record, dataset) for record in records])


def test_masks_in_a_folder_of_their_own(folder: Path, tmp_path: Path) -> None:
    places = [tmp_path / "masks" / f"img{i:02d}.png" for i in range(3)]
    for place in places[:2]:
        half(place)
    (problem,) = checked(folder, tmp_path / "masks")
    assert problem.severity == "error"
    assert problem.where == "metadata.csv line 4"
    assert "no mask for img02.png in" in problem.what
    half(places[2])
    assert checked(folder, tmp_path / "masks") == []


def test_masks_beside_the_pictures_and_in_their_alpha(folder: Path) -> None:
    half(folder / "img00-masklabel.png")
    half(folder / "img02_mask.png")
    picture = Image.open(folder / "img01.png").convert("RGBA")
    picture.putalpha(Image.new("L", (64, 64), 128))
    picture.save(folder / "img01.png")
    records, problems = read_images(folder, None)
    assert [record.name for record in records] == ["img00.png", "img01.png", "img02.png"]
    (said,) = problems
    assert said.what == (
        "2 files (img00-masklabel.png, img02_mask.png) taken for masks, not for images"
    )
    found = [masks.find(record, ImageDataset(path=folder)) for record in records]
    names = ["img00-masklabel.png", "img01.png", "img02_mask.png"]
    assert found == [str(folder / name) for name in names]
    assert checked(folder) == []
    (folder / "img02_mask.png").unlink()
    (problem,) = checked(folder)
    assert problem.severity == "warning"
    assert problem.what == "1 picture (img02.png) without a mask: learned whole"
    alpha = masks.load(folder / "img01.png", is_alpha=True)
    assert set(np.asarray(alpha).flat) == {128}


def test_a_mask_that_is_listed_as_an_image(folder: Path) -> None:
    half(folder / "img00_mask.png")
    with (folder / "metadata.csv").open("a", encoding="utf-8") as file:
        file.write("img00_mask.png,a carnival mask\n")
    _, problems = read_images(folder, None)
    assert "by its name this is the mask of another image" in problems[1].what


def test_no_mask_at_all(folder: Path) -> None:
    (problem,) = checked(folder)
    assert (problem.where, problem.severity) == ("masked_loss", "error")


def test_masks_of_another_shape_and_black_ones(folder: Path, tmp_path: Path) -> None:
    half(tmp_path / "masks/img00.png", (64, 32))
    Image.new("L", (64, 64)).save(tmp_path / "masks/img01.png")
    half(tmp_path / "masks/img02.png", (32, 32))  # half as large is the same shape
    shape, black = checked(folder, tmp_path / "masks")
    assert "this mask is 64×32, its picture 64×64" in shape.what
    assert "black all over" in black.what
