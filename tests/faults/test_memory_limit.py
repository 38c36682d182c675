"""Runs that the system kills for want of memory, in a control group with a limit."""

from __future__ import annotations

import os
import sys

import pytest

from tests.faults import memory_limit
from tests.faults.harness import harness

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked"),
    pytest.mark.skipif(sys.platform != "linux", reason="Linux has control groups"),
]


def _can_be_limited() -> bool:
    with memory_limit.group() as group:
        return group is not None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_the_system_killed_goes_on_and_ends_as_an_undisturbed_one() -> None:
    if not _can_be_limited():
        pytest.skip("no control group with a limit of memory can be made here (needs root)")
    said = harness("memory", "--rounds", "8", "--cases", "image", "text")
    assert "memory: 8 runs, 8 faults" in said
    assert "\n0 runs did not end bit-identical." in said
