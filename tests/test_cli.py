"""The command line as it is typed: one message with all problems, the right exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MISTAKES = """\
base_model: ./模型/v1-5.ckpt
train_data_dir: ./数据/赛博朋克
output_dir: ./输出/风格
lora_rnk: 8
batch_size: four
trigger_word: 赛博😀
"""


def run(*arguments: str, cwd: Path, encoding: str = "utf-8") -> tuple[int, str]:
    """Exit code and everything said by `python train.py …`, run from `cwd`."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "100", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    said = result.stdout.decode(encoding)
    assert "Traceback" not in said
    assert "Error:" not in said.replace("Usage", "")
    return result.returncode, said


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder as a user has it, in Chinese, with a config full of mistakes."""
    from PIL import Image

    pictures = tmp_path / "数据/赛博朋克"
    pictures.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(pictures / "图01.png")
    rows = [
        "file_name,text",
        "图01.png,霓虹灯 🌃 的城市",
        "图02.png,不存在的图",
        "图03.png,逗号,无引号",
    ]
    (pictures / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "模型").mkdir()
    (tmp_path / "模型/v1-5.ckpt").write_bytes(b"\x80")
    (tmp_path / "配置.yaml").write_text(MISTAKES, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("encoding", ["utf-8", "gbk", "cp1252", "ascii"])
def test_every_mistake_in_one_message(project: Path, encoding: str) -> None:
    code, said = run("--config", "配置.yaml", "seed=-1", cwd=project, encoding=encoding)
    assert code == 2
    lines = said.replace("\\", "/").splitlines()
    expected = [
        "6 problems:",
        "  配置.yaml line 4: lora_rnk: unknown key; did you mean lora_rank?",
        '  配置.yaml line 5: batch_size: found the text "four", must be auto, or a whole number',
        "  command line: seed: found -1, must be at least 0",
        "  配置.yaml line 1: base_model: 模型/v1-5.ckpt: a .ckpt file is a Python pickle",
        "  metadata.csv line 3: ",
        "  metadata.csv line 4: ",
    ]
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start.encode(encoding, "replace").decode(encoding))


def test_one_mistake(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("a: [1\n", encoding="utf-8")
    code, said = run("--config", "my.yaml", cwd=tmp_path)
    assert code == 2
    assert said == (
        "1 problem:\n"
        "  my.yaml line 1: what begins here lacks its closing quote or bracket in `a: [1`\n"
    ).replace("\n", os.linesep)


def test_unknown_file(tmp_path: Path) -> None:
    (tmp_path / "my_style.yaml").touch()
    code, said = run("--config", "my_stile.yaml", cwd=tmp_path)
    assert code == 2
    assert "my_stile.yaml: no such file; did you mean my_style.yaml?" in said


@pytest.mark.parametrize("encoding", ["utf-8", "gbk", "cp1252", "ascii"])
def test_no_arguments(tmp_path: Path, encoding: str) -> None:
    code, said = run(cwd=tmp_path, encoding=encoding)
    assert code == 2
    assert "--config" in said


@pytest.mark.parametrize("encoding", ["utf-8", "gbk", "cp1252", "ascii"])
def test_help(tmp_path: Path, encoding: str) -> None:
    code, said = run("--help", cwd=tmp_path, encoding=encoding)
    assert code == 0
    assert "KEY=VALUE" in said


def test_unknown_option(tmp_path: Path) -> None:
    code, said = run("--confg", "x.yaml", cwd=tmp_path)
    assert code == 2
    assert "--confg" in said
