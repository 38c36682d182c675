"""Nothing outside the folder of data is read or written, and no name harms a system."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_scripts import caption_store, file_names
from lora_scripts.data import (
    caption_files,
    conversations,
    masks,
    records,
)
from lora_scripts.errors import Problem, UserError
from lora_scripts.models import hub
from lora_scripts.models.text_signature import read_text_signature
from lora_scripts.schema import ImageDataset
from tests import text_toys
from tests.safety.attempts import picture, refused


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file outside the folder of data that somebody would like to read."""
    path = tmp_path / "outside" / "secret.txt"
    path.parent.mkdir()
    path.write_text("file_name,text\na.png,my secret\n", encoding="utf-8")
    return path


def links(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).symlink_to(folder.parent / "outside" / "secret.txt")


def errors(problems: list[Problem]) -> str:
    return "\n".join(str(problem) for problem in problems if problem.severity == "error")


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
@pytest.mark.parametrize("name", ["a.txt", "metadata.csv", "metadata.jsonl", "b.png"])
def test_links_out_of_a_folder_of_pictures_are_not_followed(
    tmp_path: Path, secret: Path, name: str
) -> None:
    folder = picture(tmp_path / "data")
    links(folder, name)
    found, problems = records.read_images(folder, None)
    assert "leads out of" in errors(problems)
    assert "secret" not in "".join(record.caption for record in found) + errors(problems)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
@pytest.mark.parametrize("name", ["a.txt", "metadata.csv"])
def test_captions_are_not_edited_through_a_link(tmp_path: Path, secret: Path, name: str) -> None:
    folder = picture(tmp_path / "data")
    links(folder, name)
    before = secret.read_bytes()
    assert "leads out of" in refused(lambda: caption_files.plan(folder, str.upper))
    store = {"format_version": 1, "files": [
        {"name": name, "before": "x", "after_sha256": caption_store._hash(before)}]}  # fmt: skip
    (folder / ".captions.undo.json").write_text(json.dumps(store), encoding="utf-8")
    assert "this is no edit" in refused(lambda: caption_store.take_back(folder))
    assert secret.read_bytes() == before


@pytest.mark.parametrize("name", ["../outside/secret.txt", "/etc/passwd", "C:/x.txt", "a/../../b"])
def test_an_undo_names_files_of_its_folder_only(tmp_path: Path, secret: Path, name: str) -> None:
    folder = picture(tmp_path / "data")
    store = {"format_version": 1, "files": [{"name": name, "before": "x", "after_sha256": "y"}]}
    (folder / ".captions.undo.json").write_text(json.dumps(store), encoding="utf-8")
    with pytest.raises(UserError):
        caption_store.take_back(folder)
    assert "my secret" in secret.read_text(encoding="utf-8")


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "metadata.csv"])
def test_links_out_of_a_folder_of_texts_are_not_followed(
    tmp_path: Path, secret: Path, name: str
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    links(folder, name)
    found = conversations.read_texts(folder, None)
    assert "leads out of" in errors(found.problems) and not found.records
    (folder / name).unlink()
    row = {"file_name": "inner.txt", "text": "an answer"}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    links(folder, "inner.txt")
    found = conversations.read_texts(folder, None)
    assert "leads out of" in errors(found.problems) and not found.records


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_out_of_a_folder_of_masks_are_not_followed(tmp_path: Path, secret: Path) -> None:
    folder = picture(tmp_path / "data")
    picture(tmp_path / "outside")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").symlink_to(tmp_path / "outside" / "a.png")
    record = records.Record(str(folder / "a.png"), "x", "a.png")
    dataset = ImageDataset(path=folder, mask_dir=tmp_path / "masks")
    assert "leads out of the folder of masks" in refused(lambda: masks.find(record, dataset))


@pytest.mark.parametrize(
    "name", ["../b.png", "/etc/b.png", "C:\\b.png", "..\\b.png", "a/../../b.png"]
)
def test_names_in_rows_do_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    folder = picture(tmp_path / "data")
    row = json.dumps({"file_name": name, "text": "x"})
    (folder / "metadata.jsonl").write_text(row + "\n", encoding="utf-8")
    found, problems = records.read_images(folder, None)
    assert not found and "leaves the folder of images" in errors(problems)
    texts = tmp_path / "texts"
    texts.mkdir()
    row = json.dumps({"file_name": name.replace(".png", ".txt"), "text": "x"})
    (texts / "a.jsonl").write_text(row + "\n", encoding="utf-8")
    assert "leaves the folder" in errors(conversations.read_texts(texts, None).problems)


def test_shards_do_not_leave_the_folder(tmp_path: Path) -> None:
    folder = text_toys.save_model(tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"a": "../model.safetensors"}}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index), encoding="utf-8")
    save_file({"a": torch.ones(1)}, folder / "other.safetensors")
    assert "names files outside the folder" in refused(lambda: read_text_signature(folder))


@pytest.mark.parametrize("name", ["a/../../../b", "../model", "a b/c", "-rf/x", "a/b.git", "a//b"])
def test_hub_ids_are_names_only(tmp_path: Path, name: str) -> None:
    assert "no such file or folder" in refused(lambda: hub.local_path(name))


NAMES = ("CON", "nul", "com1", "LPT9.x", "aux.tar.gz", "a.", "a ", "..", ".", "a/b", "a\\b", "a:b",
         "a\nb", " a", "a?b")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_that_no_system_takes(name: str) -> None:
    assert file_names.trouble(name) is not None


@pytest.mark.parametrize("name", ["cat", "我的猫", "v1.2", "console", "com10", "a b", ".x", "nul1"])
def test_names_that_every_system_takes(name: str) -> None:
    assert file_names.trouble(name) is None
