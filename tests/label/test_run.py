"""`lora-scripts label`: what is labelled, what is kept, what is refused, what is written."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from PIL import Image

from lora_scripts import cli
from lora_scripts.data.pixels import load_rgb
from lora_scripts.data.records import read_images, write_csv
from lora_scripts.errors import UserError, WorkError
from lora_scripts.label import captioner, decode, plan, run
from lora_scripts.label.captioner import Settings
from lora_scripts.label.request import LabelRequest
from lora_scripts.label.wording import Wording, cleaned, worded
from tests.label import toys

ROOT = Path(__file__).parents[2]
NAMES = ["a.png", "b.png", "c.png", "d.png", "图 e.png"]


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.toy_blip(tmp_path_factory.mktemp("models") / "blip")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "图片"
    folder.mkdir()
    for name, picture in zip(NAMES, toys.pictures(len(NAMES)), strict=True):
        picture.save(folder / name)
    return folder


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the labeller says, whether or not a command has set up the console before."""
    logger = logging.getLogger("lora_scripts")
    logger.addHandler(caplog.handler)
    with caplog.at_level("INFO", logger="lora_scripts"):
        yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def straight(blip: Path, folder: Path) -> dict[str, str]:
    """What the captioner itself says of each image."""
    caption = captioner.load("blip", blip, Settings(), "cpu")
    return dict(zip(NAMES, caption([load_rgb(folder / name) for name in NAMES]), strict=True))


def label(folder: Path, blip: Path, **changes: Any) -> None:
    run.run(LabelRequest(folder, model=str(blip), batch_size=2, device="cpu", **changes))


def label_with(
    folder: Path, blip: Path, caption: Callable[[Sequence[Image.Image]], list[str]], **changes: Any
) -> dict[str, str]:
    """A labelling with a captioner of the test's own."""
    request = LabelRequest(folder, model=str(blip), batch_size=2, **changes)
    return run.label(plan.prepare(request), lambda: caption)


def captions(folder: Path, metadata: Path | None = None) -> dict[str, str]:
    records, problems = read_images(folder, metadata)
    assert [each for each in problems if each.severity == "error"] == []
    return {Path(record.file).relative_to(folder).as_posix(): record.caption for record in records}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if not path.name.startswith(".")}


def problems(error: pytest.ExceptionInfo[UserError]) -> list[str]:
    return [str(problem) for problem in error.value.problems]


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["csv", "jsonl", "txt"])
def test_every_image_gets_what_the_captioner_says(
    folder: Path, blip: Path, straight: dict[str, str], format: str
) -> None:
    label(folder, blip, format=format)
    assert captions(folder) == straight
    assert len(set(straight.values())) > 1
    written = {"txt": {f"{Path(name).stem}.txt" for name in NAMES}}
    assert files(folder) - set(NAMES) == written.get(format, {f"metadata.{format}"})


