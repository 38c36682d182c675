"""What changed in the data since a checkpoint, told by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lora_scripts import inventory
from lora_scripts.errors import UserError
from lora_scripts.run_files import INVENTORY
from tests import runs, text_toys

SAMPLES = [(f"img{number}.png", f"hash {number}") for number in range(6)]


def test_the_same_samples_are_no_difference(tmp_path: Path) -> None:
    inventory.write(tmp_path, iter(SAMPLES))
    said = inventory.changes(tmp_path, SAMPLES[::-1])
    assert said == "the same samples, in another order or otherwise dealt"


def test_new_gone_and_changed_are_named(tmp_path: Path) -> None:
    inventory.write(tmp_path, SAMPLES)
    now = [*SAMPLES[2:], ("img1.png", "other"), ("new.png", "hash 9"), ("moved.png", "hash 3")]
    said = inventory.changes(tmp_path, now)
    assert said == "1 changed (img1.png), 1 new (new.png), 1 gone (img0.png)"


def test_of_many_a_few_are_named(tmp_path: Path) -> None:
    inventory.write(tmp_path, SAMPLES[:1])
    assert inventory.changes(tmp_path, SAMPLES) == "5 new (img1.png, img2.png, img3.png, …)"


def test_a_copy_is_told_by_the_number(tmp_path: Path) -> None:
    inventory.write(tmp_path, SAMPLES)
    assert inventory.changes(tmp_path, [*SAMPLES, ("copy.png", "hash 1")]) == "6 then, 7 now"


@pytest.mark.parametrize("content", [None, b"", b"\x1f\x8b\x08\x00", b"no gzip at all"])
def test_without_a_list_nothing_is_said(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / INVENTORY).write_bytes(content)
    assert inventory.changes(tmp_path, SAMPLES) == ""


def test_of_very_many_no_list_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inventory.write(tmp_path, SAMPLES)
    monkeypatch.setattr(inventory, "MOST", 5)
    inventory.write(tmp_path, SAMPLES)
    assert list(tmp_path.iterdir()) == []


def test_a_run_names_the_pictures_that_changed(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    runs.run(sd_folder, data, tmp_path)
    captions = data / "metadata.csv"
    text = captions.read_text(encoding="utf-8")
    second = text.splitlines()[2]
    captions.write_text(text.replace("number 0", "number zero"), encoding="utf-8")
    with pytest.raises(UserError, match=r"the data changed .*: 1 changed \(.*\.png\)\. Ways on"):
        runs.run(sd_folder, data, tmp_path, epochs=3)
    captions.write_text(text.replace(f"{second}\n", ""), encoding="utf-8")
    (data / second.split(",")[0]).unlink()
    with pytest.raises(UserError, match=r"the data changed .*: 1 gone \(.*\.png\)\. Ways on"):
        runs.run(sd_folder, data, tmp_path, epochs=3)


def test_a_run_names_the_rows_that_changed(tmp_path: Path) -> None:
    base, rows = text_toys.save_model(tmp_path / "m"), text_toys.write_jsonl(tmp_path / "r.jsonl")
    runs.run_text(base, rows, tmp_path)
    lines = rows.read_text(encoding="utf-8").splitlines()
    row = '{"prompt": "What is new?", "completion": "This."}'
    rows.write_text("\n".join([row, *lines]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"the data changed .*: 1 new \(r\.jsonl line 1\)\. Ways"):
        runs.run_text(base, rows, tmp_path, epochs=3)
