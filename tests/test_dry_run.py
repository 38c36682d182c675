"""`--dry-run`: real steps and a real export, elsewhere; and how long the whole will take."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_scripts import dry_run
from lora_scripts.config import load
from lora_scripts.training.clock import Clock
from tests import console, runs, toys


def test_it_trains_and_exports_and_leaves_nothing(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    prompts = [{"prompt": "red", "steps": 2}]
    values = runs.values(sd_folder, pictures, tmp_path, epochs=40, sample_prompts=prompts)
    config = toys.write_config(tmp_path / "run.yaml", **values)
    code, said = console.command("train", "--config", str(config), "--dry-run")
    assert code == 0
    assert "Read back by diffusers" in said
    assert "The whole run will take about" in said
    assert "120 × step" in said and "3 × evaluation" in said and "2 × samples" in said
    assert not (tmp_path / "output").exists()
    assert any((tmp_path / "cache").rglob("*.safetensors"))  # the work that a run would do again


def test_it_says_where_the_run_stands_and_leaves_it_alone(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    _, output = runs.run(sd_folder, pictures, tmp_path)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    config = str(tmp_path / "run.yaml")
    code, said = console.command("train", "--config", config, "--dry-run")
    assert code == 0 and "is finished: train would do nothing" in said
    code, said = console.command("train", "--config", config, "epochs=3", "--dry-run")
    assert code == 0 and "would go on from" in said and "step-000006" in said
    code, said = console.command("train", "--config", config, "lora_rank=2", "--dry-run")
    assert code == 2 and "found 2, but step-000006 was trained with 4" in said
    code, said = console.command("train", "--config", config, "resume=never", "--dry-run")
    assert code == 0
    after = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert after == before


def test_the_outlook_counts_what_will_be_done(tmp_path: Path) -> None:
    rhythm = {"eval_steps": 10, "sample_steps": 25, "save_steps": 30, "save_every_epochs": 2}
    values = runs.values(tmp_path, tmp_path, tmp_path, epochs=4, sample_prompts=["x"], **rhythm)
    config = load(toys.write_config(tmp_path / "run.yaml", **values))
    clock = Clock()
    clock.seconds["step"] += [9.0, 1.0, 2.0]  # the first is not like the others
    clock.seconds["export"] += [4.0]
    found = dry_run.outlook(config, 100, clock)
    assert found["step"] == (100, 1.5)
    assert found["evaluation"][0] == 11  # 0, 10, …, 100
    assert found["samples"][0] == 5  # 0, 25, …, 100
    assert found["checkpoint"][0] == 4 + 2  # 30, 60, 90, 100, and two after epochs
    assert found["export"] == (1, 4.0)


@pytest.mark.parametrize(("seconds", "steps"), [(0.1, 4), (2.0, 1)])
def test_long_steps_are_taken_once(seconds: float, steps: int, tmp_path: Path) -> None:
    values = runs.values(tmp_path, tmp_path, tmp_path, gradient_accumulation_steps=4)
    config = load(toys.write_config(tmp_path / "run.yaml", **values))
    assert dry_run.shortened(config, seconds).max_train_steps == steps