def test_the_ending_of_the_output_chooses_the_format(
    folder: Path, blip: Path, tmp_path: Path, straight: dict[str, str]
) -> None:
    label(folder, blip, output=tmp_path / "elsewhere.jsonl")
    rows = (tmp_path / "elsewhere.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(rows[4]) == {"file_name": "图 e.png", "text": straight["图 e.png"]}
    assert captions(folder, tmp_path / "elsewhere.jsonl") == straight
    assert files(folder) == set(NAMES)


@pytest.mark.parametrize("format", ["csv", "jsonl", "txt"])
def test_any_caption_survives(folder: Path, blip: Path, format: str) -> None:
    odd = iter(
        [
            'two\nlines, a "quote", a comma',
            "\r\n  blanks at the ends \t\r\n",
            "ends\r\nof\rlines\x00\x07",
            "图：“赛博朋克”，🌃\u2028{{ x }}",
            "=1+1\\n\\",
        ]
    )
    label_with(folder, blip, lambda images: [next(odd) for _ in images], format=format)
    assert list(captions(folder).values()) == [
        'two\nlines, a "quote", a comma',
        "blanks at the ends",
        "ends\nof\nlines",
        "图：“赛博朋克”，🌃\u2028{{ x }}",
        "=1+1\\n\\",
    ]
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    label_with(folder, blip, never, format=format)  # nothing is left to do
    assert before == {name: (folder / name).read_bytes() for name in files(folder)}


def never(images: Sequence[Image.Image]) -> list[str]:
    raise AssertionError(f"{len(images)} images were captioned again")


def test_sub_folders_and_masks(folder: Path, blip: Path, said: pytest.LogCaptureFixture) -> None:
    (folder / "more").mkdir()
    picture = toys.pictures(1, seed=9)[0]
    picture.save(folder / "more" / "f.jpg")
    picture.convert("L").save(folder / "a_mask.png")
    label(folder, blip)
    assert list(captions(folder)) == NAMES
    assert "1 image (more/f.jpg) in sub-folders are left out" in said.text
    label(folder, blip, recursive=True)
    assert list(captions(folder)) == [*NAMES, "more/f.jpg"]


def test_only_sub_folders_have_images(folder: Path, blip: Path) -> None:
    with pytest.raises(UserError) as error:
        label(folder.parent, blip)
    assert "5 images" in problems(error)[0] and "--recursive" in problems(error)[0]


# --- what a person has written stays --------------------------------------------------------------

EDITED = 'tag,file_name,text\r\n"x, y",b.png,mine\r\n7,gone.png,"old"\r\n8, ./a.png,\r\n'


def test_rows_order_columns_and_line_ends_of_a_csv_stay(
    folder: Path, blip: Path, straight: dict[str, str], said: pytest.LogCaptureFixture
) -> None:
    path = folder / "metadata.csv"
    path.write_bytes(b"\xef\xbb\xbf" + EDITED.encode())
    label(folder, blip)
    rows = path.read_bytes().decode("utf-8").split("\r\n")
    assert rows[:4] == [
        "\ufefftag,file_name,text",
        '"x, y",b.png,mine',
        '7,gone.png,"old"',
        f'8,./a.png,"{straight["a.png"]}"',
    ]
    assert rows[4:] == [*(f',{name},"{straight[name]}"' for name in NAMES[2:]), ""]
    assert "1 image (gone.png) named in it is not in the folder; kept" in said.text
    label(folder, blip, overwrite=True)
    rows = path.read_bytes().decode("utf-8").split("\r\n")
    assert rows[1:3] == [f'"x, y",b.png,"{straight["b.png"]}"', '7,gone.png,"old"']


def test_a_csv_without_a_header_stays_one(
    folder: Path, blip: Path, straight: dict[str, str]
) -> None:
    (folder / "metadata.csv").write_text("d.png,mine", encoding="utf-8")
    label(folder, blip)
    assert (folder / "metadata.csv").read_text(encoding="utf-8").startswith("d.png,mine\na.png,")
    assert captions(folder) == {**straight, "d.png": "mine"}


def test_keys_and_order_of_a_jsonl_stay(folder: Path, blip: Path, straight: dict[str, str]) -> None:
    path = folder / "metadata.jsonl"
    mine = '{"image":"d.png",  "caption": "mine", "score": [1, 2]}'
    path.write_text(f'{mine}\n{{"image": "a.png", "caption": " ", "x": "雨"}}\n', encoding="utf-8")
    label(folder, blip, format="jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == mine
    assert json.loads(lines[1]) == {"image": "a.png", "caption": straight["a.png"], "x": "雨"}
    assert json.loads(lines[2]) == {"image": "b.png", "caption": straight["b.png"]}
    assert captions(folder) == {**straight, "d.png": "mine"}


def test_caption_files_that_are_not_empty_stay(
    folder: Path, blip: Path, straight: dict[str, str]
) -> None:
    (folder / "a.txt").write_text("mine", encoding="utf-8")
    (folder / "b.caption").write_text("mine, too", encoding="utf-8")
    (folder / "d.TXT").write_text(" \n", encoding="utf-8")
    label(folder, blip, format="txt")
    assert captions(folder) == {**straight, "a.png": "mine", "b.png": "mine, too"}
    assert "d.txt" not in files(folder)
    label(folder, blip, format="txt", overwrite=True)
    assert captions(folder) == straight


def test_an_edit_made_while_the_labeller_works_stays(
    folder: Path, blip: Path, straight: dict[str, str]
) -> None:
    path = folder / "metadata.csv"

    def edited_meanwhile(images: Sequence[Image.Image]) -> list[str]:
        write_csv(path, [("d.png", "mine, written meanwhile")])
        return ["the captioner's"] * len(images)

    label_with(folder, blip, edited_meanwhile)
    assert captions(folder)["d.png"] == "mine, written meanwhile"
    assert captions(folder)["a.png"] == "the captioner's"


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("metadata.csv", b'a.png,"one\nb.png,two\n', "metadata.csv line 1: "),
        ("metadata.csv", b"a.png,one\nb.png,two,three\n", "metadata.csv line 2: 3 fields found"),
        ("metadata.csv", b"a.png,one\n./a.png,two\n", "metadata.csv line 2: "),
        ("metadata.csv", b"a.png,\xff\xff\xff\n", "metadata.csv: "),
        ("metadata.jsonl", b'{"file_name": "a.png"}\n{', "metadata.jsonl line 2: not valid JSON"),
        ("a.txt", b"\xd0\xff\x80", "a.txt: "),
    ],
)
def test_a_captions_file_that_cannot_be_read_is_not_touched(
    folder: Path, blip: Path, name: str, content: bytes, expected: str
) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        label(folder, blip, format=name.split(".")[1], overwrite=True)
    assert any(expected in problem for problem in problems(error))
    assert "not overwritten unread" in problems(error)[0]
    assert (folder / name).read_bytes() == content
    assert files(folder) == {*NAMES, name}


