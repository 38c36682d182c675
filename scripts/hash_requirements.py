"""Write requirements/*.txt anew: every pinned package with the SHA-256 of each of its files.

    python scripts/hash_requirements.py

The versions are those of constraints.txt. pip-tools finds the hashes of all files on PyPI, for
every system and Python, in a virtual environment of its own that is thrown away. torch is left out,
and what only torch needs: its wheel is another on each system, and often from another index.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIP_TOOLS = "pip-tools==7.6.2"
UNHASHED = "torch"
# file -> the extras of pyproject.toml whose packages are in it
FILES = {"run.txt": (), "dev.txt": ("dev", "demo-model")}
HEAD = """\
# Made by scripts/hash_requirements.py from constraints.txt; how to install them: docs/safety.md
"""
OPTIONS = ("--generate-hashes", "--allow-unsafe", "--strip-extras", "--no-header", "--no-annotate",
           "--no-emit-index-url", "--no-emit-find-links", "--no-emit-trusted-host",
           "--no-emit-options", "--quiet")  # fmt: skip


def main() -> int:
    """Write both files and return 0."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        venv.create(work / "venv", with_pip=True)
        python = str(work / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
        subprocess.run([python, "-m", "pip", "install", "--quiet", PIP_TOOLS], check=True)
        for file, extras in FILES.items():
            target = ROOT / "requirements" / file
            target.parent.mkdir(exist_ok=True)
            blocks = hashed(python, work, extras)
            text = HEAD + "".join(f"{block}\n" for block in blocks)
            target.write_text(text, encoding="utf-8", newline="\n")
            print(f"{target}: {len(blocks)} packages")
    return 0


def hashed(python: str, work: Path, extras: tuple[str, ...]) -> list[str]:
    """Each package with its hashes, as pip reads it; those only that constraints.txt pins."""
    wanted = work / "wanted.in"
    # setuptools builds the package itself; colorama is needed on Windows only
    wanted.write_text("setuptools\ncolorama\n", encoding="utf-8")
    more = [option for extra in extras for option in ("--extra", extra)]
    command = [python, "-m", "piptools", "compile", *OPTIONS, *more]
    command += ["--constraint", str(ROOT / "constraints.txt")]
    command += ["--output-file", str(work / "out.txt"), str(ROOT / "pyproject.toml"), str(wanted)]
    subprocess.run(command, check=True, cwd=ROOT)
    found = (work / "out.txt").read_text(encoding="utf-8")
    blocks = re.findall(r"^\S.*?(?:\n    .*)+", found, re.MULTILINE)
    kept = [block.rstrip() for block in blocks if canonical(block) in pinned() - {UNHASHED}]
    (work / "out.txt").unlink()
    return kept


def pinned() -> set[str]:
    """The packages that constraints.txt pins."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonical(line) for line in lines if line and not line.startswith("#")}


def canonical(line: str) -> str:
    """The name of a requirement as PyPI compares names (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.split(r"[=\[ ;]", line, maxsplit=1)[0]).lower()


if __name__ == "__main__":
    sys.exit(main())
