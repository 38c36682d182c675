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
    found = [learning_rate(values, step, total_steps=6) for step in range(6)]
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    values = config(learning_rate=0.3, lr_scheduler="cosine", lr_warmup_steps=100)
    found = [learning_rate(values, step, total_steps=5) for step in range(5)]
    assert found == sorted(found)
    assert found[-1] < 0.02
