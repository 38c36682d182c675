"""The captioner in `assets/demo/captioner` is a BLIP, small, and names what it should."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from PIL import Image

from lora_scripts.label import captioner

DEMO = Path(__file__).parents[2] / "assets" / "demo"
FOLDER = DEMO / "captioner"
TABLES = (
    (DEMO / "style_images", DEMO / "style_images" / "metadata.csv"),
    (DEMO / "heldout_images", DEMO / "heldout.csv"),
)
MOST_BYTES = 15 * 10**6
NAMED = 96  # of the 120 stencils, on a CPU in float32
SLACK = 2  # pictures so close to call that another CPU may call them otherwise
LEAST = 36  # 30%


def stencils() -> list[tuple[Path, str]]:
    """Every stencil and what should be said of it."""
    rows = []
    for folder, table in TABLES:
        with table.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                noun = re.sub(r"^a (drawing|picture) of ", "", row["text"])
                rows.append((folder / row["file_name"], f"a drawing of {noun}"))
    return rows


def pictures(files: list[Path]) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in files]


@pytest.fixture(scope="module")
def caption() -> captioner.Caption:
    path = captioner.find("blip", captioner.DEMO)
    assert path == FOLDER
    return captioner.load("blip", path, captioner.Settings(), "cpu")


def test_genuine_classes_load_it() -> None:
    from transformers import AutoProcessor, BlipForConditionalGeneration, BlipProcessor

    model, found = BlipForConditionalGeneration.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(found.values())
    assert str(model.dtype) == "torch.float32"
    assert isinstance(AutoProcessor.from_pretrained(FOLDER), BlipProcessor)
    assert captioner.recognise(FOLDER) == "blip"


def test_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) <= MOST_BYTES


def test_names_stencils(caption: captioner.Caption) -> None:
    files, wanted = zip(*stencils(), strict=True)
    assert len(files) == 120
    said = caption(pictures(list(files)))
    right = sum(one == other for one, other in zip(said, wanted, strict=True))
    assert abs(right - NAMED) <= SLACK
    assert right >= LEAST
    for text in said:
        assert re.fullmatch(r"a drawing of (an [aeiouh]|a (?![aeio])|)[a-z -]+", text), text


def test_says_them_as_the_data_does(caption: captioner.Caption) -> None:
    """Articles, names of two words, a hyphen: the easiest of each kind."""
    said = {
        "umbrella": "a drawing of an umbrella",
        "scissors": "a drawing of scissors",
        "light-bulb": "a drawing of a light bulb",
        "anchor": "a drawing of an anchor",
    }
    files = [DEMO / "heldout_images" / f"{name}.png" for name in said]
    assert caption(pictures(files)) == list(said.values())


def test_a_picture_alone_gets_the_same(caption: captioner.Caption) -> None:
    files = [file for file, _ in stencils()[:8]]
    together = caption(pictures(files))
    assert [caption(pictures([file]))[0] for file in files] == together


def test_goes_on_from_a_prompt() -> None:
    settings = captioner.Settings(prompt="a picture of")
    said = captioner.load("blip", FOLDER, settings, "cpu")
    anchor = pictures([DEMO / "heldout_images" / "anchor.png"])
    assert said(anchor) == ["a picture of an anchor"]


def test_has_room_for_the_longest_caption() -> None:
    """So hot that captions do not end by themselves before the 50 tokens that BLIP may write."""
    settings = captioner.Settings(temperature=8.0)
    said = captioner.load("blip", FOLDER, settings, "cpu")
    assert max(len(text.split()) for text in said(pictures([f for f, _ in stencils()[:8]]))) > 31
