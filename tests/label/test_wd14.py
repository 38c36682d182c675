"""The tagger's pixels, thresholds and names, by a model whose scores are numbers of its input."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_scripts.data.pixels import load_rgb
from lora_scripts.errors import UserError
from lora_scripts.label import captioner, wd14
from lora_scripts.label.captioner import Settings
from tests.label import toys

CHANNELS = [(4, 4, 0), (4, 4, 1), (4, 4, 2)]
COLOURS = [("in_the_first", 0), ("in_the_second", 0), ("in_the_third", 0)]


def tags_of(folder: Path, *pictures: Image.Image, **settings: float | bool) -> list[str]:
    path = captioner.find("wd14", str(folder))
    return captioner.load("wd14", path, Settings(**settings), "cpu")(pictures)  # type: ignore[arg-type]


# --- pixels -------------------------------------------------------------------------------------


def test_blue_comes_first(tmp_path: Path) -> None:
    folder = toys.toy_tagger(tmp_path / "tagger", COLOURS, CHANNELS)
    picture = Image.new("RGB", (8, 8), (51, 102, 204))  # scores 0.8, 0.4 and 0.2
    assert tags_of(folder, picture) == ["in the first, in the second"]
    assert wd14.pixels(picture, 8)[4, 4].tolist() == [204, 102, 51]


def test_padded_to_a_white_square_in_the_middle(tmp_path: Path) -> None:
    places = [(0, 0, 0), (1, 7, 0), (2, 0, 0), (5, 7, 0), (6, 0, 0)]
    names = [(f"row_{row}", 0) for row, _, _ in places]
    folder = toys.toy_tagger(tmp_path / "tagger", names, places)
    assert tags_of(folder, Image.new("RGB", (8, 4))) == ["row 0, row 1, row 6"]


def test_odd_padding_puts_the_larger_half_behind() -> None:
    black = wd14.pixels(Image.new("RGB", (5, 8)), 8)[0, :, 0] == 0
    assert black.tolist() == [False] + [True] * 5 + [False] * 2


def halved(values: list[float]) -> list[int]:
    """A row of pixels at half the size by Keys' cubic kernel (1981) with a = -0.5, widened by 2."""
    row = []
    for target in range(len(values) // 2):
        distance = np.abs(np.arange(len(values)) + 0.5 - (2 * target + 1)) / 2
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
        row.append(round(float((weights * values).sum() / weights.sum())))
    return [min(max(value, 0), 255) for value in row]


def test_bicubic_in_the_range_of_bytes() -> None:
    steps = [0, 0, 0, 255, 255, 255, 0, 0]
    picture = np.repeat(np.array(steps, np.uint8)[None, :, None], 8, axis=0).repeat(3, axis=2)
    row = wd14.pixels(Image.fromarray(picture), 4)[2, :, 0]
    assert row.dtype == np.float32
    assert row.tolist() == halved(steps) == [0, 129, 247, 18]


def test_large_and_small_pictures_are_brought_to_the_models_size() -> None:
    for side in (3, 8, 100):
        assert wd14.pixels(Image.new("RGB", (side, side), "red"), 8).shape == (8, 8, 3)


def test_alpha_lies_on_white(tmp_path: Path) -> None:
    folder = toys.toy_tagger(tmp_path / "tagger", COLOURS, CHANNELS)
    Image.new("RGBA", (8, 8), (0, 0, 255, 102)).save(tmp_path / "half.png")
    # 0.6 white shines through: green and red 0.6, blue 1
    assert tags_of(folder, load_rgb(tmp_path / "half.png"), threshold=0.59) == [
        "in the first, in the second, in the third"
    ]
    assert tags_of(folder, load_rgb(tmp_path / "half.png"), threshold=0.61) == ["in the first"]


@pytest.mark.parametrize("batch", ["batch", 1])
def test_a_batch_gives_what_single_calls_give(tmp_path: Path, batch: int | str) -> None:
    folder = toys.toy_tagger(tmp_path / "tagger", COLOURS, CHANNELS, batch=batch)
    pictures = toys.pictures(5)
    together = tags_of(folder, *pictures)
    assert together == [tags_of(folder, picture)[0] for picture in pictures]
    assert len(set(together)) > 2


# --- tags ---------------------------------------------------------------------------------------


def chosen(scores: list[float], tags: list[tuple[str, int]], **settings: float | bool) -> str:
    listed = [wd14.Tag(name, category) for name, category in tags]
    return wd14.chosen(np.array(scores, np.float32), listed, Settings(**settings))  # type: ignore[arg-type]


def test_sorted_by_score_and_the_rating_left_out() -> None:
    tags = [("general", 9), ("1girl", 0), ("long_hair", 0), ("hatsune_miku", 4), ("sky", 0)]
    assert chosen([0.99, 0.5, 0.9, 0.86, 0.5], tags) == "long hair, hatsune miku, 1girl, sky"


def test_thresholds() -> None:
    tags = [("a", 0), ("b", 0), ("c", 4), ("d", 4)]
    assert chosen([0.34, 0.36, 0.84, 0.86], tags) == "d, b"
    assert chosen([0.34, 0.36, 0.84, 0.86], tags, threshold=0.3) == "d, b, a"
    assert chosen([0.34, 0.36, 0.84, 0.86], tags, character_threshold=0.5) == "d, c, b"
    assert chosen([0.5, 0.5, 0.5, 0.5], tags, threshold=0.5) == ""  # above, as the demo page has it
    assert chosen([0.1] * 4, tags, threshold=0.0) == "a, b"  # 0 is a threshold too


def test_names() -> None:
    tags = [("long_hair", 0), (">_<", 0), ("|_|", 0), ("miku_(vocaloid)", 4)]
    scores = [0.95, 0.94, 0.93, 0.92]
    assert chosen(scores, tags) == "long hair, >_<, |_|, miku (vocaloid)"
    assert chosen(scores, tags, underscores=True) == "long_hair, >_<, |_|, miku_(vocaloid)"
    escaped = r"long hair, >_<, |_|, miku \(vocaloid\)"
    assert chosen(scores, tags, escape_parentheses=True) == escaped


# --- refused ------------------------------------------------------------------------------------


def refusal(folder: Path, device: str = "cpu") -> str:
    with pytest.raises(UserError) as caught:
        captioner.load("wd14", captioner.find("wd14", str(folder)), Settings(), device)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return toys.toy_tagger(tmp_path / "标签", COLOURS, CHANNELS)


def test_without_onnxruntime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install onnxruntime" in refusal(folder)


def test_without_a_card(folder: Path) -> None:
    assert refusal(folder, "cuda").startswith("--device: found cuda")


@pytest.mark.parametrize("name", ["model.onnx", "selected_tags.csv"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    message = refusal(folder)
    assert f"there is no {name}" in message
    assert "hf download SmilingWolf/wd-swinv2-tagger-v3 --local-dir" in message


def test_a_pointer_of_git_lfs(folder: Path) -> None:
    (folder / "model.onnx").write_text("version https://git-lfs.github.com/spec/v1\n", "utf-8")
    assert "Git LFS pointer" in refusal(folder)


def test_no_onnx_file(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"hello" * 10)
    assert "onnxruntime cannot read it" in refusal(folder)


def test_tags_of_another_model(folder: Path) -> None:
    with (folder / "selected_tags.csv").open("a", encoding="utf-8") as file:
        file.write("3,one_more,0,1\n")
    assert "it has 4 tags, the model beside it 3 scores" in refusal(folder)


def test_a_broken_row_of_tags(folder: Path) -> None:
    with (folder / "selected_tags.csv").open("a", encoding="utf-8") as file:
        file.write("3,one_more,many,1\n")
    assert "selected_tags.csv line 5: a row should have" in refusal(folder)


def test_another_kind_of_model(tmp_path: Path) -> None:
    folder = toys.toy_tagger(tmp_path / "tagger", COLOURS, CHANNELS)
    other = toys.toy_tagger(tmp_path / "other", COLOURS, CHANNELS, channels_first=True)
    (other / "model.onnx").replace(folder / "model.onnx")
    assert "it takes inputs of the shape ['batch', 3, 8, 8]" in refusal(folder)
