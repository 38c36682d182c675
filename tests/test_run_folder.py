"""Which steps a run may go on with: processes × accumulation stays what it was."""

from __future__ import annotations

from typing import Any

import pytest

from lora_scripts import run_folder

FEW_AND_MANY: list[tuple[Any, int, tuple[int, int], tuple[int, int | None], str]] = [
    # batch_size now, batch_size then; accumulation and processes then, and now; what is said
    (1, 1, (4, 2), (4, 2), ""),
    (1, 1, (4, 2), (8, 1), ""),
    (1, 1, (1, 8), (2, 4), ""),
    (1, 1, (4, 1), (2, None), ""),
    (1, 1, (8, 1), (4, 1), "8"),
    (1, 1, (4, 2), (4, 1), "2 processes × 4: with 1 process set gradient_accumulation_steps: 8"),
    (1, 1, (4, 1), (4, 2), "1 process × 4: with 2 processes set gradient_accumulation_steps: 2"),
    (1, 1, (2, 2), (1, 3), "2 processes × 2, which 3 processes cannot share alike; as many can: "
                           "1, 2"),
    (1, 1, (2, 2), (3, None), "2 processes × 2: set 4 with 1 process, 2 with 2 processes, 1 with "
                              "4 processes"),
    # with `auto` the key counts samples, and the batch is the checkpoint's
    ("auto", 4, (2, 2), (8, 2), ""),
    ("auto", 4, (2, 2), (16, 1), ""),
    ("auto", 4, (2, 2), (4, 4), ""),
    ("auto", 4, (2, 2), (8, 1), "2 processes × 8: with 1 process set gradient_accumulation_steps: "
                                "16"),
    ("auto", 4, (1, 2), (2, 4), "2 processes × 4, which 4 processes cannot share alike; as many "
                                "can: 1, 2"),
]  # fmt: skip


@pytest.mark.parametrize(("size", "size_then", "then", "now", "said"), FEW_AND_MANY)
def test_a_step_keeps_its_samples(
    size: Any, size_then: int, then: tuple[int, int], now: tuple[int, int | None], said: str
) -> None:
    key = run_folder.ACCUMULATION
    found = run_folder._other_step(
        {"batch_size": size, key: now[0]}, {"batch_size": size_then, key: then[0]}, then[1], now[1]
    )
    assert found == said