def test_two_images_cannot_share_a_caption_file(folder: Path, blip: Path) -> None:
    toys.pictures(1, seed=9)[0].save(folder / "a.jpg")
    with pytest.raises(UserError, match=r"shares a\.txt with"):
        label(folder, blip, format="txt")
    label(folder, blip, format="csv")
    assert len(captions(folder)) == 6


def test_caption_files_that_would_be_shadowed_are_named(
    folder: Path, blip: Path, said: pytest.LogCaptureFixture
) -> None:
    (folder / "a.txt").write_text("mine", encoding="utf-8")
    label(folder, blip)
    assert "1 caption file (a.txt) beside the images are not read any more" in said.text
    label(folder, blip, format="txt")
    assert "metadata.csv is in the folder; a training reads it instead" in said.text


# --- stopped and gone on --------------------------------------------------------------------------


class Stopped(Exception):
    """What stops a labelling in a test."""


def stopping(after: int, say: str = "of the first run") -> Callable[..., list[str]]:
    """A captioner that fails when it has captioned so many images."""
    done = 0

    def caption(images: Sequence[Image.Image]) -> list[str]:
        nonlocal done
        if done >= after:
            raise Stopped
        done += len(images)
        return [say] * len(images)

    return caption


def stop(folder: Path, blip: Path, after: int = 2, **changes: Any) -> Path:
    """A labelling stopped after so many images. Its journal."""
    with pytest.raises(Stopped):
        label_with(folder, blip, stopping(after), **changes)
    journal = next(folder.glob("*.unfinished"))
    assert journal.read_text(encoding="utf-8").count("of the first run") == after
    return journal


def again(images: Sequence[Image.Image]) -> list[str]:
    return ["of the second run"] * len(images)


@pytest.mark.parametrize("format", ["csv", "jsonl", "txt"])
def test_a_stopped_labelling_goes_on(
    folder: Path, blip: Path, format: str, said: pytest.LogCaptureFixture
) -> None:
    journal = stop(folder, blip, format=format)
    assert files(folder) == {*NAMES, journal.name}
    label_with(folder, blip, again, format=format)
    assert list(captions(folder).values()) == ["of the first run"] * 2 + ["of the second run"] * 3
    assert "2 were captioned by an unfinished labelling" in said.text
    assert not journal.exists()


def test_wording_is_that_of_the_run_that_finishes(folder: Path, blip: Path) -> None:
    stop(folder, blip, wording=Wording(prefix="old "))
    label_with(folder, blip, again, wording=Wording(prefix="new ", blacklist=("first",)))
    assert list(captions(folder).values())[1:3] == ["new of the run", "new of the second run"]


def test_another_captioner_does_not_go_on(
    folder: Path, blip: Path, said: pytest.LogCaptureFixture
) -> None:
    journal = stop(folder, blip)
    before = journal.read_bytes()
    other = Settings(num_beams=3)
    with pytest.raises(UserError) as error:
        label_with(folder, blip, again, settings=other)
    assert "labelling of 2 images" in problems(error)[0]
    assert "num_beams: None there, 3 now" in problems(error)[0]
    assert journal.read_bytes() == before
    label_with(folder, blip, again, settings=other, overwrite=True)
    assert set(captions(folder).values()) == {"of the second run"}
    assert "its captions are not used" in said.text


