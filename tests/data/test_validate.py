from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_scripts.data import looking, validate
from lora_scripts.data.looking import contents_and_sizes
from lora_scripts.data.picture_memory import PictureMemory
from lora_scripts.data.records import Record
from lora_scripts.errors import Problem, UserError
from lora_scripts.schema import ImageDataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "图片"
    folder.mkdir()
    return folder


def noise(seed: int, side: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return Image.fromarray(pixels)


def records(folder: Path) -> list[Record]:
    paths = [str(path) for path in sorted(folder.iterdir())]
    return [Record(path, "x", f"metadata.csv line {i}") for i, path in enumerate(paths, start=1)]


def check(found: Sequence[Record], roles: Sequence[str] = ()) -> list[Problem]:
    """What is found in the files, read without a memory."""
    looks = [looking.look(record.file) for record in found]
    rows = [
        (record, ImageDataset(path=Path(record.file).parent, role=role))
        for record, role in zip(found, roles or ["train"] * len(found), strict=True)
    ]
    return validate.check(rows, looks)


def image_sizes(found: Sequence[Record]) -> list[tuple[int, int]]:
    return contents_and_sizes([record.file for record in found], PictureMemory(None))[1]


def by_name(problems: Sequence[Problem]) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {
        Path(problem.where).name: (problem.severity, problem.what) for problem in problems
    }
    assert len(found) == len(problems)
    return found


def test_good_images_have_no_problem(folder: Path) -> None:
    for index, kind in enumerate(("PNG", "JPEG", "WEBP", "BMP")):
        noise(index).save(folder / f"a.{kind.lower()}", kind)
    camera = folder / "a.jpeg"
    camera.write_bytes(camera.read_bytes() + bytes(5000))  # data behind the end mark
    noise(5).save(folder / "phone.jpg", "MPO", save_all=True, append_images=[noise(6)])
    assert check(records(folder)) == []
    assert check([]) == []


def test_a_jpeg_cut_short_behind_its_thumbnail(folder: Path) -> None:
    thumbnail = io.BytesIO()
    noise(1, side=16).save(thumbnail, "JPEG")
    noise(0).save(folder / "a.jpg", exif=b"Exif\0\0" + thumbnail.getvalue())
    data = (folder / "a.jpg").read_bytes()
    assert data.count(b"\xff\xd9") == 2
    (folder / "a.jpg").write_bytes(data[:-500])
    (problem,) = check(records(folder))
    assert "cut short" in problem.what


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("part", [0.98, 0.5, 0.2])
def test_a_file_cut_short(folder: Path, kind: str, part: float) -> None:
    path = folder / "a.png"
    noise(0).save(path, kind)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    (problem,) = check(records(folder))
    assert problem.severity == "error" and problem.where == str(path)
    assert problem.what.endswith("; replace it or remove it (metadata.csv line 1)")


def test_every_bad_file_is_reported(folder: Path) -> None:
    noise(1).save(folder / "good.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>404</html>", encoding="utf-8")
    noise(2).save(folder / "really.png", "GIF")
    noise(3).save(folder / "damaged.png")
    data = bytearray((folder / "damaged.png").read_bytes())
    data[400:420] = bytes(20)
    (folder / "damaged.png").write_bytes(data)
    named = [*records(folder), Record(str(folder / "gone.png"), "x", "metadata.csv line 9")]
    found = by_name(check(named))
    assert found["empty.png"] == (
        "error",
        "the file is empty (0 bytes); replace it or remove it (metadata.csv line 2)",
    )
    assert "not an image" in found["page.jpg"][1]
    assert "its content is GIF" in found["really.png"][1]
    assert "the file is damaged" in found["damaged.png"][1]
    assert found["gone.png"] == ("error", "there is no such file (metadata.csv line 9)")
    assert "good.png" not in found and len(found) == 5


def test_decompression_bomb(folder: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        check_sum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check_sum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + body)
    (problem,) = check(records(folder))
    assert problem.severity == "error"
    assert "too large to be decoded safely" in problem.what and "3600000000" in problem.what


def test_warnings(folder: Path) -> None:
    frames = [noise(0), noise(1)]
    frames[0].save(folder / "a.png", save_all=True, append_images=frames[1:])
    noise(9).save(folder / "b.webp", save_all=True, append_images=frames[1:], lossless=True)
    noise(2).save(folder / "c.webp", exif=b"Exif\0\0nonsense")
    noise(3).save(folder / "d.jpg", icc_profile=b"nonsense")
    found = by_name(check(records(folder)))
    assert {severity for severity, _ in found.values()} == {"warning"}
    assert "an animation of 2 frames" in found["a.png"][1]
    assert "an animation of 2 frames" in found["b.webp"][1]
    assert "EXIF" in found["c.webp"][1]
    assert "colour profile" in found["d.jpg"][1]


def test_exact_duplicates(folder: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        noise(7).save(folder / name)
    noise(8).save(folder / "d.png")
    found = check(records(folder))
    assert [Path(problem.where).name for problem in found] == ["b.png", "c.png"]
    assert all(problem.severity == "warning" for problem in found)
    assert f"the same image as {folder / 'a.png'} (metadata.csv line 1), byte for byte" in (
        found[1].what
    )


def test_image_sizes(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(folder / "a.png")
    Image.new("RGB", (30, 20)).save(folder / "b.jpg", exif=exif)
    assert image_sizes(records(folder)) == [(30, 20), (20, 30)]
    (folder / "c.png").write_bytes(b"")
    (folder / "d.png").write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        image_sizes(records(folder))
    assert [Path(problem.where).name for problem in caught.value.problems] == ["c.png", "d.png"]


def test_a_header_is_enough_for_sizes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, kind in enumerate(("png", "jpg", "webp")):
        noise(index).save(folder / f"a.{kind}")

    def refuse(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    assert image_sizes(records(folder)) == [(64, 64)] * 3


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [("a.jpg", "PNG", "PNG"), ("a.png", "MPO", "JPEG"), ("a.webp", "JPEG", "JPEG")],
)
def test_content_that_does_not_fit_the_extension(
    folder: Path, name: str, kind: str, said: str
) -> None:
    noise(0).save(folder / name, kind)
    (problem,) = check(records(folder))
    assert (problem.severity, problem.kind) == ("warning", "content-extension")
    assert f"its content is {said}, its name ends in {Path(name).suffix}" in problem.what


def test_a_copy_that_is_held_out(folder: Path) -> None:
    for name in ("a.png", "b.png"):
        noise(7).save(folder / name)
    noise(7).save(folder / "c.jpg", quality=90)
    first, second = check(records(folder), ["train", "validation", "validation"])
    assert (first.kind, second.kind) == ("held-out-copy", "near-duplicate")
    for problem in (first, second):
        assert "one is learned and the other held out" in problem.what


def test_near_duplicates_are_told_by_groups(folder: Path) -> None:
    noise(1).save(folder / "a.png")
    noise(2).save(folder / "b.png")
    noise(1).resize((48, 48)).save(folder / "c.png")
    noise(2).save(folder / "d.jpg", quality=80)
    noise(1).save(folder / "e.jpg", quality=80)
    noise(3).save(folder / "f.png")
    first, second = check(records(folder))
    assert (first.kind, first.severity) == ("near-duplicate", "warning")
    assert first.where == str(folder / "a.png")
    assert first.what == (
        "nearly the same picture as c.png (metadata.csv line 3), e.jpg (metadata.csv line 5); what "
        "they show counts more often than the rest. Keep the best of them (metadata.csv line 1)"
    )
    assert second.where == str(folder / "b.png") and "d.jpg" in second.what
