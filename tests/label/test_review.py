"""The page of thumbnails: whole, self-contained, safe whatever the captions hold, and small."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from lora_scripts.errors import UserError
from lora_scripts.label import review
from lora_scripts.label.review import Entry
from tests.label import toys

EVIL = '<script>alert("x")</script> & {{ 7 * 7 }}\nsecond line'


class Page(HTMLParser):
    """What a browser makes of the page: images' sources, captions, names, scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.links: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag == "img":
            self.sources.append(values["src"] or "")
        self.links += [value or "" for name, value in attributes if name in ("href", "src")]
        if tag not in ("meta", "img", "input"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, picture in zip(("a.png", "图.png"), toys.pictures(2, side=400), strict=True):
        picture.save(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:80])
    return tmp_path


def page_of(folder: Path, *entries: Entry) -> Page:
    path = folder / "审阅.html"
    review.write(path, folder, entries, workers=2)
    assert [each.name for each in folder.iterdir() if each.name.endswith(".tmp")] == []
    return Page(path.read_text(encoding="utf-8"))


def test_thumbnails_names_and_captions(folder: Path) -> None:
    page = page_of(
        folder,
        Entry("a.png", "a cat, on a mat", True),
        Entry("图.png", "a cat, on a mat", False),
        Entry("cut.png", " ", False),
    )
    assert page.texts["b"] == ["a.png", "图.png", "cut.png"]
    assert page.texts["p"] == ["a cat, on a mat", "a cat, on a mat", "(no caption)"]
    assert page.texts["small"] == ["the same on 2 images"] * 2
    counts = "3 images, 1 captioned just now, 1 without a caption, 1 different captions"
    assert " ".join(page.texts["div"][0].split()) == counts
    assert page.texts["button"] == ["a cat 2", "on a mat 2", "cat 2", "mat 2"]
    assert any("the file is cut short" in text for text in page.texts["div"])
    assert len(page.sources) == 2
    data = base64.b64decode(page.sources[1].removeprefix("data:image/jpeg;base64,"))
    with Image.open(io.BytesIO(data)) as small, Image.open(folder / "图.png") as large:
        assert small.size == (review.SIDE, review.SIDE)
        there = small.convert("RGB").getpixel((20, 20))
        assert all(abs(x - y) < 8 for x, y in zip(there, large.getpixel((50, 50)), strict=True))


def test_nothing_in_a_caption_or_name_is_taken_for_markup(folder: Path) -> None:
    name = "<b onload='x'>&amp;.png"
    (folder / "a.png").rename(folder / name)
    page = page_of(folder, Entry(name, EVIL, True), Entry("图.png", EVIL, True))
    assert page.texts["b"][0] == name
    assert page.texts["p"] == [EVIL, EVIL]
    assert len(page.texts["script"]) == 1


def test_the_page_needs_no_other_file(folder: Path) -> None:
    page = page_of(folder, Entry("a.png", "a cat", True))
    assert page.links and all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    text = (folder / "审阅.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", text)


def test_a_thousand_images_are_a_small_page(folder: Path) -> None:
    Image.effect_noise((600, 400), 60).convert("RGB").save(
        folder / "noise.jpg"
    )  # the worst there is
    review.write(folder / "r.html", folder, [Entry("noise.jpg", "a caption", True)] * 50, 2)
    assert (folder / "r.html").stat().st_size / 50 < 12_000  # a thousand: 12 MB, photographs 5


def test_an_older_page_stays_if_a_new_one_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "审阅.html").write_text("older", encoding="utf-8")

    def full(path: Path) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(review, "_thumbnail", full)
    with pytest.raises(OSError, match="No space"):
        review.write(folder / "审阅.html", folder, [Entry("a.png", "a cat", True)], 2)
    assert (folder / "审阅.html").read_text(encoding="utf-8") == "older"
    assert list(folder.glob("*.tmp")) == []


def test_memory_does_not_grow_with_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0
    original = review._thumbnail

    def counted(path: Path) -> str:
        nonlocal made
        made += 1
        return original(path)

    monkeypatch.setattr(review, "_thumbnail", counted)
    cards = review._cards(folder, [Entry("a.png", "a cat", True)] * 40, workers=2)
    for shown in range(1, 41):
        next(cards)
        assert made - shown <= 4


def test_unreadable_pictures_raise_nothing(folder: Path) -> None:
    with pytest.raises(UserError):
        review._thumbnail(folder / "cut.png")
    page = page_of(folder, Entry("cut.png", "a caption of before", False))
    assert page.sources == [] and page.texts["p"] == ["a caption of before"]
