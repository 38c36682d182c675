"""One real micro-step: what it takes, and that it leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_scripts.memory import Estimate, Peak, Phase, corrected, micro_step
from lora_scripts.models import lora
from lora_scripts.training import loop
from tests import runs, text_toys, toys

MB = 10**6


def test_no_trace_is_left_of_a_micro_step_on_pictures(tmp_path: Path) -> None:
    base = toys.save_stable_diffusion(tmp_path / "base")
    data = toys.save_pictures(tmp_path / "data")
    changes = {"lora_dropout": 0.5, "batch_size": 4, "train_text_encoder": True}
    losses = [
        trained(*runs.task(base, data, tmp_path / str(first), **changes), first, tmp_path)
        for first in (False, True)
    ]
    assert losses[0] == losses[1]


def test_no_trace_is_left_of_a_micro_step_on_texts(tmp_path: Path) -> None:
    base = text_toys.save_model(tmp_path / "base")
    text_toys.write_jsonl(tmp_path / "data" / "data.jsonl")
    losses = [
        trained(
            *runs.text_task(base, tmp_path / "data", tmp_path / str(first), lora_dropout=0.5),
            first, tmp_path,
        )
        for first in (False, True)
    ]  # fmt: skip
    assert losses[0] == losses[1]


def trained(task: Any, config: Any, compute: Any, micro_step_first: bool, folder: Path) -> Any:
    """The losses of a run and the weights after it, perhaps with a micro-step before it."""
    torch.manual_seed(1)
    modes = [m.training for module in task.adapted.values() for m in module.modules()]
    if micro_step_first:
        assert micro_step(task, config, compute).seconds > 0
    assert [m.training for module in task.adapted.values() for m in module.modules()] == modes
    drawn = torch.rand(3).tolist()
    for module in task.adapted.values():
        assert all(p.grad is None for p in lora.trainable(module).values())
    output = folder / f"output-{micro_step_first}"
    output.mkdir()
    loop.train(task, config, compute, output, lambda target, position: [], None)
    weights = [
        p.detach().clone() for m in task.adapted.values() for p in lora.trainable(m).values()
    ]
    return drawn, runs.metrics(output), [w.numpy().tobytes() for w in weights]


def test_the_heaviest_micro_batch_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = text_toys.save_model(tmp_path / "base")
    text_toys.write_jsonl(tmp_path / "data" / "data.jsonl")
    task, config, compute = runs.text_task(base, tmp_path / "data", tmp_path, batch_size=3)
    taken: list[int] = []
    original = task.loss
    monkeypatch.setattr(task, "loss", lambda b, k: taken.append(b["tokens"]) or original(b, k))
    micro_step(task, config, compute)
    planned = [
        b for e in range(config.epochs) for b in task.plan(runs.Key(config.seed, "train", e))
    ]
    lengths = task.data.encoding.lengths()
    assert taken == 2 * [max(int(lengths[list(indices)].sum()) for indices in planned)]


def test_running_out_of_memory_comes_through_and_leaves_no_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = toys.save_stable_diffusion(tmp_path / "base")
    task, config, compute = runs.task(base, toys.save_pictures(tmp_path / "data"), tmp_path)
    original = task.loss

    def too_much(batch: Any, key: Any) -> Any:
        original(batch, key).total.backward()
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(task, "loss", too_much)
    with pytest.raises(torch.OutOfMemoryError):
        micro_step(task, config, compute)
    assert all(p.grad is None for p in task.adapted["unet"].parameters())


def test_the_step_is_as_measured_and_the_rest_moves_with_it() -> None:
    step = Phase("training step", {}, {"weights": 500 * MB, "adapters": 10 * MB,
                 "optimizer": 20 * MB, "gradients": 10 * MB, "activations": 300 * MB,
                 "logits": 0, "gaps": 60 * MB})  # fmt: skip
    samples = Phase("samples", {}, {"weights": 500 * MB, "activations": 900 * MB})
    estimate = Estimate([step, samples], "2 rows", {"optimizer": 20 * MB, "gradients": 0})
    found = corrected(estimate, Peak(gpu=0, ram=950 * MB, ram_before=530 * MB, seconds=1.0))
    measured, moved = found.phases
    assert measured.total("ram") == 950 * MB
    assert moved.total("ram") == 1420 * MB  # 20 MB more lay there before than was foretold
    assert found.measured and "measured" in found.table()[0]


def test_a_card_is_corrected_by_what_was_reserved() -> None:
    step = Phase("training step", {"weights": 500 * MB, "optimizer": 20 * MB,
                 "activations": 300 * MB}, {"imports": 400 * MB})  # fmt: skip
    estimate = Estimate([step], "1 row", {"optimizer": 20 * MB})
    peak = Peak(gpu=900 * MB, ram=600 * MB, ram_before=500 * MB, seconds=1.0)
    assert corrected(estimate, peak).peak_gpu == 900 * MB


def test_gradients_of_an_earlier_micro_batch_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With accumulation a second micro-batch finds the gradients of the first one."""
    base = toys.save_stable_diffusion(tmp_path / "base")
    data = toys.save_pictures(tmp_path / "data")
    task, config, compute = runs.task(base, data, tmp_path, gradient_accumulation_steps=2)
    original, there = task.loss, []
    parameters = list(lora.trainable(task.adapted["unet"]).values())

    def noted(batch: Any, key: Any) -> Any:
        there.append(sum(p.grad is not None for p in parameters))
        return original(batch, key)

    monkeypatch.setattr(task, "loss", noted)
    micro_step(task, config, compute)
    assert there == 2 * [0, len(parameters)]
