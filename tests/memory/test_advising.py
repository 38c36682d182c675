"""Whether a run fits, and what makes it fit, in the config's own keys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_scripts.device import Compute
from lora_scripts.memory import Estimate, Phase, Room, advice, foretell, largest_batch
from lora_scripts.memory.advising import ladders, refuse_or_warn
from lora_scripts.processes import Processes
from tests import runs, text_toys, toys
from tests.memory.test_foretelling import prepared

CPU = Compute(torch.device("cpu"), "no")
MB = 10**6
PLENTY = Room(10**12, 10**12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("advice")
    toys.save_stable_diffusion(folder / "base")
    toys.save_pictures(folder / "data", count=16)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    text_toys.save_model(folder / "base")
    text_toys.write_jsonl(folder / "data" / "data.jsonl")
    return folder


def text_run_of(folder: Path, **changes: Any) -> tuple[Any, list[Any]]:
    values = runs.text_values(folder / "base", folder / "data", folder, **changes)
    return prepared(folder, values)


def run_of(folder: Path, **changes: Any) -> tuple[Any, list[Any]]:
    return prepared(folder, runs.values(folder / "base", folder / "data", folder, **changes))


def test_what_cannot_fit_is_an_error_and_what_does_not_now_a_warning() -> None:
    estimate = Estimate([Phase("training step", {}, {"weights": 800 * MB})], "1 row", {})
    assert refuse_or_warn(estimate, Room(1000 * MB, 900 * MB)) == []
    (warning,) = refuse_or_warn(estimate, Room(1000 * MB, 700 * MB))
    assert warning.severity == "warning" and "700 MB are free" in warning.what
    (error,) = refuse_or_warn(estimate, Room(600 * MB, 600 * MB, ram_limit="the container's limit"))
    assert error.severity == "error"
    assert "about 800 MB of RAM" in error.what and "the container's limit has 600 MB" in error.what


def test_a_card_is_judged_by_itself() -> None:
    step = Phase("training step", {"weights": 9000 * MB}, {"imports": 500 * MB})
    (error,) = refuse_or_warn(
        Estimate([step], "1 row", {}), Room(1000 * MB, 900 * MB, 8000 * MB, 7000 * MB)
    )
    assert "9.00 GB of GPU memory" in error.what and "the card has 8.00 GB" in error.what


def test_the_first_advice_is_a_smaller_batch_that_fits(texts: Path) -> None:
    config, rows = text_run_of(texts, batch_size=4)
    enough = foretell(config.model_copy(update={"batch_size": 1}), rows, CPU).peak_ram
    room = Room(10**12, enough + 20 * MB)
    first, *_ = advice(config, rows, CPU, room)
    assert first.keys["batch_size"] * first.keys["gradient_accumulation_steps"] == 4
    assert first.estimate.peak_ram <= room.ram_free
    assert first.text.startswith(f"batch_size: {first.keys['batch_size']}, ")


def test_nothing_is_advised_where_nothing_helps(texts: Path) -> None:
    config, rows = text_run_of(texts)
    assert advice(config, rows, CPU, Room(MB, MB)) == []


def test_ladders_go_from_what_costs_nothing_to_what_changes_what_is_learned(
    folder: Path, texts: Path
) -> None:
    config, _ = run_of(folder, batch_size=4, gradient_accumulation_steps=2, resolution=512)
    batches, thrifty, coarse, shorter = ladders(config, CPU)
    assert batches == [
        {"batch_size": 2, "gradient_accumulation_steps": 4},
        {"batch_size": 1, "gradient_accumulation_steps": 8},
    ]
    assert thrifty[0] == {"gradient_checkpointing": True}
    assert thrifty[-1] == {"gradient_checkpointing": True, **batches[-1]}
    assert coarse[0] == {"mixed_precision": "bf16"}
    assert [keys["resolution"] for keys in shorter] == [384, 256]
    text, _ = text_run_of(texts, batch_size=1)
    card = Compute(torch.device("cuda"), "bf16")
    thrifty, offloaded, coarse, shorter = ladders(text, card)
    assert offloaded == [{"offload": True}, {"offload": True, "gradient_checkpointing": True}]
    assert coarse[0] == {"quantization": "nf4"}
    assert shorter == [{"quantization": "nf4", "gradient_checkpointing": True,
                        "max_seq_length": 128}]  # fmt: skip


def test_several_processes_are_told_to_spread_the_base(texts: Path) -> None:
    text, _ = text_run_of(texts, batch_size=1)
    several = Compute(torch.device("cuda"), "bf16", Processes(0, 2))
    _, spread, coarse, _ = ladders(text, several)
    assert spread[0] == {"distributed": "fsdp"}
    assert coarse[0] == {"quantization": "nf4"}
    already = replace(several, sharded=True)
    changes = [keys for ladder in ladders(text, already) for keys in ladder]
    assert changes and all({"distributed", "quantization"}.isdisjoint(keys) for keys in changes)
    assert {"offload": True} in changes
    waiting = replace(already, offloaded=True)
    assert all("offload" not in keys for ladder in ladders(text, waiting) for keys in ladder)


def test_the_largest_batch_keeps_the_samples_of_a_step(texts: Path) -> None:
    config, rows = text_run_of(texts, batch_size="auto", gradient_accumulation_steps=6)
    assert largest_batch(config, rows, CPU, 6, PLENTY) == 6
    assert largest_batch(config, rows, CPU, 6, Room(MB, MB)) == 1
