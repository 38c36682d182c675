"""Runs that a card of 12 GiB or less must hold, foretold from the models' published shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import budgets

RUNS = [
    pytest.param(name, marks=[pytest.mark.slow] * name.endswith("offload"))
    for name in budgets.BUDGETS
]


@pytest.mark.parametrize("name", RUNS)
def test_it_fits(tmp_path: Path, name: str) -> None:
    estimate = budgets.foretold(tmp_path, name)
    phases = {phase.name: sum(phase.gpu.values()) for phase in estimate.phases}
    assert {"loading", "training step", "samples", "export"} <= phases.keys()
    assert ("encoding of the pictures" in phases) == ("8B" not in name)
    # the frozen model alone
    whole = {"SD1.5": 1.6e9, "SDXL": 5.1e9, "Llama 8B, NF4": 4.5e9, "Llama 8B, bf16": 16e9}
    least = next(size for model, size in whole.items() if name.startswith(model))
    assert (phases["training step"] < least) == name.endswith("offload")
    assert max(phases.values()) < budgets.BUDGETS[name].limit
