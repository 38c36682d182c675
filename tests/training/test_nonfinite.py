"""Numbers that go wrong: the run stops and says where and why, or leaves a few steps out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_scripts import pipeline
from lora_scripts.errors import WorkError
from lora_scripts.tasks.diffusion import DiffusionTask
from lora_scripts.tasks.language import LanguageTask
from lora_scripts.tasks.task import Batch, Key, Loss
from lora_scripts.training import nonfinite, optim
from tests import runs, text_toys


def broken_losses(
    monkeypatch: pytest.MonkeyPatch,
    kind: type[DiffusionTask] | type[LanguageTask],
    is_broken: Callable[[int], bool],
) -> None:
    """Training losses, counted from 1, are no number where `is_broken` says so."""
    original, calls = kind.loss, 0

    def loss(task: DiffusionTask | LanguageTask, batch: Batch, key: Key) -> Loss:
        nonlocal calls
        found: Loss = original(task, batch, key)  # type: ignore[arg-type]
        if key.split != "train" or not runs.is_training():
            return found
        calls += 1
        return replace(found, total=found.total * float("nan")) if is_broken(calls) else found

    monkeypatch.setattr(kind, "loss", loss)


def test_it_stops_names_step_and_samples_and_the_checkpoint_is_good(
    sd_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_losses(monkeypatch, DiffusionTask, lambda call: call == 4)
    with pytest.raises(WorkError) as caught:
        runs.run(sd_folder, pictures, tmp_path, save_steps=2)
    said = str(caught.value)
    assert said.startswith("step 4: loss nan, gradient norm nan, in epoch 2 (samples: ")
    assert said.count(str(pictures / "img0")) == 2
    assert "What was read and the matrices are finite" in said
    assert "the same command goes on from there" in said
    output = tmp_path / "output/toy"
    assert not (output / "toy.safetensors").exists()
    assert runs.metrics(output)[-1]["step"] == 3
    monkeypatch.undo()
    code, _ = runs.run(sd_folder, pictures, tmp_path, save_steps=2)
    assert code == pipeline.EXIT_DONE


def test_a_broken_entry_of_the_cache_is_named(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    runs.run(sd_folder, pictures, tmp_path, max_train_steps=1)
    entries = sorted((tmp_path / "cache").rglob("latents*/*/*.safetensors"))
    for entry in entries:
        tensors = load_file(entry)
        save_file({**tensors, "mean": torch.full_like(tensors["mean"], float("inf"))}, entry)
    with pytest.raises(WorkError, match=r"What was read of .*img0\d\.png.* is not finite"):
        runs.run(sd_folder, pictures, tmp_path, resume="never")


def test_a_rate_that_is_too_high_is_told_from_the_matrices(
    sd_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = optim.set_rates

    def poisoned(optimizer: torch.optim.Optimizer, *rest: object) -> None:
        original(optimizer, *rest)  # type: ignore[arg-type]
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].fill_(float("inf"))

    monkeypatch.setattr(optim, "set_rates", poisoned)
    with pytest.raises(WorkError, match=r"matrices are not finite any more: the learning_rate"):
        runs.run(sd_folder, pictures, tmp_path)


def test_rows_of_text_are_named_by_their_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows = text_toys.save_model(tmp_path / "m"), text_toys.write_jsonl(tmp_path / "r.jsonl")
    broken_losses(monkeypatch, LanguageTask, lambda call: call == 1)
    with pytest.raises(WorkError, match=r"step 1: .*\(samples: r\.jsonl line \d+, r\.jsonl line"):
        runs.run_text(base, rows, tmp_path)


def test_few_are_left_out_counted_and_reported(
    sd_folder: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken_losses(monkeypatch, DiffusionTask, lambda call: call in (2, 4))
    with caplog.at_level("WARNING", logger="lora_scripts"):
        code, output = runs.run(
            sd_folder, pictures, tmp_path, on_nonfinite="skip", histogram_steps=1, save_dtype="fp32"
        )
    assert code == pipeline.EXIT_DONE
    rows = [row for row in runs.metrics(output) if "samples" in row]
    assert [row["loss"] is None for row in rows] == [False, True, False, True, False, False]
    assert [row.get("skipped", 0) for row in rows] == [0, 1, 1, 2, 2, 2]
    assert "number 2 of at most 10" in caplog.text
    assert "loss or gradient was no number: 2" in caplog.text
    assert json.loads((output / "run.json").read_text(encoding="utf-8"))["skipped_steps"] == 2
    weights = load_file(output / "pytorch_lora_weights.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert any(tensor.any() for key, tensor in weights.items() if "lora_up" in key)


def test_a_resumed_run_skips_the_same_steps(
    sd_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"on_nonfinite": "skip", "save_steps": 3, "save_dtype": "fp32", "epochs": 3}
    with monkeypatch.context() as patch:
        broken_losses(patch, DiffusionTask, lambda call: call in (2, 5))
        _, whole = runs.run(sd_folder, pictures, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        broken_losses(patch, DiffusionTask, lambda call: call in (2, 5))
        runs.run(sd_folder, pictures, tmp_path / "parts", max_train_steps=3, **options)
        _, parts = runs.run(sd_folder, pictures, tmp_path / "parts", **options)
    a, b = (load_file(o / "pytorch_lora_weights.safetensors") for o in (whole, parts))
    assert all(torch.equal(a[key], b[key]) for key in a)
    steps = [[r for r in runs.metrics(output) if "samples" in r] for output in (whole, parts)]
    assert steps[0] == steps[1] and steps[1][-1]["skipped"] == 2


def test_more_than_a_few_end_the_run(
    sd_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nonfinite, "MOST_SKIPPED", 2)
    broken_losses(monkeypatch, DiffusionTask, lambda call: call > 1)
    with pytest.raises(WorkError, match="step 4: loss nan"):
        runs.run(sd_folder, pictures, tmp_path, on_nonfinite="skip")
