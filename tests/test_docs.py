"""What the documents tell people to type: it exists, it runs, and both languages say the same."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from lora_scripts import config
from lora_scripts.cli import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "README.zh-CN.md", "docs/recipes.md", "docs/images.md",
             "docs/data_checks.md", "docs/benchmarks.md", "assets/demo/README.md")  # fmt: skip
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(name: str) -> list[tuple[str, str]]:
    """Language and text of each block of code, without its indentation."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [
        (language, "\n".join(line.strip() for line in body.splitlines()))
        for language, body in BLOCK.findall(text)
    ]


def commands(name: str) -> list[list[str]]:
    """The words of each command in a document's blocks; what follows a # is a remark."""
    found = []
    for language, body in blocks(name):
        if language == "":
            for line in body.replace("\\\n", " ").splitlines():
                if line.startswith(("lora-scripts ", "python ", "make ", "cp ", "mkdir ")):
                    found.append(shlex.split(line, comments=True))
    return found


def test_recipes_are_whole_configs(tmp_path: Path) -> None:
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    found = [body for language, body in BLOCK.findall(text) if language == "yaml"]
    assert len(found) == 5
    for number, body in enumerate(found):
        path = tmp_path / f"recipe{number}.yaml"
        path.write_text(body, encoding="utf-8")
        assert config.load(path).sample_prompts, body


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_and_their_options_exist(name: str) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in commands(name):
        if words[0] == "lora-scripts":
            verb, rest = words[1], words[2:]
        elif words[:2] == ["python", "tools/auto_label.py"]:
            verb, rest = "label", words[2:]
        elif words[:2] == ["python", "tools/check_data.py"]:
            verb, rest = "check", words[2:]
        else:
            assert words[0] != "python" or words[1] == "-m" or (ROOT / words[1]).is_file(), words
            continue
        assert verb in known, words
        options = {name for parameter in known[verb].params for name in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= options, words


def test_both_readmes_say_the_same() -> None:
    english, chinese = (commands(name) for name in DOCUMENTS[:2])
    assert english == chinese and len(english) > 30
    yaml = [[b for language, b in blocks(n) if language == "yaml"] for n in DOCUMENTS[:2]]
    assert yaml[0] == yaml[1]
    shapes = []
    for name in DOCUMENTS[:2]:
        text = BLOCK.sub("", (ROOT / name).read_text(encoding="utf-8"))
        headings = re.findall(r"^#+ ", text, re.MULTILINE)
        rows = sum(line.startswith("|") for line in text.splitlines())
        shapes.append((headings, rows, re.findall(r"\]\((docs/[^)]*|assets/[^)]*)\)", text)))
    assert shapes[0][:2] == shapes[1][:2]
    assert sorted(shapes[0][2]) == sorted(shapes[1][2])


@pytest.mark.skipif(os.name == "nt", reason="mkdir -p and cp")
def test_the_offline_workflow_of_the_readme(tmp_path: Path) -> None:
    """From bare pictures to a LoRA, word for word; only the training is cut to two steps."""
    block = next(b for _, b in blocks("README.md") if "lora-scripts new stencils" in b)
    for name in ("assets", "tools", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    said = ""
    for line in block.splitlines():
        words = shlex.split(line)
        if words[0] == "lora-scripts":
            line = f"{shlex.quote(sys.executable)} -m lora_scripts {line.partition(' ')[2]}"
        elif words[0] == "python":
            line = f"{shlex.quote(sys.executable)} {line.partition(' ')[2]}"
        if "train.py" in line:
            line += " max_train_steps=2 mixed_precision=no"
        elif " sample " in line:
            line += " --steps 2"
        done = subprocess.run(
            ["sh", "-c", line], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=250,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        said += done.stdout
    assert "80 of 80 images have a caption: data/stencils/metadata.csv" in said
    assert "Trained at: 64×64: 80" in said
    assert "ended by max_train_steps" in said
    assert (tmp_path / "output/stencils/stencils.safetensors").is_file()
    assert (tmp_path / "sample.png").is_file()
    assert (tmp_path / "sheet.png").is_file()
    assert "data:image/" in (tmp_path / "review.html").read_text(encoding="utf-8")
