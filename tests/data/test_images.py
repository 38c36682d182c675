"""Datasets become pictures: roles, repeats, buckets, splits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_scripts.data import images, looking, picture_memory
from lora_scripts.data.images import Gathered
from lora_scripts.data.records import read_images
from lora_scripts.data.views import PictureSet
from lora_scripts.errors import UserError
from lora_scripts.schema import ImageConfig
from tests import toys


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of pictures lies in `cache`, in the working directory."""
    monkeypatch.chdir(tmp_path)


def gathered(**values: Any) -> Gathered:
    config = ImageConfig(base_model="b", output_dir="o", **{"resolution": 128, **values})
    rows = [
        (record, dataset)
        for dataset in config.all_datasets()
        for record in read_images(dataset.path, dataset.metadata_path)[0]
    ]
    return images.gather(rows, config, pixel_multiple=16)


def test_roles_and_repeats_of_several_folders(tmp_path: Path) -> None:
    folders = {
        name: toys.save_pictures(tmp_path / name, count=count, seed=count)
        for name, count in (("a", 2), ("b", 3), ("c", 4))
    }
    data = gathered(
        datasets=[
            {"path": str(folders["a"]), "repeats": 5},
            {"path": str(folders["b"])},
            {"path": str(folders["c"]), "role": "validation"},
        ]
    )
    assert [Path(p.record.file).parent.name for p in data.train] == ["a"] * 2 + ["b"] * 3
    assert {Path(p.record.file).parent.name for p in data.validation} == {"c"}
    views = PictureSet.repeated(data.train)
    assert len(views) == 2 * 5 + 3
    assert [Path(views.at(view).record.file).parent.name for view in (0, 9, 10)] == ["a", "a", "b"]


def test_pictures_go_to_the_bucket_of_their_shape(tmp_path: Path) -> None:
    for name, size in (("wide", (600, 300)), ("tall", (300, 620)), ("square", (200, 200))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    rows = "wide.png,a\ntall.png,b\nsquare.png,c\n"
    (tmp_path / "metadata.csv").write_text(rows, encoding="utf-8")
    data = gathered(train_data_dir=str(tmp_path), resolution=256)
    shapes = {p.captions[0]: p.bucket for p in data.train}
    assert shapes == {"a": (320, 192), "b": (192, 320), "c": (256, 256)}
    square = gathered(train_data_dir=str(tmp_path), aspect_ratio_buckets=False)
    assert {p.bucket for p in square.train} == {(128, 128)}


def test_the_split_stays_when_a_picture_is_added(tmp_path: Path) -> None:
    data = toys.save_pictures(tmp_path / "data", count=20)
    before = gathered(train_data_dir=str(data), validation_split=0.25)
    assert (len(before.train), len(before.validation)) == (15, 5)
    with (data / "metadata.csv").open("a", encoding="utf-8") as stream:
        stream.write("new.png,new\n")
    Image.new("RGB", (64, 64), "red").save(data / "new.png")
    after = gathered(train_data_dir=str(data), validation_split=0.25)
    names = [{p.record.name for p in d.validation} for d in (before, after)]
    assert len(names[0] & names[1]) >= 4


def test_every_view_is_dealt_once_and_measured_sets_repeat_whole_rounds(tmp_path: Path) -> None:
    data = gathered(train_data_dir=str(toys.save_pictures(tmp_path / "data", count=5)), repeats=3)
    views = PictureSet.repeated(data.train)
    dealt = [view for batch in views.batches(4, "key") for view in batch]
    assert sorted(dealt) == list(range(15))
    assert len(PictureSet.measured(data.train, views=16)) == 15
    assert len(PictureSet.measured(data.train, views=2)) == 5


def test_a_step_that_the_model_cannot_take_is_refused(tmp_path: Path) -> None:
    data = toys.save_pictures(tmp_path / "data", count=1)
    with pytest.raises(UserError, match="bucket_step: found 8; this model needs a multiple of 16"):
        gathered(train_data_dir=str(data), bucket_step=8)


def test_pictures_that_were_checked_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = toys.save_pictures(tmp_path / "a", count=3)
    for path in folder.iterdir():
        os.utime(path, (1_600_000_000, 1_600_000_000))
    paths = sorted(folder.glob("*.png"))
    with picture_memory.opened(Path("cache")) as memory:
        looks = looking.look_at_all(paths, len(paths), memory, lambda done, total: None)

    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(looking, "file_hash", refuse)
    monkeypatch.setattr(Image, "open", refuse)
    found = gathered(train_data_dir=str(folder)).train
    assert [(p.content, p.size) for p in found] == [(look.content, (64, 64)) for look in looks]
    os.utime(paths[0], (1_600_000_009, 1_600_000_009))
    with pytest.raises(AssertionError, match="was read"):
        gathered(train_data_dir=str(folder))
