"""`deterministic: true`: PyTorch is told so, a run goes through with it, and it ends there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_scripts import pipeline
from lora_scripts.tasks.diffusion import DiffusionTask
from lora_scripts.tasks.language import LanguageTask
from lora_scripts.tasks.task import Batch, Key, Loss
from tests import runs, text_toys


def modes(
    monkeypatch: pytest.MonkeyPatch, kind: type[DiffusionTask] | type[LanguageTask]
) -> list[bool]:
    """Whether PyTorch keeps to deterministic algorithms, at every loss."""
    seen: list[bool] = []
    original = kind.loss

    def loss(task: DiffusionTask | LanguageTask, batch: Batch, key: Key) -> Loss:
        seen.append(torch.are_deterministic_algorithms_enabled())
        found: Loss = original(task, batch, key)  # type: ignore[arg-type]
        return found

    monkeypatch.setattr(kind, "loss", loss)
    return seen


@pytest.mark.parametrize("on", [True, False])
def test_pictures(
    on: bool, sd_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = modes(monkeypatch, DiffusionTask)
    code, _ = runs.run(
        sd_folder, pictures, tmp_path, deterministic=on, train_text_encoder=True, lora_targets="all"
    )
    assert code == pipeline.EXIT_DONE
    assert set(seen) == {on}
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("packing", [True, False])
def test_texts(packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = modes(monkeypatch, LanguageTask)
    base, rows = text_toys.save_model(tmp_path / "m"), text_toys.write_jsonl(tmp_path / "r.jsonl")
    code, _ = runs.run_text(base, rows, tmp_path, deterministic=True, packing=packing)
    assert code == pipeline.EXIT_DONE
    assert set(seen) == {True}
