"""Learning-rate schedules, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from lora_scripts.schema import ImageConfig
from lora_scripts.training.optim import learning_rate


def config(**values: Any) -> ImageConfig:
    return ImageConfig(base_model="b", train_data_dir="d", output_dir="o", **values)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [0.1, 0.2, 0.3, 0.3, 0.3, 0.3]),
        ("linear", [0.1, 0.2, 0.3, 0.225, 0.15, 0.075]),
        ("cosine", [0.1, 0.2, 0.3, 0.256066, 0.15, 0.043934]),
    ],
)
def test_schedules(scheduler: str, expected: list[float]) -> None:
    values = config(learning_rate=0.3, lr_scheduler=scheduler, lr_warmup_steps=2)
    found = [learning_rate(0.3, values, step, total_steps=6) for step in range(6)]
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    values = config(learning_rate=0.3, lr_scheduler="cosine", lr_warmup_steps=100)
    found = [learning_rate(0.3, values, step, total_steps=5) for step in range(5)]
    assert found == sorted(found)
    assert found[-1] < 0.02


@pytest.mark.parametrize("cycles", [1, 2, 5])
def test_restarts(cycles: int) -> None:
    values = config(learning_rate=1.0, lr_scheduler="cosine_with_restarts", lr_num_cycles=cycles)
    found = [learning_rate(1.0, values, step, total_steps=100) for step in range(100)]
    peaks = [step for step, rate in enumerate(found) if rate == pytest.approx(1.0)]
    assert peaks == [100 // cycles * cycle for cycle in range(cycles)]
    assert min(found) > 0
    if cycles == 1:
        cosine = config(lr_scheduler="cosine")
        plain = [learning_rate(1.0, cosine, step, total_steps=100) for step in range(100)]
        assert found == pytest.approx(plain)