def test_images_that_changed_or_are_gone(folder: Path, blip: Path) -> None:
    stop(folder, blip, after=4)
    toys.pictures(1, seed=9)[0].save(folder / "a.png")
    os.utime(folder / "a.png", ns=(1, 1))
    (folder / "b.png").rename(folder / "b2.png")
    label_with(folder, blip, again)
    found = captions(folder)
    assert sorted(found) == sorted({*NAMES, "b2.png"} - {"b.png"})
    second = {name for name, text in found.items() if text == "of the second run"}
    assert second == {"a.png", "b2.png", "图 e.png"}


def test_an_overwriting_labelling_goes_on_and_then_begins_anew(folder: Path, blip: Path) -> None:
    write_csv(folder / "metadata.csv", [(name, "mine") for name in NAMES])
    stop(folder, blip, overwrite=True)
    assert set(captions(folder).values()) == {"mine"}
    label_with(folder, blip, never)  # without --overwrite, what is there stays
    assert set(captions(folder).values()) == {"mine"}
    stop(folder, blip, overwrite=True)
    label_with(folder, blip, again, overwrite=True)
    assert list(captions(folder).values())[1:3] == ["of the first run", "of the second run"]
    label_with(folder, blip, lambda images: ["third"] * len(images), overwrite=True)
    assert set(captions(folder).values()) == {"third"}


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_torn_journal(folder: Path, blip: Path, cut: int) -> None:
    journal = stop(folder, blip, after=4)
    data = journal.read_bytes()
    journal.write_bytes(data[:-cut])
    whole = data[:-cut].count(b"\n") - 1
    assert whole < 4
    with pytest.raises(Stopped):
        label_with(folder, blip, stopping(0))
    with suppress(Stopped):  # appends to the torn file
        label_with(folder, blip, stopping(2, "of the second run"))
    label_with(folder, blip, lambda images: ["third"] * len(images))
    texts = list(captions(folder).values())
    seconds = min(2, 5 - whole)
    assert texts[:whole] == ["of the first run"] * whole
    assert texts[whole : whole + seconds] == ["of the second run"] * seconds


def test_nothing_made_in_sub_folders_is_lost(folder: Path, blip: Path) -> None:
    """Stopped with --recursive, finished without."""
    (folder / "0").mkdir()
    for name, picture in zip(("f", "g"), toys.pictures(2, seed=9), strict=True):
        picture.save(folder / "0" / f"{name}.jpg")
    stop(folder, blip, after=6, recursive=True)
    label_with(folder, blip, again)
    assert captions(folder)["0/f.jpg"] == "of the first run"
    assert not list(folder.glob("*.unfinished"))


def test_a_file_that_is_no_journal_is_not_touched(folder: Path, blip: Path) -> None:
    (folder / "metadata.csv.unfinished").write_text("my notes\n", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="no list of captions"):
            label(folder, blip, overwrite=overwrite)
    assert (folder / "metadata.csv.unfinished").read_text(encoding="utf-8") == "my notes\n"


def test_two_labellers_do_not_write_one_file(
    folder: Path, blip: Path, straight: dict[str, str]
) -> None:
    with (
        FileLock(folder / ".metadata.csv.unfinished.lock"),
        pytest.raises(UserError, match="another labelling is writing there now"),
    ):
        label(folder, blip)
    label(folder, blip)
    assert captions(folder) == straight


