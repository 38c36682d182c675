"""`lora-scripts new`: what it makes is what `check` accepts, and nothing is written over."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from lora_scripts import config, new_project
from lora_scripts.errors import UserError
from lora_scripts.preflight import inputs
from lora_scripts.schema import ImageConfig, TextConfig
from tests import console, text_toys, toys
from tests.models import ldm_facts


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def new(*arguments: str, code: int = 0) -> str:
    found, said = console.command("new", *arguments)
    assert found == code, said
    return said


def pictures(folder: Path, count: int = 3) -> Path:
    toys.save_pictures(folder, count=count)
    (folder / "metadata.csv").unlink()
    return folder


def test_the_resolution_is_what_the_base_was_made_for(here: Path) -> None:
    pictures(here / "data")
    base = Path(__file__).parent.parent / "assets" / "demo" / "model"
    new("small", "--data", "data", "--base", base.as_posix())
    assert config.load(here / "configs" / "small.yaml").resolution == 64
    checkpoint = here / "xl.safetensors"
    ldm_facts.write_zeros(checkpoint, ldm_facts.published_xl())
    new("large", "--data", "data", "--base", checkpoint.as_posix())
    assert config.load(here / "configs" / "large.yaml").resolution == 1024
    new("usual", "--data", "data")
    assert "resolution" not in (here / "configs" / "usual.yaml").read_text(encoding="utf-8")


def test_pictures_without_captions(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures(here / "我的 图")
    toys.save_stable_diffusion(here / "模型")
    with caplog.at_level("INFO", logger="lora_scripts"):
        new_project.run("赛 博", Path("我的 图"), "模型", "image-generation")
    path = here / "configs" / "赛 博.yaml"
    assert path.read_text(encoding="utf-8") == (
        "# yaml-language-server: $schema=schema.json\n"
        'base_model: "模型"\n'
        'train_data_dir: "我的 图"\n'
        'output_dir: "output/赛 博"\n'
        "lora_rank: 16\n"
        "learning_rate: 1e-4\n"
        "resolution: 64\n"  # what the toy was made for
    )
    assert (here / "我的 图" / "metadata.csv").read_text(encoding="utf-8") == (
        'file_name,text\nimg00.png,""\nimg01.png,""\nimg02.png,""\n'
    )
    assert json.loads((here / "configs" / "schema.json").read_text(encoding="utf-8"))
    draft = config.read(path, [])
    rows, problems = inputs(draft)
    assert len(rows) == 3 and isinstance(draft.checked(), ImageConfig)
    assert all(problem.severity != "error" for problem in problems)
    if shlex.quote("a b") == "'a b'":
        assert "\n".join(caplog.messages[-3:]) == (
            "  lora-scripts label --input '我的 图'\n"
            "  lora-scripts check --config 'configs/赛 博.yaml'\n"
            "  lora-scripts train --config 'configs/赛 博.yaml'"
        )


def test_captions_that_are_there_stay(here: Path) -> None:
    folder = toys.save_pictures(here / "data", count=2)
    before = (folder / "metadata.csv").read_bytes()
    new("a", "--data", "data")
    assert (folder / "metadata.csv").read_bytes() == before
    beside = pictures(here / "beside", count=2)
    (beside / "img00.txt").write_text("a square", encoding="utf-8")
    new("b", "--data", "beside")
    kohyas = pictures(here / "kohyas" / "10_a cat", count=2).parent
    new("c", "--data", "kohyas")
    assert not (beside / "metadata.csv").exists() and not (kohyas / "metadata.csv").exists()


def test_the_folder_is_made(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lora_scripts"):
        new_project.run("style", Path("data/style"), None, "image-generation")
    assert list((here / "data" / "style").iterdir()) == []
    assert "put your pictures into " in caplog.text
    found = config.read(here / "configs" / "style.yaml", []).checked()
    assert found.base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert found.output_name == "style"


def test_texts(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lora_scripts"):
        new_project.run("voice", Path("data"), None, "text-generation")
    assert f"a line of a .jsonl: {new_project.EXAMPLE_ROW}" in caplog.text
    text_toys.write_jsonl(here / "rows.jsonl")
    base = text_toys.save_model(here / "llama")
    new("chat", "--data", "rows.jsonl", "--base", "llama", "--task", "text-generation")
    path = here / "configs" / "chat.yaml"
    assert len(path.read_text(encoding="utf-8").splitlines()) == 6
    draft = config.read(path, [])
    rows, problems = inputs(draft)
    found = draft.checked()
    assert isinstance(found, TextConfig) and found.base_model == base.name
    assert len(rows) == 12 and all(problem.severity != "error" for problem in problems)
    (here / "own.jsonl").write_text(new_project.EXAMPLE_ROW + "\n", encoding="utf-8")
    new("own", "--data", "own.jsonl", "--base", "llama", "--task", "text-generation")
    assert len(inputs(config.read(here / "configs" / "own.yaml", []))[0]) == 1


@pytest.mark.parametrize(
    "name", ["a/b", "a\\b", "..", ".a", "-a", "a.", " a", "a ", "a:b", 'a"b', "a\nb", "x.yaml", ""]
)
def test_names_that_are_none(name: str, here: Path) -> None:
    with pytest.raises(UserError, match="is no name for a file"):
        new_project.run(name, Path("data"), None, "image-generation")
    assert list(here.iterdir()) == []


def test_nothing_is_written_over(here: Path) -> None:
    new("a", "--data", "data")
    before = (here / "configs" / "a.yaml").read_bytes()
    said = new("a", "--data", "other", "--base", "b/c", code=2)
    assert (here / "configs" / "a.yaml").read_bytes() == before
    assert "is there already; choose another name" in said
    assert not (here / "other").exists()
    (here / "output" / "run").mkdir(parents=True)
    new("run", "--data", "data", code=2)
    (here / "configs" / "schema.json").write_text("mine", encoding="utf-8")
    new("c", "--data", "data")
    assert (here / "configs" / "schema.json").read_text(encoding="utf-8") == "mine"


def test_paths_that_are_wrong(here: Path) -> None:
    (here / "file").touch()
    for arguments, what in [
        (["--data", "file"], "this is a file; expected a folder"),
        (["--data", "d", "--base", "./gone"], "./gone: no such file or folder"),
        (["--data", "rows.jsonl", "--task", "text-generation"], "there is no such file; write it"),
        (["--data", "file/below"], "cannot be written"),
    ]:
        assert what in new("a", *arguments, code=1 if "written" in what else 2)
    assert not (here / "configs").exists()
