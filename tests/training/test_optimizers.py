"""Optimizers, parameter groups and the moving average, in whole runs at toy size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lora_scripts.errors import EXIT_INTERRUPTED
from lora_scripts.tasks.diffusion import DiffusionTask
from lora_scripts.training import optim
from lora_scripts.training.averaging import Average
from tests import runs
from tests.training.test_optim import config

RATES = {"prodigy": 1.0, "lion": 1e-3}
NAMES = list(optim.OPTIMIZERS)


def values(name: str, **changes: Any) -> dict[str, Any]:
    found = {"optimizer": name, "learning_rate": RATES.get(name, 1e-2), "epochs": 3}
    return {**found, "save_steps": None, "eval_steps": 100, **changes}


@pytest.mark.parametrize("name", NAMES)
def test_each_lowers_the_loss_of_a_small_problem(name: str) -> None:
    """A matrix of 64 × 64, so that 8-bit states are in 8 bits."""
    torch.manual_seed(0)
    target = torch.randn(64, 64)
    parameter = nn.Parameter(torch.zeros(64, 64))
    rate = RATES.get(name, 1e-2)
    settings = config(optimizer=name, learning_rate=rate, weight_decay=0)
    optimizer = optim.make({"a": {"w": parameter}}, {"a": rate}, settings)
    start = (parameter - target).square().mean().item()
    for _ in range(200):
        optimizer.zero_grad()
        (parameter - target).square().mean().backward()
        optimizer.step()
    assert (parameter - target).square().mean().item() < 0.8 * start
    if name == "adamw8bit":
        assert optimizer.state[parameter]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_run_ends_with_the_same_bits(
    sd_folder: Path, pictures: Path, tmp_path: Path, name: str
) -> None:
    changes = values(name, lora_rank=64, ema_decay=0.9, lora_dropout=0.1)
    code, whole = runs.run(sd_folder, pictures, tmp_path / "whole", **changes)
    assert code == 0
    with runs.terminated(DiffusionTask, loss=4):
        code, stopped = runs.run(sd_folder, pictures, tmp_path / "stopped", **changes)
    assert code == EXIT_INTERRUPTED
    code, stopped = runs.run(sd_folder, pictures, tmp_path / "stopped", **changes)
    assert code == 0
    name_of_last = sorted(path.name for path in (whole / "checkpoints").iterdir())[-1]
    for file in ("training.safetensors", "toy-000009.safetensors"):
        one = load_file(whole / "checkpoints" / name_of_last / file)
        other = load_file(stopped / "checkpoints" / name_of_last / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), file
    assert runs.metrics(whole) == runs.metrics(stopped)


def test_prodigy_notes_the_rate_that_it_found(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    _, output = runs.run(sd_folder, pictures, tmp_path, **values("prodigy", epochs=20))
    found = [row["learning_rate_found"] for row in runs.metrics(output) if "loss" in row]
    assert found[-1] > 3 * found[0] > 0
    board = EventAccumulator(str(output / "tensorboard"))
    board.Reload()
    shown = [event.value for event in board.Scalars("train/learning_rate_found")]
    assert shown == pytest.approx(found)


def test_text_encoders_have_a_rate_of_their_own(
    sd_folder: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="lora_scripts"):
        _, output = runs.run(
            sd_folder, pictures, tmp_path,
            train_text_encoder=True, learning_rate=1e-2, text_encoder_learning_rate=1e-3,
            lr_scheduler="linear", lora_type="rslora", save_dtype="fp32",
        )  # fmt: skip
    assert "rsLoRA on unet: " in caplog.text
    assert "(rank 4, alpha 4, learning rate 0.001)" in caplog.text
    rows = [row for row in runs.metrics(output) if "loss" in row]
    for row in rows:
        assert row["learning_rate/text_encoder"] == pytest.approx(row["learning_rate"] / 10)
    tensors = load_file(output / "toy.safetensors")
    ups = {name: t for name, t in tensors.items() if name.endswith("lora_up.weight")}
    # Adam's first steps are as long as the rate
    text = max(t.abs().max() for name, t in ups.items() if name.startswith("lora_te_"))
    unet = max(t.abs().max() for name, t in ups.items() if name.startswith("lora_unet_"))
    assert 0 < text < 0.2 * unet


# --- the moving average -----------------------------------------------------------------------


def test_the_average_by_hand() -> None:
    parameter = nn.Parameter(torch.tensor([0.0]))
    average = Average({"p": parameter}, decay=0.5)
    expected = 0.0
    for step in range(1, 20):
        parameter.data = torch.tensor([float(step)])
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with average.shown():
        assert parameter.item() == pytest.approx(expected)
    assert parameter.item() == 19
    average.take()
    assert parameter.item() == pytest.approx(expected)


def test_the_average_is_what_is_exported_and_measured(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    changes = values("adamw", save_dtype="fp32", seed=3)
    _, plain = runs.run(sd_folder, pictures, tmp_path / "plain", **changes)
    _, averaged = runs.run(sd_folder, pictures, tmp_path / "ema", **changes, ema_decay=0.95)
    last = sorted((averaged / "checkpoints").iterdir())[-1]
    kept = load_file(last / "training.safetensors")
    raw = load_file(sorted((plain / "checkpoints").iterdir())[-1] / "training.safetensors")
    name = next(key for key in raw if key.endswith("lora_B.default.weight"))
    assert torch.equal(raw[name], kept[name])  # the steps are the same
    shown = kept[name.replace("adapter.", "average.", 1)]
    assert not torch.equal(shown, kept[name])
    exported = load_file(averaged / "toy.safetensors").values()
    assert any(t.shape == shown.shape and torch.equal(t, shown) for t in exported)
    losses = [[row["eval_loss"] for row in runs.metrics(out) if "eval_loss" in row][-1]
              for out in (plain, averaged)]  # fmt: skip
    assert losses[0] != losses[1]
    record = json.loads((averaged / "run.json").read_text(encoding="utf-8"))
    assert record["largest_difference_after_reload"] < 1e-5


def test_the_best_of_an_averaged_run_is_its_average(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    """A rate that makes everything worse: the first measurement stays the best."""
    _, output = runs.run(
        sd_folder, pictures, tmp_path,
        **values("adamw", learning_rate=0.5, epochs=20, eval_steps=2, save_dtype="fp32"),
        ema_decay=0.9, validation_split=0.34, early_stopping_patience=1,
    )  # fmt: skip
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    best = output / "checkpoints" / f"step-{record['best']['step']:06d}"
    kept = load_file(best / "training.safetensors")
    name = next(key for key in kept if key.startswith("average.") and "lora_B" in key)
    exported = load_file(output / "toy.safetensors").values()
    assert any(t.shape == kept[name].shape and torch.equal(t, kept[name]) for t in exported)
