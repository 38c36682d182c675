"""Runs that find no room on a real file system of their own, and go on when there is some."""

from __future__ import annotations

import os

import pytest

from tests.faults import full_disk, mounts
from tests.faults.harness import harness

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked"),
    pytest.mark.skipif(mounts.way_in() is None, reason="nothing may be mounted here (unshare)"),
]


def test_a_run_without_room_stops_clearly_and_goes_on_with_room() -> None:
    said = harness("full", "--rounds", "4", "--cases", "text", "--seed", "3")
    assert f"| {' | '.join(sorted(full_disk.WAYS))} |" in said
    assert "full: 4 runs, 4 faults" in said
    assert "\n0 runs did not end bit-identical." in said


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_it_does_so_in_every_phase() -> None:
    said = harness("full", "--rounds", "96")
    for where in ("caching", "checkpoint", "logging", "export"):
        assert f"\n| {where} | " in said
    for what in ("cache", "checkpoints"):
        assert f"\nnot written: {what}: " in said
    assert "\n0 runs did not end bit-identical." in said
