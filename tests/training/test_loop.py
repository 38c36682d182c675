"""The loop: exact accumulation, clipping, loss scaling, steps, interruption, exact resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_scripts import errors, pipeline
from lora_scripts.errors import UserError
from lora_scripts.processes import ALONE
from lora_scripts.tasks.diffusion import DiffusionTask
from lora_scripts.training import checkpoint, loop, steps
from lora_scripts.training.checkpoint import Position
from tests import runs, toys


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "pytorch_lora_weights.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """Bit-identical files and the same metrics."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert runs.metrics(one) == runs.metrics(other)


def test_accumulation_does_the_same_as_one_big_batch(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    """Five pictures: the last micro-batch is smaller, so a mean of means would differ."""
    data = toys.save_pictures(tmp_path / "data", count=5)
    common: dict[str, Any] = {"save_dtype": "fp32", "epochs": 1, "max_grad_norm": 0}
    _, big = runs.run(sd_folder, data, tmp_path / "big", batch_size=5, **common)
    _, small = runs.run(
        sd_folder, data, tmp_path / "small", batch_size=2, gradient_accumulation_steps=3, **common
    )
    assert [r["samples"] for r in runs.metrics(big) if "loss" in r] == [5]
    losses = [[r["loss"] for r in runs.metrics(o) if "loss" in r] for o in (big, small)]
    norms = [[r["grad_norm"] for r in runs.metrics(o) if "loss" in r] for o in (big, small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


class _Recorded:
    """Gradients as the optimizer sees them: a hook before every step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.norms: list[float] = []
        original = torch.optim.AdamW.step

        def step(optimizer: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
            gradients = [p.grad for g in optimizer.param_groups for p in g["params"]]
            self.norms.append(torch.nn.utils.get_total_norm(gradients).item())
            return original(optimizer, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)


def test_gradients_are_clipped_before_the_step(
    sd_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = _Recorded(monkeypatch)
    _, output = runs.run(sd_folder, pictures, tmp_path, max_grad_norm=1e-3)
    told = [row["grad_norm"] for row in runs.metrics(output) if "loss" in row]
    assert min(told) > 1e-3
    assert recorded.norms == pytest.approx([1e-3] * len(told), rel=1e-3)


def test_no_clipping_at_zero(
    sd_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = _Recorded(monkeypatch)
    _, output = runs.run(sd_folder, pictures, tmp_path, max_grad_norm=0)
    told = [row["grad_norm"] for row in runs.metrics(output) if "loss" in row]
    assert recorded.norms == pytest.approx(told, rel=1e-5)


def test_fp16_survives_a_forced_overflow(
    sd_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss scale far too high overflows: those steps change nothing, then training goes on."""
    original = torch.amp.GradScaler

    def high(device: str, enabled: bool) -> torch.amp.GradScaler:
        return original(device, enabled=enabled, init_scale=2.0**40)

    monkeypatch.setattr(torch.amp, "GradScaler", high)
    _, output = runs.run(
        sd_folder, pictures, tmp_path, mixed_precision="fp16", epochs=15, save_steps=2
    )
    rows = [row for row in runs.metrics(output) if "loss" in row]
    overflowed = [row["grad_norm"] is None for row in rows]
    assert all(overflowed[:2]) and overflowed.count(False) > 20
    first = load_file(next((output / "checkpoints/step-000002").glob("toy-*.safetensors")))
    assert all((t == 0).all() for key, t in first.items() if "lora_up" in key)
    assert any((t != 0).any() for key, t in weights(output).items() if "lora_up" in key)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_frozen_model_is_held_in_the_precision_and_the_lora_in_float32(
    sd_folder: Path, pictures: Path, tmp_path: Path, precision: str
) -> None:
    task, _, compute = runs.task(sd_folder, pictures, tmp_path, mixed_precision=precision)
    dtypes = {
        parameter.requires_grad: parameter.dtype for parameter in task.adapted["unet"].parameters()
    }
    assert dtypes == {False: compute.dtype, True: torch.float32}


def test_low_precision_learns_what_float32_learns(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    losses = {}
    for precision in ("no", "bf16", "fp16"):
        _, output = runs.run(
            sd_folder, pictures, tmp_path / precision, mixed_precision=precision, epochs=6
        )
        losses[precision] = [row["loss"] for row in runs.metrics(output) if "loss" in row]
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.02)
    assert losses["fp16"] == pytest.approx(losses["no"], rel=0.02)
    assert losses["no"][-1] < losses["no"][0]


def test_checkpointed_gradients_are_the_same(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    _, plain = runs.run(sd_folder, pictures, tmp_path / "plain")
    _, saved = runs.run(sd_folder, pictures, tmp_path / "saved", gradient_checkpointing=True)
    assert runs.metrics(plain) == [pytest.approx(row, rel=1e-4) for row in runs.metrics(saved)]


def test_steps_end_with_the_epochs_or_the_cap(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    task, config, _ = runs.task(
        sd_folder, pictures, tmp_path, epochs=3, gradient_accumulation_steps=2
    )
    planned = list(
        steps.remaining(task, config, Position(), steps.count(task, config, ALONE), ALONE)
    )
    assert [len(step.micro_batches) for step in planned] == [2, 1, 2, 1, 2, 1]
    assert [step.after.samples for step in planned] == [4, 6, 10, 12, 16, 18]
    assert [step.ends_epoch for step in planned] == [False, True] * 3
    capped = config.model_copy(update={"max_train_steps": 4})
    assert steps.count(task, capped, ALONE) == 4
    assert list(steps.remaining(task, capped, planned[2].after, 4, ALONE)) == [planned[3]]


RESUMED: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 2, "lora_dropout": 0.3,
                     "random_flip": True, "caption_dropout": 0.3},
    "fp16": {"mixed_precision": "fp16"},
    "bf16": {"mixed_precision": "bf16", "lr_scheduler": "cosine", "lr_warmup_steps": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(
    sd_folder: Path, pictures: Path, tmp_path: Path, name: str
) -> None:
    """SIGTERM in the middle of an epoch; the same command again; the same bits."""
    options: dict[str, Any] = {"epochs": 4, "eval_steps": 3, "save_dtype": "fp32", **RESUMED[name]}
    _, whole = runs.run(sd_folder, pictures, tmp_path / "whole", **options)
    with runs.terminated(DiffusionTask, loss=5):
        code, parts = runs.run(sd_folder, pictures, tmp_path / "parts", **options)
    assert code == errors.EXIT_INTERRUPTED
    assert not (parts / "toy.safetensors").exists()
    code, parts = runs.run(sd_folder, pictures, tmp_path / "parts", **options)
    assert code == pipeline.EXIT_DONE
    assert_same_run(whole, parts)


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    sd_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written after the checkpoint is cut back; no step stands twice."""
    options: dict[str, Any] = {"epochs": 4, "save_steps": 3, "eval_steps": 4, "save_dtype": "fp32"}
    _, whole = runs.run(sd_folder, pictures, tmp_path / "whole", **options)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "due", lambda config, step: step.after.step == 3)
        original = loop.RunLog.step
        patch.setattr(
            loop.RunLog,
            "step",
            lambda log, number, *rest: killed() if number == 8 else original(log, number, *rest),
        )
        with pytest.raises(KeyboardInterrupt):
            runs.run(sd_folder, pictures, tmp_path / "parts", **options)
    parts = tmp_path / "parts/output/toy"
    assert runs.metrics(parts)[-1]["step"] == 7
    with (parts / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 8, "epo')  # torn
    runs.run(sd_folder, pictures, tmp_path / "parts", **options)
    assert_same_run(whole, parts)


def test_a_stop_before_the_last_rotation_leaves_no_old_checkpoint(
    sd_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stands at its end then and writes no further checkpoint that would rotate."""
    options: dict[str, Any] = {"save_steps": 2, "save_total_limit": 1}

    def killed(path: Path) -> None:
        if path.name == "step-000004":
            raise KeyboardInterrupt
        removed(path)

    removed = checkpoint._remove
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_remove", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.run(sd_folder, pictures, tmp_path, **options)
    folder = tmp_path / "output/toy/checkpoints"
    assert [path.name for path in checkpoint.listed(folder)] == ["step-000004", "step-000006"]
    runs.run(sd_folder, pictures, tmp_path, **options)
    assert [path.name for path in checkpoint.listed(folder)] == ["step-000006"]
    assert (tmp_path / "output/toy/toy.safetensors").is_file()


def test_more_epochs_go_on_from_a_finished_run(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"eval_steps": 6, "save_dtype": "fp32"}
    _, whole = runs.run(sd_folder, pictures, tmp_path / "whole", epochs=4, **options)
    runs.run(sd_folder, pictures, tmp_path / "parts", epochs=2, **options)
    _, parts = runs.run(sd_folder, pictures, tmp_path / "parts", epochs=4, **options)
    assert_same_run(whole, parts)


def test_the_same_command_after_a_finished_run_does_nothing(
    sd_folder: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, output = runs.run(sd_folder, pictures, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    with caplog.at_level("INFO", logger="lora_scripts"):
        code, _ = runs.run(sd_folder, pictures, tmp_path)
    assert code == 0
    assert "This run is finished" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}


def test_changed_keys_are_refused_with_the_ways_on(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    runs.run(sd_folder, pictures, tmp_path)
    with pytest.raises(UserError) as error:
        runs.run(sd_folder, pictures, tmp_path, lora_rank=8, learning_rate=0.5)
    text = str(error.value)
    assert "lora_rank: found 8, but step-000006 was trained with 4" in text
    assert "learning_rate: found 0.5, but step-000006 was trained with 0.01" in text
    assert "resume=never" in text


def test_changed_data_is_refused(sd_folder: Path, tmp_path: Path) -> None:
    data = toys.save_pictures(tmp_path / "data", count=4)
    runs.run(sd_folder, data, tmp_path, epochs=1)
    toys.save_pictures(data, count=4, seed=3)
    with pytest.raises(UserError, match="the data changed"):
        runs.run(sd_folder, data, tmp_path, epochs=2)


def test_another_base_model_is_refused(sd_folder: Path, pictures: Path, tmp_path: Path) -> None:
    runs.run(sd_folder, pictures, tmp_path, epochs=1)
    other = toys.save_stable_diffusion(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="the base model changed"):
        runs.run(other, pictures, tmp_path, epochs=2)


def test_never_starts_anew_and_keeps_the_earlier_run(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    _, output = runs.run(sd_folder, pictures, tmp_path)
    before = weights(output)
    runs.run(sd_folder, pictures, tmp_path, lora_rank=2, resume="never")
    kept = load_file(output / "earlier-1" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(before[key], kept[key]) for key in before)
    state = json.loads((output / "checkpoints/step-000006/state.json").read_text(encoding="utf-8"))
    assert state["config"]["lora_rank"] == 2


def test_a_run_can_start_from_a_named_checkpoint(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"save_dtype": "fp32", "epochs": 3, "save_steps": 4}
    _, whole = runs.run(sd_folder, pictures, tmp_path / "whole", **options)
    named = whole / "checkpoints" / "step-000004"
    _, other = runs.run(sd_folder, pictures, tmp_path / "other", resume=str(named), **options)
    a, b = weights(whole), weights(other)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    sd_folder: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    options: dict[str, Any] = {"save_dtype": "fp32", "epochs": 3, "save_steps": 4, "eval_steps": 9}
    _, whole = runs.run(sd_folder, pictures, tmp_path, **options)
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    (whole / "run.json").unlink()
    path = whole / "checkpoints" / "step-000009" / "training.safetensors"
    content = bytearray(path.read_bytes())
    match damage:
        case "flip":
            content[-5] ^= 1
            path.write_bytes(content)
        case "truncate":
            path.write_bytes(content[:-100])
        case "missing":
            path.unlink()
    with caplog.at_level("WARNING", logger="lora_scripts"):
        runs.run(sd_folder, pictures, tmp_path, **options)
    assert "step-000009 is not usable" in caplog.text
    assert_same_run(whole, copy)


def test_a_run_without_a_good_checkpoint_stops(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    _, output = runs.run(sd_folder, pictures, tmp_path)
    (output / "run.json").unlink()
    (output / "checkpoints/step-000006/state.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="no usable checkpoint"):
        runs.run(sd_folder, pictures, tmp_path)


def test_old_checkpoints_are_rotated_out(sd_folder: Path, pictures: Path, tmp_path: Path) -> None:
    _, output = runs.run(
        sd_folder, pictures, tmp_path, save_every_epochs=1, epochs=4, save_total_limit=2
    )
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["step-000009", "step-000012"]


def test_the_learning_of_a_run_is_seen_in_tensorboard(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, output = runs.run(
        sd_folder, pictures, tmp_path, epochs=2, eval_steps=3, histogram_steps=2, sample_steps=4,
        sample_prompts=["a square", {"prompt": "a circle", "steps": 2, "negative_prompt": "blue"}],
    )  # fmt: skip
    board = EventAccumulator(str(output / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    rows = [row for row in runs.metrics(output) if "loss" in row]
    for name, key in (("train/loss", "loss"), ("train/grad_norm", "grad_norm")):
        found = [(event.step, event.value) for event in board.Scalars(name)]
        assert found == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows]
    assert [event.step for event in board.Scalars("eval/loss")] == [0, 3, 6]
    groups = [tag for tag in board.Tags()["scalars"] if tag.startswith("grad_norm/")]
    assert "grad_norm/unet.down_blocks.0" in groups and "grad_norm/unet.up_blocks.1" in groups
    assert [event.step for event in board.Images("samples/00")] == [0, 4, 6]
    histograms = board.Tags()["histograms"]
    assert len(histograms) == len([k for k in weights(output) if not k.endswith("alpha")])
    assert len(list((output / "samples").glob("*.png"))) == 6


def test_a_checkpoint_of_the_first_format_goes_on(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"save_dtype": "fp32"}
    _, whole = runs.run(sd_folder, pictures, tmp_path / "whole", epochs=4, **options)
    _, parts = runs.run(sd_folder, pictures, tmp_path / "parts", epochs=2, **options)
    path = parts / "checkpoints" / "step-000006" / "state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    for key in ("best", "tallies", "passing", "processes"):
        del state[key]
    path.write_text(json.dumps(state | {"format_version": 1}), encoding="utf-8")
    record = json.loads((parts / "run.json").read_text(encoding="utf-8"))
    del record["last_step"]
    (parts / "run.json").write_text(json.dumps(record), encoding="utf-8")
    before = (parts / "metrics.jsonl").read_bytes()
    runs.run(sd_folder, pictures, tmp_path / "parts", epochs=2, **options)  # finished
    assert (parts / "metrics.jsonl").read_bytes() == before
    runs.run(sd_folder, pictures, tmp_path / "parts", epochs=4, **options)
    a, b = weights(whole), weights(parts)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_checkpoint_of_a_later_format_is_refused(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    _, output = runs.run(sd_folder, pictures, tmp_path)
    path = output / "checkpoints" / "step-000006" / "state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(state | {"format_version": 9}), encoding="utf-8")
    with pytest.raises(UserError, match="has format_version 9; this version reads 1 to 5"):
        runs.run(sd_folder, pictures, tmp_path, epochs=3)
