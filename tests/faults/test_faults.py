"""A few rounds of the fault harness; many are a command of their own (see the package)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.tensorboard import SummaryWriter

from lora_scripts import pipeline
from lora_scripts.files import file_hash
from lora_scripts.training import checkpoint
from tests.faults import cases, compare
from tests.faults.harness import harness

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
THREE = ("image, three checkpoints", "text, three checkpoints")


@pytest.mark.long
def test_stopped_runs_and_damaged_checkpoints_end_as_undisturbed_ones() -> None:
    said = harness("soak", "damage", "--rounds", "4", "--seed", "5", "--cases", *THREE)
    assert "soak: 4 runs, " in said and "damage: 4 runs, " in said
    assert said.count("\n0 runs did not end bit-identical.") == 2


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_tenth_file_operation_goes_wrong() -> None:
    said = harness("operations", "--every", "10")
    assert "| fail | kill | tear |" in said and "| write |" in said and "| rename |" in said
    assert "\n0 runs did not end bit-identical." in said


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_case_is_stopped_twice() -> None:
    said = harness("soak", "--rounds", str(2 * len(cases.VARIANTS)))
    assert "\n0 runs did not end bit-identical." in said


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[cases.Case, Path]:
    """A finished run of texts."""
    work = tmp_path_factory.mktemp("faults")
    (case,) = cases.make(work / "toys", ["text"])
    assert pipeline.run(case.config(work / "whole")) == pipeline.EXIT_DONE
    return case, work / "whole"


def _another_bit(output: Path) -> None:
    path = output / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors.values())).view(torch.int16)
    first.view(-1)[0] ^= 1
    save_file(tensors, path)


def _a_step_twice(output: Path) -> None:
    with (output / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": 12, "loss": 1.0}) + "\n")


def _a_point_more(output: Path) -> None:
    board = SummaryWriter(str(output / "tensorboard"))
    board.add_text("samples/00", "said once more", 12)
    board.close()


def _another_optimizer_state(output: Path) -> None:
    path = output / "checkpoints/step-000012/training.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("optimizer."))
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path)
    state = path.with_name("state.json")
    _resealed(state, path)


def _resealed(state: Path, changed: Path) -> None:
    """A state.json whose checksums fit what was changed."""
    values = json.loads(state.read_text(encoding="utf-8"))
    values["sha256"][changed.name] = file_hash(changed)
    values[checkpoint.OWN_SUM] = checkpoint._sum_of(values)
    state.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_another_bit, "the exported weights"),
        (_a_step_twice, "metrics.jsonl"),
        (_a_point_more, "TensorBoard: samples/00"),
        (_another_optimizer_state, "checkpoint step-000012"),
        (lambda output: (output / ".step-000010.tmp").mkdir(), "the files: ['.step-000010.tmp']"),
        (lambda output: (output / "samples/step-000012_00.txt").write_text("", "utf-8"), "samples"),
    ],
)
def test_the_harness_sees_what_differs(
    finished: tuple[cases.Case, Path], tmp_path: Path, change: Callable[[Path], object], found: str
) -> None:
    case, whole = finished
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    assert compare.differences(case, whole, other) == []
    change(case.output(other))
    differences = compare.differences(case, whole, other)
    assert len(differences) == 1 and differences[0].startswith(found)
