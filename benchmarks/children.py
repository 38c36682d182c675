"""Measurements in processes of their own, which hold nothing of each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def last_line(code: str, *arguments: str) -> str:
    """Run Python code in a process of its own; the last line of what it prints.

    Raises:
        SystemExit: with all that it has said, if it fails.
    """
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout.splitlines()[-1] if done.stdout else ""


def child_of(benchmark: str, *arguments: str) -> str:
    """Run a benchmark's function `child` in a process of its own; the last line of what it says.

    Raises:
        SystemExit: as `last_line`.
    """
    code = f"import sys\nfrom benchmarks import {benchmark}\n{benchmark}.child(*sys.argv[1:])"
    return last_line(code, *arguments)