def test_a_captions_file_that_is_held_open(folder: Path, blip: Path, monkeypatch: Any) -> None:
    def held(path: Path, rows: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("lora_scripts.label.rows.write_csv", held)  # as Excel does on Windows
        with pytest.raises(WorkError, match=r"another program.*metadata\.csv\.unfinished"):
            label_with(folder, blip, again)
    label_with(folder, blip, never)
    assert set(captions(folder).values()) == {"of the second run"}


# --- images that are no good ----------------------------------------------------------------------


def test_images_that_cannot_be_read(
    folder: Path, blip: Path, straight: dict[str, str], said: pytest.LogCaptureFixture
) -> None:
    data = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(data[:60])
    (folder / "a0.jpg").write_bytes(b"")
    (folder / "link.png").symlink_to(ROOT / "README.md")
    with pytest.raises(WorkError) as error:
        label(folder, blip)
    assert "3 images" in str(error.value) and error.value.exit_code == 1
    assert captions_of_rows(folder) == straight
    assert "a0.jpg: the file is empty" in said.text
    assert "cut.png: the file is cut short" in said.text
    assert "link.png: this link leads out of" in said.text
    for name in ("cut.png", "a0.jpg", "link.png"):
        (folder / name).unlink()
    label(folder, blip)


def captions_of_rows(folder: Path) -> dict[str, str]:
    records, _ = read_images(folder, None)
    return {record.name: record.caption for record in records}


def test_an_image_that_the_captioner_refuses(folder: Path, blip: Path) -> None:
    long = Image.new("RGB", (400, 1))
    long.save(folder / "a2.png")

    def fastidious(images: Sequence[Image.Image]) -> list[str]:
        if any(image.height == 1 for image in images):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return ["good"] * len(images)

    refused = label_with(folder, blip, fastidious)
    assert list(refused) == ["a2.png"] and "aspect ratio" in refused["a2.png"]
    assert captions(folder) == dict.fromkeys(NAMES, "good")


def test_empty_captions_are_stored_and_named(
    folder: Path, blip: Path, said: pytest.LogCaptureFixture
) -> None:
    label_with(folder, blip, lambda images: [" \n"] * len(images))
    assert (folder / "metadata.csv").read_text(encoding="utf-8").splitlines()[1] == 'a.png,""'
    assert "5 images (a.png, b.png, c.png and 2 more): the captioner said nothing" in said.text
    label_with(folder, blip, again)  # and they are made when there is something to say
    assert set(captions(folder).values()) == {"of the second run"}


# --- what is refused before an image is opened ----------------------------------------------------


def test_every_mistake_at_once(tmp_path: Path) -> None:
    request = LabelRequest(
        tmp_path / "none",
        output=tmp_path / "not there" / "x.csv",
        model=str(tmp_path / "weights"),
        format="xml",
        device="tpu",
        review=tmp_path / "page.png",
        settings=Settings(threshold=0.4),
        wording=Wording(prefix="\udcff", trigger=" ", max_tags=3),
    )
    with pytest.raises(UserError) as error:
        run.run(request)
    found = problems(error)
    for expected in (
        "--format xml: must be one of csv, jsonl, txt",
        "--device tpu: must be one of",
        f"there is no folder {tmp_path / 'not there'}",
        "page.png: is a page: must end with .html",
        "--prefix",
        "--trigger: is blank",
        "none: there is no such folder",
        "--threshold: does nothing for --captioner blip",
        "--max-tags: is for lists of tags",
        "weights: no such file or folder",
    ):
        assert sum(expected in problem for problem in found) == 1, expected
    assert len(found) == 10


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"captioner": "clip"}, "--captioner clip: must be one of blip"),
        ({"captioner": "blip2"}, "weights are for --captioner blip, not blip2"),
        ({"format": "csv", "output": Path("x.jsonl")}, "x.jsonl: must end with .csv"),
        ({"format": "txt", "output": Path("x.txt")}, "txt files lie beside the images"),
        ({"output": Path("x.dat")}, "x.dat: must end with .csv"),
    ],
)
def test_what_does_not_fit(
    folder: Path, blip: Path, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError) as error:
        label(folder, blip, **changes)
    assert len(error.value.problems) == 1 and expected in problems(error)[0]


def test_weights_that_are_not_there_are_said_before_an_image_is_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "load_rgb", never)
    for model in ("models/none", None):
        with pytest.raises(UserError) as error:
            run.run(LabelRequest(folder, model=model))
        assert "hf download" in problems(error)[0]
    assert files(folder) == set(NAMES)


# --- options --------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(
    folder: Path, blip: Path, straight: dict[str, str], said: pytest.LogCaptureFixture
) -> None:
    before = sorted(folder.iterdir())
    label(folder, blip, dry_run=True, wording=Wording(trigger="zwx"), review=folder / "r.html")
    assert sorted(folder.iterdir()) == before
    assert f"c.png: zwx, {straight['c.png']}" in said.text
    assert "d.png: " not in said.text
    assert f"5 to caption with blip ({blip})" in said.text
    assert "metadata.csv" in said.text and "r.html would be written" in said.text


