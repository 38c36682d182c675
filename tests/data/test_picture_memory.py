"""What is found out about a picture is remembered, and only as long as it is true."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from lora_scripts import files
from lora_scripts.data import looking, picture_memory
from lora_scripts.data.looking import Look

LONG_AGO = 1_600_000_000


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Pictures that were changed long ago, one of them damaged."""
    (tmp_path / "图片").mkdir()
    paths = [tmp_path / "图片" / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    paths[4].write_bytes(paths[4].read_bytes()[:3000])
    for path in paths:
        os.utime(path, (LONG_AGO, LONG_AGO))
    return paths


def look_at(paths: list[Path], cache: Path) -> list[Look]:
    with picture_memory.opened(cache) as memory:
        return list(looking.look_at_all(paths, len(paths), memory, lambda done, total: None))


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts the files that are hashed, opened and decoded."""
    counts = {"hashed": 0, "opened": 0, "decoded": 0}
    lock = threading.Lock()

    def counting(name: str, function: object) -> object:
        def counted(*arguments: object) -> object:
            with lock:
                counts[name] += 1
            return function(*arguments)  # type: ignore[operator]

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looking, "file_hash", counting("hashed", files.file_hash))
        patch.setattr(Image, "open", counting("opened", Image.open))
        patch.setattr(ImageFile.ImageFile, "load", counting("decoded", ImageFile.ImageFile.load))
        yield counts


def test_a_second_look_reads_no_file(pictures: list[Path], tmp_path: Path) -> None:
    first = look_at(pictures, tmp_path / "cache")
    assert [look.size for look in first[:4]] == [(64, 48)] * 4
    assert first[4].error is not None and first[4].error[0] == "truncated"
    with counted() as counts:
        assert look_at(pictures, tmp_path / "cache") == first
    assert counts == {"hashed": 0, "opened": 0, "decoded": 0}


def test_contents_and_sizes_come_from_it(pictures: list[Path], tmp_path: Path) -> None:
    good = pictures[:4]
    first = look_at(good[:3], tmp_path / "cache")
    with counted() as counts, picture_memory.opened(tmp_path / "cache") as memory:
        contents, sizes = looking.contents_and_sizes(good, memory)
    assert counts == {"hashed": 1, "opened": 1, "decoded": 0}  # of the one that is not known
    assert contents[:3] == [look.content for look in first]
    assert contents == [files.file_hash(path) for path in good] and sizes == [(64, 48)] * 4


def test_a_file_that_was_touched_or_moved_is_hashed_only(
    pictures: list[Path], tmp_path: Path
) -> None:
    first = look_at(pictures, tmp_path / "cache")
    os.utime(pictures[0], (LONG_AGO + 9, LONG_AGO + 9))
    moved = pictures[1].rename(pictures[1].with_name("moved.png"))
    with counted() as counts:
        found = look_at([pictures[0], moved, *pictures[2:]], tmp_path / "cache")
    assert found == first
    assert counts == {"hashed": 2, "opened": 0, "decoded": 0}


def test_other_bytes_are_looked_at_anew(pictures: list[Path], tmp_path: Path) -> None:
    look_at(pictures, tmp_path / "cache")
    Image.new("RGB", (10, 20)).save(pictures[0])
    os.utime(pictures[0], (LONG_AGO + 9, LONG_AGO + 9))
    found = look_at(pictures, tmp_path / "cache")
    assert found[0].size == (10, 20)


def test_a_file_changed_just_now_is_not_trusted_to_stay(
    pictures: list[Path], tmp_path: Path
) -> None:
    """It may change again without another time: file systems count in steps."""
    os.utime(pictures[0])
    look_at(pictures, tmp_path / "cache")
    with counted() as counts:
        look_at(pictures, tmp_path / "cache")
    assert counts == {"hashed": 1, "opened": 0, "decoded": 0}


def test_another_decoder_looks_for_itself(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_at(pictures[:4], tmp_path / "cache")
    monkeypatch.setattr(looking, "DECODER", "Pillow 99")
    with counted() as counts:
        look_at(pictures[:4], tmp_path / "cache")
    assert counts["hashed"] == 4 and counts["decoded"] >= 4


@pytest.mark.parametrize("damage", ["no database", "a torn page", "another table"])
def test_a_damaged_memory_is_made_anew(
    damage: str, pictures: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    first = look_at(pictures, cache)
    path = cache / picture_memory.FILE_NAME
    match damage:
        case "no database":
            path.write_bytes(b"no database, but long enough to be looked at" * 100)
        case "a torn page":
            data = bytearray(path.read_bytes())
            data[4096 : 4096 + 3000] = b"\xff" * 3000
            path.write_bytes(data)
        case "another table":
            with sqlite3.connect(path) as connection:
                connection.execute("ALTER TABLE looks RENAME COLUMN look TO seen")
            connection.close()
    assert look_at(pictures, cache) == first
    said = "\n".join(caplog.messages)
    assert ("cannot be remembered" if damage == "another table" else "made anew") in said
    caplog.clear()
    if damage != "another table":
        with counted() as counts:
            assert look_at(pictures, cache) == first
        assert counts["hashed"] == 0 and caplog.messages == []


def test_a_place_that_cannot_be_written_is_done_without(
    pictures: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    assert len(look_at(pictures, tmp_path / "cache")) == 5
    assert "cannot be remembered" in "\n".join(caplog.messages)


def test_two_at_once(pictures: list[Path], tmp_path: Path) -> None:
    """Each with a connection of its own, as processes have."""
    found: list[list[Look]] = []
    threads = [
        threading.Thread(target=lambda: found.append(look_at(pictures, tmp_path / "cache")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(each == found[0] for each in found)
    with counted() as counts:
        look_at(pictures, tmp_path / "cache")
    assert counts["hashed"] == 0


def test_a_file_that_goes_meanwhile(pictures: list[Path], tmp_path: Path) -> None:
    pictures[0].unlink()
    look = look_at(pictures, tmp_path / "cache")[0]
    assert look.error == ("unreadable-file", "there is no such file")


@pytest.mark.parametrize("path", ["a.png", "data/a.png", "../data/图.png", "/data/a.png"])
def test_a_file_is_known_by_its_absolute_path(path: str) -> None:
    """As earlier versions wrote it, so that what they remember stays known."""
    assert picture_memory._key(path) == os.fsencode(Path(path).absolute())
    assert picture_memory._key(Path(path)) == picture_memory._key(path)
