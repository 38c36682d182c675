"""A few rounds of the fault harness; many are a command of their own (see the package)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")


def harness(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *arguments],
        cwd=Path(__file__).parents[2], capture_output=True, encoding="utf-8", timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_killed_runs_end_as_undisturbed_ones() -> None:
    said = harness("soak", "--rounds", "4", "--cases", "image", "text", "--seed", "5")
    assert "4 runs, " in said
    assert "\n0 runs did not end bit-identical." in said


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_tenth_file_operation_goes_wrong() -> None:
    said = harness("operations", "--every", "10", "--cases", "image", "text")
    assert "| fail write |" in said and "| tear " in said and "| kill rename |" in said
    assert "\n0 runs did not end bit-identical." in said
