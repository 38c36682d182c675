"""`lora-scripts check`: what is wrong, all of it; else an example as the model will see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lora_scripts import check
from lora_scripts.errors import UserError
from tests import base_toys, runs, text_toys, toys
from tests.data import chat_toys


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_toys.save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that reads weights fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)


def config_of(folder: Path, base: Path, rows: Any = None, **changes: Any) -> Path:
    data = text_toys.write_jsonl(folder / "rows.jsonl", rows)
    values = runs.text_values(base, data, folder, **changes)
    return toys.write_config(folder / "my.yaml", **values)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Any:
    """Runs a check; what was logged, and what was printed."""

    def run(path: Path, *overrides: str, row: int = 1) -> tuple[str, str]:
        caplog.clear()
        with caplog.at_level("INFO", logger="lora_scripts"):
            check.run(path, overrides, row)
        return "\n".join(caplog.messages), capsys.readouterr().out

    return run


def test_a_good_config_shows_its_first_row(tmp_path: Path, base: Path, said: Any) -> None:
    logged, printed = said(config_of(tmp_path, base))
    assert "12 rows in 12 samples, 840 tokens, 252 of them learned; the longest" in logged
    assert "Chat template: the tokenizer's own" in logged
    assert "puts a system message before conversations without one: 'You are a toy.'" in logged
    assert "Row 1 (rows.jsonl line 1); what is learned is between « and »." in logged
    assert "Sample: 69 tokens, 22 of them learned:" in logged
    assert printed == (
        "<|im_start|>system\nYou are a toy.<|im_end|>\n"
        "<|im_start|>user\nWhat is number 0?<|im_end|>\n"
        "<|im_start|>assistant\n«It is good today.<|im_end|>»\n"
        "<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n«No, 0 is fine, thank you.<|im_end|>»\n\n"
    )


def test_another_row(tmp_path: Path, base: Path, said: Any) -> None:
    path = config_of(tmp_path, base, system_prompt="天气 [bold]")
    logged, printed = said(path, "train_on=last", row=2)
    assert "Row 2 (rows.jsonl line 2)" in logged and "You are a toy" not in logged
    assert "system\n天气 [bold]<|im_end|>" in printed
    assert "What is number 1? Please.<|im_end|>" in printed
    with pytest.raises(UserError, match="--row 13: there are 12 rows"):
        said(path, row=13)


def test_the_training_finds_what_was_tokenised(
    tmp_path: Path, base: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_of(tmp_path, base, epochs=1)
    said(path)
    (cached,) = (tmp_path / "cache").rglob("*.safetensors")
    monkeypatch.undo()
    runs.run_text(base, tmp_path / "rows.jsonl", tmp_path, epochs=1)
    assert list((tmp_path / "cache").rglob("*.safetensors")) == [cached]


@pytest.mark.parametrize("kind", ["gguf", "chatglm3", "glm4"])
def test_other_layouts(
    kind: str, tmp_path: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the toy is a model that has to be made first
    if kind == "gguf":
        base = base_toys.save_gguf(tmp_path / "base.gguf")
    else:
        base = base_toys.save_chatglm(tmp_path / kind, kind)
    monkeypatch.setattr("lora_scripts.models.causal_lm._load_model", None)
    rows = [{"messages": [
        {"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！ well"}
    ]}]  # fmt: skip
    _, printed = said(config_of(tmp_path, base, rows))
    expected = {
        "gguf": "assistant\n«你好！ well<|im_end|>»",
        # sentencepiece puts a space before every piece of text, as the original does
        "chatglm3": "[gMASK]<sop><|user|> \n 你好<|assistant|>« \n 你好！ well<|user|>»",
        "glm4": "[gMASK]<sop><|user|>\n你好<|assistant|>«\n你好！ well<|user|>»",
    }
    assert expected[kind] in printed


def test_a_row_of_several_samples(tmp_path: Path, base: Path, said: Any) -> None:
    """Qwen3 drops earlier thoughts, so that each turn that holds some is a sample of its own."""
    tokenizer = chat_toys.qwen3_tokenizer()
    tokenizer.chat_template = chat_toys.QWEN3
    folder = tmp_path / "qwen3"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    turns = [
        turn
        for number in range(5)
        for turn in (
            {"role": "user", "content": f"Question {number}"},
            {"role": "assistant", "content": "Yes.", "reasoning_content": f"thought {number}"},
        )
    ]
    logged, printed = said(config_of(tmp_path, folder, [{"messages": turns}]))
    assert "Row 1 (rows.jsonl line 1) in 5 samples" in logged
    assert "Sample 3: " in logged and "Sample 4" not in logged
    assert "… and 2 samples more." in logged
    assert "«<think>\nthought 0\n</think>\n\nYes.<|im_end|>»" in printed


def test_of_a_long_text_only_the_first_windows_are_shown(
    tmp_path: Path, base: Path, said: Any
) -> None:
    path = config_of(tmp_path, base, [{"text": "Hello there! " * 3000}], max_seq_length=16)
    logged, printed = said(path)
    assert "is in order: 1 row in 1,000 samples, " in logged
    assert logged.count(" of them learned:") == 3
    assert "… and 997 samples more." in logged
    assert 3 <= printed.count("Hello") < 40
    assert printed.startswith("Hello«")


def test_all_problems_at_once(tmp_path: Path, base: Path, said: Any) -> None:
    path = config_of(tmp_path, base, lora_rnk=8, batch_size="four", base_model="./gone")
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"messages": []}\n')
    with pytest.raises(UserError) as caught:
        said(path)
    whats = [str(problem) for problem in caught.value.problems if problem.severity == "error"]
    assert len(whats) == 4
    for part in ("lora_rnk", "batch_size", "gone", "rows.jsonl line 13"):
        assert any(part in what for what in whats), part


def test_every_row_that_the_template_refuses(tmp_path: Path, base: Path, said: Any) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    rows = text_toys.conversations(4)
    rows[1]["tools"] = rows[3]["tools"] = tools
    rows[2]["messages"][0]["content"] *= 60
    path = config_of(tmp_path, base, rows, chat_template="chatml")
    with pytest.raises(UserError) as caught:
        said(path)
    places = [problem.where for problem in caught.value.problems]
    assert places == ["rows.jsonl line 2", "rows.jsonl line 3", "rows.jsonl line 4"]
    assert "it has no place for tools" in caught.value.problems[0].what
    assert "raise max_seq_length" in caught.value.problems[1].what


def test_what_is_cut_is_said(tmp_path: Path, base: Path, said: Any) -> None:
    logged, _ = said(config_of(tmp_path, base, max_seq_length=100))
    assert "1 of 12 rows are longer than max_seq_length 100: 2 tokens" in logged


def test_pictures(tmp_path: Path, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    base = toys.save_stable_diffusion(tmp_path / "sd")
    data = toys.save_pictures(tmp_path / "squares")
    values = runs.values(base, data, tmp_path, trigger_word="zwx")
    path = toys.write_config(tmp_path / "my.yaml", **values)
    logged, _ = said(path, row=2)
    assert f"{path} is in order: 6 pictures with captions." in logged
    assert f"Row 2: {data / 'img01.png'} (64 × 64)" in logged
    assert logged.splitlines()[-1] == "zwx, a square, number 1"


# --- as it is typed -------------------------------------------------------------------------------


def command(folder: Path, *arguments: str, **streams: Any) -> subprocess.CompletedProcess[bytes]:
    root = str(Path(check.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "lora_scripts", "check", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root, "PYTHONIOENCODING": "utf-8", "TERM": "xterm"},
        timeout=120,
        check=False,
        **streams,
    )


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_on_a_terminal_what_is_learned_is_green(tmp_path: Path, base: Path) -> None:
    import pty

    config_of(tmp_path, base)
    ours, its = pty.openpty()
    done = command(tmp_path, "--config", "my.yaml", stdout=its, stderr=its)
    os.close(its)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # Linux' way to say that the other end is closed
        pass
    os.close(ours)
    text = shown.decode("utf-8").replace("\r\n", "\n")
    assert done.returncode == 0, text
    assert "what is learned is green." in text
    assert "\x1b[1;32mIt is good today.<|im_end|>\x1b[0m" in text
    assert "«" not in text


def test_exit_codes(tmp_path: Path, base: Path) -> None:
    config_of(tmp_path, base)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": "x"}) + "\n", encoding="utf-8")
    done = command(tmp_path, "--config", "my.yaml", "seed=-1", capture_output=True)
    assert done.returncode == 2
    assert done.stderr.decode("utf-8").startswith("2 problems:\n")
    assert b"Traceback" not in done.stderr


# --- the report -----------------------------------------------------------------------------------


def pictures_config(folder: Path, base: Path, **changes: Any) -> Path:
    """Five pictures of several shapes and their tags."""
    data = folder / "图片"
    data.mkdir()
    sizes = {"a": (64, 64), "b": (96, 64), "c": (64, 96), "d": (64, 64), "e": (128, 80)}
    rows = []
    for seed, (name, size) in enumerate(sizes.items()):
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(data / f"{name}.png")
        tags = "tree, red" if seed < 3 else "tree"
        rows.append(f'{name}.png,"{tags}, no {seed}"')
    (data / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return toys.write_config(folder / "my.yaml", **runs.values(base, data, folder, **changes))


def test_the_report(tmp_path: Path, sd_folder: Path, said: Any) -> None:
    path = pictures_config(tmp_path, sd_folder, bucket_step=16, trigger_word="zwx")
    logged, _ = said(path)
    assert "Pictures: 5 (5 train), captions: 5" in logged
    assert "Width: 64 to 128, median 64. Height: 64 to 96, median 64" in logged
    assert "Trained at: 48×80: 1, 64×64: 2, 80×48: 2" in logged
    # letters are the toy's tokens, "zwx," put in front included
    assert "Tokens of a caption: 12 to 16, median 16" in logged
    assert "Most frequent tags: tree (5), red (3)" in logged


def test_a_contact_sheet(tmp_path: Path, sd_folder: Path, said: Any) -> None:
    path = pictures_config(tmp_path, sd_folder, bucket_step=16)
    sheet = tmp_path / "new folder" / "sheet.png"
    check.run(path, (), contact_sheet=sheet)
    with Image.open(sheet) as written:
        assert written.size == (5 * 200 + 8, 192 + 3 * 16 + 8 + 8)
        pixels = np.asarray(written)
    first = np.asarray(Image.open(tmp_path / "图片" / "a.png")).repeat(3, axis=0).repeat(3, axis=1)
    assert (pixels[9 : 8 + 191, 9 : 8 + 191] == first[1:-1, 1:-1]).all()  # a grey line around
    assert (pixels[8 + 192 : 8 + 192 + 16, 8:200] < 128).any()  # the name below it
    with pytest.raises(UserError, match=r"--contact-sheet .*my.yaml.sheet.png: cannot be written"):
        check.run(path, (), contact_sheet=path / "sheet.png")


def test_a_text_config_has_figures_and_no_sheet(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_of(tmp_path, base)
    assert check.run(path, (), as_json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["report"] == {
        "rows": 12, "samples": 12, "tokens": 840, "learned": 252, "longest": 102,
    }  # fmt: skip
    assert {warning["where"] for warning in printed["warnings"]} == {
        "rows.jsonl line 2", "rows.jsonl line 3",
    }  # fmt: skip
    with pytest.raises(UserError, match="is for pictures; this config is for texts"):
        check.run(path, (), contact_sheet=tmp_path / "sheet.png")


def test_places_for_machines(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_of(tmp_path, base, lora_rank=0)
    (tmp_path / "rows.jsonl").write_text('{"messages": "x"}\n', encoding="utf-8")
    assert check.run(path, ("seed=-1",), as_json=True) == 2
    errors = json.loads(capsys.readouterr().out)["errors"]
    places = [(error["kind"], Path(error["file"]).name, error["line"]) for error in errors]
    assert places == [
        ("config", "my.yaml", 7), ("config", "command line: seed", None), ("data", "rows.jsonl", 1),
    ]  # fmt: skip


def test_places_are_told_with_their_folders_where_there_are_several(
    tmp_path: Path, sd_folder: Path, said: Any
) -> None:
    for name in ("one", "two"):
        toys.save_pictures(tmp_path / name, seed=len(name) + ord(name[0]))
    (tmp_path / "two" / "metadata.csv").write_text("img00.png,a,b\n", encoding="utf-8")
    datasets = [{"path": str(tmp_path / "one")}, {"path": str(tmp_path / "two")}]
    values = runs.values(sd_folder, tmp_path, tmp_path, datasets=datasets)
    del values["train_data_dir"]
    with pytest.raises(UserError) as caught:
        said(toys.write_config(tmp_path / "my.yaml", **values))
    assert str(caught.value.problems[0]).startswith(
        f"{tmp_path / 'two' / 'metadata.csv'} line 1: 3 fields found"
    )