def test_generation_settings_act(folder: Path, blip: Path, straight: dict[str, str]) -> None:
    label(folder, blip, settings=Settings(max_new_tokens=3, prompt="the"))
    texts = captions(folder).values()
    assert all(len(text.split()) <= 4 for text in texts)
    assert set(texts).isdisjoint(straight.values())


@pytest.mark.parametrize(
    "said, wording, tags, stored",
    [
        ("a cat", Wording(prefix="photo of ", suffix=", night"), False, "photo of a cat, night"),
        ("a cat", Wording(trigger="zwx"), False, "zwx, a cat"),
        ("a ZWX cat", Wording(trigger="zwx"), False, "a ZWX cat"),
        ("a cat", Wording(prefix="portrait of zwx, ", trigger="zwx"), False,
         "portrait of zwx, a cat"),
        ("", Wording(trigger="zwx"), False, "zwx"),
        ("A red cat on a RED mat, reddish", Wording(blacklist=("red",)), False,
         "A cat on a mat, reddish"),
        ("a street lamp, a street", Wording(blacklist=("street", "street lamp")), False, "a, a"),
        ("a photo, watermark, of a cat.", Wording(blacklist=("watermark",)), False,
         "a photo, of a cat."),
        ("一只红色的猫", Wording(blacklist=("红色的",)), False, "一只猫"),
        ("keep  two  blanks", Wording(blacklist=("dog",)), False, "keep  two  blanks"),
        ("1girl, long hair, hair, Blue_Eyes", Wording(blacklist=("hair", "blue eyes")), True,
         "1girl, long hair"),
        ("a, b, c, d", Wording(blacklist=("b",), max_tags=2), True, "a, c"),
    ],
)  # fmt: skip
def test_wording(said: str, wording: Wording, tags: bool, stored: str) -> None:
    assert worded(cleaned(said, wording, tags=tags), wording) == stored


# --- decoding -------------------------------------------------------------------------------------


def test_only_a_few_batches_are_decoded_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def counted(path: Path) -> Image.Image:
        opened.append(path)
        return load_rgb(path)

    monkeypatch.setattr(decode, "load_rgb", counted)
    names = [f"{number:03d}.png" for number in range(100)]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    unreadable: dict[str, str] = {}
    most, seen = 0, []
    for batch in decode.batches(tmp_path, names, size=4, workers=3, unreadable=unreadable):
        seen += [each.name for each in batch]
        most = max(most, len(opened) - len(seen))
    assert seen == names and unreadable == {}
    assert 0 < most <= 2 * 4 + 3


def test_a_very_large_picture_is_shrunk() -> None:
    large = Image.linear_gradient("L").resize((5000, 300)).convert("RGB")
    small = decode.shrunk(large, 2048)
    assert small.size == (1667, 100)
    assert abs(small.getpixel((800, 50))[0] - large.getpixel((2400, 150))[0]) <= 1
    assert decode.shrunk(small, 2048) is small


# --- the command ----------------------------------------------------------------------------------


def test_the_promised_command_on_a_chinese_console(
    folder: Path, blip: Path, straight: dict[str, str]
) -> None:
    arguments = ["--input", "图片", "--output", "图片/metadata.csv", "--model", str(blip)]
    arguments += ["--prefix", "portrait of zwx, ", "--blacklist", "picture, green"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "auto_label.py"), *arguments],
        cwd=folder.parent,
        env={**os.environ, "PYTHONIOENCODING": "gbk"},
        capture_output=True,
        encoding="gbk",
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "图片: 5 images (a.png, b.png, c.png and 2 more)" in result.stdout
    assert result.stderr == ""
    found = captions(folder)
    assert all(text.startswith("portrait of zwx, ") for text in found.values())
    assert not any("picture" in text or "green" in text for text in found.values())


def test_ctrl_c_says_how_to_go_on(
    folder: Path, blip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(captioner, "load", lambda *_: interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["label", "--input", str(folder), "--model", str(blip)])
    assert stopped.value.code == 75
    assert "The same command goes on" in capsys.readouterr().err
