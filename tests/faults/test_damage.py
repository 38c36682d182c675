"""A checkpoint that is not the newest is damaged: the best one, which is what will be exported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lora_scripts import pipeline
from lora_scripts.errors import UserError
from lora_scripts.training import checkpoint
from tests.faults import cases, compare


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> tuple[cases.Case, Path]:
    """A run that stopped early, and took an earlier step."""
    work = tmp_path_factory.mktemp("early")
    (case,) = cases.make(work / "toys", ["text, stopped early"])
    assert pipeline.run(case.config(work / "whole")) == pipeline.EXIT_DONE
    assert case.variant.shows(case.output(work / "whole"))
    return case, work / "whole"


def with_damaged_best(case: cases.Case, whole: Path, other: Path) -> Path:
    """A copy of the run as it was before its export, its best checkpoint damaged."""
    shutil.copytree(whole, other)
    output = case.output(other)
    best = checkpoint.read_state(checkpoint.listed(output / "checkpoints")[-1]).best
    assert best is not None
    path = output / "checkpoints" / checkpoint.name_of(best.step) / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    (output / "run.json").unlink()
    return path


def test_a_damaged_best_checkpoint_is_made_again(
    early: tuple[cases.Case, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case, whole = early
    path = with_damaged_best(case, whole, tmp_path / "other")
    assert pipeline.run(case.config(tmp_path / "other")) == pipeline.EXIT_DONE
    newest = checkpoint.listed(path.parents[1])[-1].name
    warning = f"Checkpoint {newest} is not usable, trying the one before: {path}: is damaged"
    assert warning in caplog.text
    assert compare.differences(case, whole, tmp_path / "other") == []


def test_a_damaged_best_checkpoint_with_none_before_it_is_refused_with_the_ways_on(
    early: tuple[cases.Case, Path], tmp_path: Path
) -> None:
    case, whole = early
    path = with_damaged_best(case, whole, tmp_path / "other")
    for earlier in checkpoint.listed(path.parents[1]):
        if earlier < path.parent:
            shutil.rmtree(earlier)
    config = case.config(tmp_path / "other")
    with pytest.raises(UserError, match="no checkpoint here is usable") as caught:
        pipeline.run(config)
    assert str(path) in str(caught.value) and "early_stopping_patience=null" in str(caught.value)
    code = pipeline.run(config, ["early_stopping_patience=null", "max_train_steps=5"])
    assert code == pipeline.EXIT_DONE
