"""Two hosts, and the cable between them is pulled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.two_hosts import network


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_over_two_hosts_that_was_cut_off_ends_as_one_that_was_not() -> None:
    wanting = network.missing()
    if wanting:
        pytest.skip(wanting)
    done = subprocess.run(
        [sys.executable, "-m", "tests.two_hosts"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
