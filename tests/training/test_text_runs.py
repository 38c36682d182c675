"""The same loop with texts: exact resume, tokens counted, the best checkpoint, early stopping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_scripts import errors, pipeline
from lora_scripts.errors import UserError
from lora_scripts.tasks.language import LanguageTask
from lora_scripts.training import checkpoint, loop
from lora_scripts.training.checkpoint import Best
from tests import runs, text_toys


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_toys.save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_toys.write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl")


RESUMED: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"packing": False, "gradient_accumulation_steps": 2},
    "dropout": {"lora_dropout": 0.3, "lr_warmup_steps": None},
    "bf16": {"mixed_precision": "bf16", "early_stopping_patience": 3},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(
    llama: Path, rows: Path, tmp_path: Path, name: str
) -> None:
    options: dict[str, Any] = {
        "epochs": 4, "eval_steps": 3, "validation_split": 0.2, "batch_size": 2,
        "save_dtype": "fp32", **RESUMED[name],
    }  # fmt: skip
    _, whole = runs.run_text(llama, rows, tmp_path / "whole", **options)
    with runs.terminated(LanguageTask, loss=7):
        code, parts = runs.run_text(llama, rows, tmp_path / "parts", **options)
    assert code == errors.EXIT_INTERRUPTED
    code, parts = runs.run_text(llama, rows, tmp_path / "parts", **options)
    assert code == pipeline.EXIT_DONE
    assert runs.metrics(whole) == runs.metrics(parts)
    a, b = (load_file(output / "adapter_model.safetensors") for output in (whole, parts))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Held-out losses as if measured one after the other, the first before training."""
    upcoming = iter(losses)
    monkeypatch.setattr(loop, "held_out_loss", lambda task, seed, compute: next(upcoming))


def test_early_stopping_ends_the_run_and_takes_the_best(
    llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [9.0, 5.0, 4.0, 4.5, 4.1, 3.0])
    options: dict[str, Any] = {
        "epochs": 10, "eval_steps": 2, "validation_split": 0.2, "early_stopping_patience": 2,
        "save_steps": 100, "save_dtype": "fp32",
    }  # fmt: skip
    code, output = runs.run_text(llama, rows, tmp_path, **options)
    assert code == pipeline.EXIT_DONE
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert (record["steps"], record["last_step"]) == (4, 8)
    assert record["best"] == {"step": 4, "loss": 4.0, "waited": 2}
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000008"]  # step 2 was the best only for a while
    best = load_file(output / "checkpoints/step-000004/adapter_model.safetensors")
    final = load_file(output / "adapter_model.safetensors")
    assert all(torch.equal(best[key], final[key]) for key in best)
    assert "4, the best of 8 by held-out loss" in (output / "README.md").read_text(encoding="utf-8")
    code, _ = runs.run_text(llama, rows, tmp_path, **options)  # finished: nothing is measured
    assert code == pipeline.EXIT_DONE


def test_a_run_stopped_between_its_end_and_its_export_does_not_train_on(
    llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "epochs": 10, "eval_steps": 2, "validation_split": 0.2, "early_stopping_patience": 1,
    }  # fmt: skip
    scripted(monkeypatch, [9.0, 5.0, 6.0])
    _, output = runs.run_text(llama, rows, tmp_path, **options)
    (output / "run.json").unlink()
    scripted(monkeypatch, [])
    code, _ = runs.run_text(llama, rows, tmp_path, **options)
    assert code == pipeline.EXIT_DONE
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert (record["steps"], record["last_step"]) == (2, 4)


def test_without_patience_the_last_step_is_taken_and_the_best_is_kept(
    llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [9.0, 5.0, 6.0, 7.0, 8.0])
    _, output = runs.run_text(
        llama, rows, tmp_path, epochs=4, eval_steps=3, validation_split=0.2, save_steps=3,
        save_total_limit=1,
    )  # fmt: skip
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert (record["steps"], record["last_step"], record["best"]["step"]) == (12, 12, 3)
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["step-000003", "step-000012"]


def test_a_loss_on_training_rows_is_no_best(llama: Path, rows: Path, tmp_path: Path) -> None:
    _, output = runs.run_text(llama, rows, tmp_path, eval_steps=2, validation_split=0)
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert record["best"] is None


def test_judging() -> None:
    best = None
    for step, loss in enumerate([3.0, 2.0, 2.0, 2.5, 1.0]):
        best = checkpoint.judged(best, step, loss)
        if step == 3:
            assert best == Best(1, 2.0, waited=2)
    assert best == Best(4, 1.0, waited=0)


def test_answers_go_to_samples_and_tensorboard(llama: Path, rows: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, output = runs.run_text(
        llama, rows, tmp_path, sample_steps=3,
        sample_prompts=["What is number 3?", {"prompt": "And?", "temperature": 0.8, "seed": 5}],
    )  # fmt: skip
    written = sorted(path.name for path in (output / "samples").iterdir())
    assert written == [f"step-{step:06d}_{n:02d}.txt" for step in (0, 3, 6) for n in (0, 1)]
    text = (output / "samples/step-000006_00.txt").read_text(encoding="utf-8")
    assert text.startswith("What is number 3?\n\n---\n\n")
    board = EventAccumulator(str(output / "tensorboard"), size_guidance={"tensors": 0})
    board.Reload()
    assert "samples/00/text_summary" in board.Tags()["tensors"]
    groups = [tag for tag in board.Tags()["scalars"] if tag.startswith("grad_norm/")]
    assert groups == ["grad_norm/model.model.layers.0", "grad_norm/model.model.layers.1"]


def test_sampling_leaves_the_training_as_it_was(llama: Path, rows: Path, tmp_path: Path) -> None:
    sampled = [{"prompt": "And?", "temperature": 1.0}]
    common: dict[str, Any] = {"lora_dropout": 0.2, "save_dtype": "fp32"}
    _, plain = runs.run_text(llama, rows, tmp_path / "a", **common)
    _, other = runs.run_text(
        llama, rows, tmp_path / "b", sample_prompts=sampled, sample_steps=1, **common
    )
    a, b = (load_file(output / "adapter_model.safetensors") for output in (plain, other))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_a_run_goes_on_from_a_finished_lora(
    llama: Path, rows: Path, tmp_path: Path, kind: str
) -> None:
    """The first measurement of the second run is the last one of the first."""
    options: dict[str, Any] = {"lora_type": kind, "save_dtype": "fp32", "lora_targets": "attention"}
    _, first = runs.run_text(llama, rows, tmp_path / "first", **options)
    _, second = runs.run_text(
        llama, rows, tmp_path / "second", init_lora=str(first), lora_alpha=3, **options
    )
    ends = [[row["eval_loss"] for row in runs.metrics(run) if "eval_loss" in row]
            for run in (first, second)]  # fmt: skip
    assert ends[1][0] == pytest.approx(ends[0][-1], rel=1e-5)
    assert ends[1][0] < 0.98 * ends[0][0]


def test_a_finished_lora_may_move_but_not_change(llama: Path, rows: Path, tmp_path: Path) -> None:
    _, first = runs.run_text(llama, rows, tmp_path / "first", epochs=1)
    second = tmp_path / "second"
    runs.run_text(llama, rows, second, init_lora=str(first), epochs=1)
    moved = first.rename(tmp_path / "moved")
    code, _ = runs.run_text(llama, rows, second, init_lora=str(moved), epochs=2)
    assert code == pipeline.EXIT_DONE
    _, other = runs.run_text(llama, rows, tmp_path / "other", epochs=2)
    for path in (other, None):
        with pytest.raises(UserError, match="init_lora changed since this checkpoint"):
            runs.run_text(llama, rows, second, init_lora=path and str(path), epochs=3)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"lora_rank": 8}, "has the rank 4, not 8"),
        ({"lora_type": "dora"}, "one of the two is DoRA"),
        ({"lora_targets": ["q_proj"]}, "carry no LoRA here"),
    ],
)
def test_a_finished_lora_of_another_shape_is_refused_by_key(
    llama: Path, rows: Path, tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    _, first = runs.run_text(llama, rows, tmp_path / "first", epochs=1)
    with pytest.raises(UserError, match=what) as caught:
        runs.run_text(llama, rows, tmp_path / "second", init_lora=str(first), **changes)
    assert "init_lora" in caught.value.problems[0].where


def test_checkpoints_of_before_the_presets_are_gone_on_from(
    llama: Path, rows: Path, tmp_path: Path
) -> None:
    """Those of format 2 say `target_modules`, and know no lora_type, ema_decay …"""
    with runs.terminated(LanguageTask, loss=2):
        _, output = runs.run_text(llama, rows, tmp_path)
    state = next((output / "checkpoints").iterdir()) / "state.json"
    values = json.loads(state.read_text(encoding="utf-8"))
    for key in ("lora_type", "ema_decay", "init_lora", "lr_num_cycles", "lora_targets"):
        del values["config"][key]
    values["config"]["target_modules"] = None
    values["format_version"] = 2
    state.write_text(json.dumps(values), encoding="utf-8")
    code, _ = runs.run_text(llama, rows, tmp_path)
    assert code == pipeline.EXIT_DONE
