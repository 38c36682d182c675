"""What the losses of a run say of it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lora_scripts import markdown, pipeline
from lora_scripts.training.health import LONG, RISES, Losses
from tests import runs, text_toys


def losses(training: list[float], measured: list[float], *, held_out: bool = True) -> Losses:
    """A run that was measured before the first step, and then at even distances."""
    found = Losses(held_out)
    for step, loss in enumerate(training, start=1):
        found.add(step, loss)
    every = len(training) // max(1, len(measured) - 1)
    for number, loss in enumerate(measured):
        found.measure(number * every, loss)
    return found


def noisy(level: float, steps: int, seed: int) -> list[float]:
    """Losses as diffusion has them: one step's is often a third, or thrice, of the median."""
    chance = random.Random(seed)
    return [level * chance.lognormvariate(0, 0.7) for _ in range(steps)]


def test_a_healthy_run_says_nothing() -> None:
    falling = [3.0 - 0.01 * step for step in range(200)]
    assert losses(falling, [3.0, 2.5, 2.2, 2.1, 2.05]).finding() is None


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_is_no_finding(seed: int) -> None:
    found = Losses(held_out=True)
    for step, loss in enumerate(noisy(0.1, 2000, seed), start=1):
        found.add(step, loss)
        assert step % LONG or found.finding() is None


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_far_above_its_start_for_long_diverges(seed: int) -> None:
    found = losses(noisy(0.1, LONG, seed) + noisy(0.4, 2 * LONG, seed), [0.1, 0.4]).finding()
    assert found is not None and found.kind == "diverging"
    assert "The learning_rate is too high" in found.text


def test_a_short_peak_is_no_divergence() -> None:
    peak = [1.0] * 100 + [9.0] * (LONG // 2 - 1) + [1.0] * 5
    assert losses(peak, [1.0, 1.0]).finding() is None


def test_a_measured_loss_that_stays_above_its_start_diverges_sooner() -> None:
    rising = [6.0] * LONG + [9.5] * LONG  # not twice as much
    assert losses(rising, [6.0, 6.1]).finding() is None
    found = losses(rising, [6.0, 9.0, 9.5, 9.6]).finding()
    assert found is not None and found.kind == "diverging"


def test_held_out_rising_while_training_falls_is_overfitting() -> None:
    falling = [3.0 - 0.01 * step for step in range(200)]
    found = losses(falling, [3.0, 2.5, 2.6, 2.7, 2.9]).finding()
    assert found is not None and found.kind == "overfitting"
    assert "since step 50 the held-out loss rose from 2.5 to 2.9" in found.text
    assert "the training loss fell from 2.755 to 1.255" in found.text


@pytest.mark.parametrize(
    "measured", [[3.0, 2.5, 2.6, 2.7], [3.0, 2.5, 2.51, 2.52, 2.54]], ids=["too few", "too little"]
)
def test_a_small_rise_is_not(measured: list[float]) -> None:
    falling = [3.0 - 0.01 * step for step in range(200)]
    assert losses(falling, measured).finding() is None
    assert len(measured) - 2 < RISES or measured[-1] < 2.55


def test_without_held_out_data_there_is_no_overfitting() -> None:
    falling = [3.0 - 0.01 * step for step in range(200)]
    assert losses(falling, [3.0, 2.5, 2.6, 2.7, 2.9], held_out=False).finding() is None


def overfit(tmp_path: Path, **changes: object) -> tuple[int, Path]:
    """Answers that nothing foretells, learned by heart."""
    base, rows = text_toys.save_model(tmp_path / "m"), tmp_path / "r.jsonl"
    chance = random.Random(0)
    with rows.open("w", encoding="utf-8") as stream:
        for number in range(16):
            answer = "".join(chance.choices("abcdefghijklmnop", k=12))
            stream.write(json.dumps({"prompt": f"Word {number}?", "completion": answer}) + "\n")
    keys = {"epochs": 20, "eval_steps": 5, "learning_rate": 0.03, "validation_split": 0.4}
    return runs.run_text(base, rows, tmp_path, **{**keys, **changes})


def test_log_and_card_say_that_a_real_run_overfits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="lora_scripts"):
        code, output = overfit(tmp_path)
    assert code == pipeline.EXIT_DONE
    assert caplog.text.count("The run overfits") == 1
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "**The run overfits: since step" in card
    found = json.loads((output / "run.json").read_text(encoding="utf-8"))["finding"]
    assert markdown.words(found) in card


def test_the_card_is_silent_where_the_best_was_taken(tmp_path: Path) -> None:
    code, output = overfit(tmp_path, early_stopping_patience=4)
    assert code == pipeline.EXIT_DONE
    assert "overfits" not in (output / "README.md").read_text(encoding="utf-8")
