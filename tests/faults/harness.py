"""The fault harness as a command, for the tests of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def harness(*arguments: str) -> str:
    """What `python -m tests.faults` says; it must find nothing wrong."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *arguments],
        cwd=Path(__file__).parents[2], capture_output=True, encoding="utf-8", timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout
