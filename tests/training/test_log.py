"""What a run says of its pace, where there is no terminal for a bar."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_scripts.training import log


def test_what_comes_before_the_first_step_is_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The base was measured for 100 seconds; then every step takes twenty."""
    clock = SimpleNamespace(monotonic=lambda: clock.now, time=time.time, now=0.0)
    monkeypatch.setattr(log, "time", clock)
    caplog.set_level(logging.INFO, "lora_scripts")
    with log.RunLog(tmp_path, 0, 11, held_out=False) as run:
        clock.now = 100.0
        for step in (1, 2, 3):
            clock.now += 20.0
            numbers = {"loss": 0.5, "learning_rate": 1e-4}
            run.step(step, numbers, {"tokens": 100 * step}, {})
    assert [record.getMessage() for record in caplog.records] == [
        "step 1/11  loss 0.5000  lr 1.0e-04",
        "step 2/11  loss 0.5000  lr 1.0e-04  0.05 it/s  5 tokens/s  180 s left",
        "step 3/11  loss 0.5000  lr 1.0e-04  0.05 it/s  5 tokens/s  160 s left",
    ]
