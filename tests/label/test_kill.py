"""The labeller killed: every image has one caption in the end, and none was made twice."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from lora_scripts.data.records import read_images
from tests.label import killed, toys

KILLS = 10
IMAGES, BATCH = 160, 2


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.toy_blip(tmp_path_factory.mktemp("blip"))


def stored(journal: Path) -> list[str]:
    """The names in whole lines of a journal, read without the code that is tested."""
    if not journal.exists():
        return []
    lines = journal.read_text(encoding="utf-8").split("\n")[1:-1]
    return [json.loads(line)["name"] for line in lines]


def captioned(log: Path, names: list[str]) -> list[str]:
    """What BLIP has captioned, in order."""
    numbers = log.read_text(encoding="utf-8").split() if log.exists() else []
    return [names[int(number)] for number in numbers]


def captions(folder: Path) -> dict[str, str]:
    records, problems = read_images(folder, None)
    assert [each for each in problems if each.severity == "error"] == []
    return {record.name: record.caption for record in records}


def finish(log: Path, arguments: list[str]) -> None:
    process = killed.start(log, arguments)
    process.join(60)
    assert process.exitcode == 0, log.with_suffix(".out").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def uninterrupted(blip: Path) -> dict[str, str]:
    """The captions of a labelling that nobody stops."""
    folder = blip.parent / "whole"
    killed.save_numbered(folder, IMAGES)
    finish(blip.parent / "whole.log", ["--input", str(folder), "--model", str(blip)])
    return captions(folder)


def test_ten_kills_at_random(tmp_path: Path, blip: Path, uninterrupted: dict[str, str]) -> None:
    folder, log = tmp_path / "图片", tmp_path / "killed.log"
    names = killed.save_numbered(folder, IMAGES)
    journal = folder / "metadata.csv.unfinished"
    arguments = ["--input", str(folder), "--model", str(blip), "--batch-size", str(BATCH)]
    chance = random.Random()
    kept: list[str] = []
    made: list[str] = []
    progress = []
    for _ in range(KILLS):
        process = killed.start(log, arguments)
        wanted = len(kept) + chance.randint(0, 8)
        until = time.monotonic() + 30
        while len(stored(journal)) < wanted and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.05))
        assert process.is_alive()
        process.kill()
        process.join()
        now, all_made = stored(journal), captioned(log, names)
        assert now[: len(kept)] == kept  # what is stored stays
        assert set(all_made[len(made) :]).isdisjoint(kept)  # and is not made again
        assert len(set(now)) == len(now)
        progress.append(len(now) - len(kept))
        kept, made = now, all_made
    assert sum(count > 0 for count in progress) >= 3  # kills in the middle of the work
    assert not (folder / "metadata.csv").exists()
    finish(log, arguments)
    assert set(captioned(log, names)[len(made) :]) == set(names) - set(kept)
    assert len(captioned(log, names)) <= IMAGES + KILLS * BATCH  # a batch is lost by each at most
    lines = (folder / "metadata.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert [line.split(",")[0] for line in lines] == names
    assert captions(folder) == uninterrupted
    assert not journal.exists()


@pytest.mark.parametrize(
    "format, dies",
    [
        ("csv", "at loading"),
        ("csv", "in appending"),
        ("csv", "before writing"),
        ("jsonl", "before removing"),
        ("csv", "after removing"),
        ("txt", "in writing txt"),
    ],
)
def test_killed_at_this_place(
    tmp_path: Path, blip: Path, uninterrupted: dict[str, str], format: str, dies: str
) -> None:
    folder, log = tmp_path / "d", tmp_path / "killed.log"
    names = killed.save_numbered(folder, 8)
    arguments = ["--input", str(folder), "--model", str(blip), "--batch-size", "2"]
    arguments += ["--format", format]
    process = killed.start(log, arguments, dies)
    process.join(60)
    assert process.exitcode not in (0, 1, 2, None)
    finish(log, arguments)
    torn = 1 if dies == "in appending" else 0
    assert len(captioned(log, names)) == 8 + torn
    assert captions(folder) == {name: uninterrupted[name] for name in names}
    assert list(folder.glob("*unfinished")) == []
    assert list(folder.glob("*.tmp")) == []
