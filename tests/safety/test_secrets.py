"""Tokens reach no log, file or screen; what is shown to others runs nothing."""

from __future__ import annotations

import argparse
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_scripts import logs, markdown
from lora_scripts.errors import Problem, WorkError, shown
from lora_scripts.label import review
from lora_scripts.models import hub
from tests import runs, toys
from tests.safety.attempts import ROOT, SOURCES, picture, refused

TOKEN = "hf_MarkerMarkerMarkerMarker123456"


@pytest.mark.parametrize(
    "text",
    [f"Authorization: {TOKEN}", "https://somebody:MarkerMarker@hub.example/a", "at\x1b[2J\u202e"],
)
def test_no_secret_and_no_escape_is_said(text: str) -> None:
    for said in (shown(text), str(Problem(text, text)), str(WorkError(text))):
        assert "Marker" not in said and "\x1b" not in said and "\u202e" not in said


def test_a_token_reaches_no_file_of_a_run(
    sd_folder: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real run with a token and a mirror with a password in the environment, in its own process;
    all libraries say everything they have to say.
    """
    values = runs.values(sd_folder, pictures, tmp_path, epochs=1, sample_prompts=["a square"])
    path = toys.write_config(tmp_path / "run.yaml", **values)
    environment = {
        **os.environ,
        "HF_TOKEN": "MarkerMarkerMarker",
        "HF_ENDPOINT": "https://somebody:MarkerMarker@hub.example",
        "HF_HUB_VERBOSITY": "debug",
        "TRANSFORMERS_VERBOSITY": "debug",
        "DIFFUSERS_VERBOSITY": "debug",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUTF8": "1",
    }
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    output = tmp_path / "output" / "toy"
    files = [file for file in output.rglob("*") if file.is_file()]
    assert {"run.log", "config.yaml", "run.json", "README.md"} <= {file.name for file in files}
    for file in files:
        assert b"Marker" not in file.read_bytes(), file
    assert "Marker" not in done.stdout + done.stderr


def test_an_address_with_a_password_is_not_repeated(tmp_path: Path) -> None:
    values = {"base_model": f"https://somebody:{TOKEN}@hub.example/a/b", "output_dir": "o"}
    said = refused(lambda: hub.local_path(str(values["base_model"])))
    assert "Marker" not in said and "https://***@hub.example/a/b" in said


def test_logs_leave_secrets_out(tmp_path: Path) -> None:
    with logs.file_log(tmp_path / "run.log"):
        logging.getLogger(logs.PACKAGE).warning("fetched from https://a:%s@b", TOKEN)
    assert "Marker" not in (tmp_path / "run.log").read_text(encoding="utf-8")


def test_the_review_page_runs_nothing(tmp_path: Path) -> None:
    folder = picture(tmp_path / "data", "<img src=x onerror=1>.png" if os.name != "nt" else "a.png")
    name = next(folder.iterdir()).name
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    entries = [review.Entry(name, evil, True), review.Entry("b.png", f"{evil}, {evil}", False)]
    review.write(tmp_path / "review.html", folder, entries, 1)
    page = (tmp_path / "review.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert" not in page and "<img src=x" not in page


def test_nothing_listens_to_the_network() -> None:
    """TensorBoard's own default is this machine alone; no document tells people otherwise."""
    from tensorboard.plugins.core import core_plugin

    parser = argparse.ArgumentParser()
    core_plugin.CorePluginLoader().define_flags(parser)
    flags = parser.parse_args(["--logdir", "x"])
    assert flags.host is None and not flags.bind_all
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *SOURCES]:
        text = path.read_text(encoding="utf-8")
        for line in text.splitlines():
            command, _, _ = line.partition(" #")  # what follows may warn of it
            if "tensorboard --" in command:
                assert "--bind_all" not in command and "--host" not in command, path
    listening = re.compile(r"\bHTTPServer|socketserver|\.listen\(|uvicorn|flask|gradio")
    assert not [path for path in SOURCES if listening.search(path.read_text(encoding="utf-8"))]


EVIL = "<img src=x onerror=alert(1)> ![a](http://x/y) [b](javascript:c) `d` | # e\n# f"


def test_somebodys_text_in_a_card_is_words_only() -> None:
    """By a real reader of Markdown that lets HTML through."""
    from markdown_it import MarkdownIt

    read = MarkdownIt("commonmark", {"html": True}).enable("table")
    for card in (
        f"# {markdown.words(EVIL)}\n\n| a | {markdown.words(EVIL)} |\n|---|---|\n",
        f"A LoRA for {markdown.code(EVIL)}, made.\n",
        f"{markdown.block(EVIL + chr(10) + '```' + chr(10) + EVIL)}\n",
    ):
        page = read.render(card)
        assert not re.search(r"<(img|script|a )|javascript:[^<]*\"", page), page
        assert "onerror=alert(1)&gt;" in page and page.count("<h1>") <= 1
