"""Real `train.py` processes that are told to stop: exit codes, checkpoints, how it goes on."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_scripts import pipeline
from lora_scripts.training import checkpoint, loop
from tests import runs, text_toys, toys

pytestmark = pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
ROOT = Path(__file__).parents[1]
STEPS = 30
LONG_STEP = 120  # micro-batches: a step takes a second or two, also on a fast machine


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_toys.save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_toys.write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl")


def config(base: Path, data: Path, folder: Path, **changes: Any) -> Path:
    """A run of `STEPS` steps that saves every second one."""
    options = {"epochs": 1000, "max_train_steps": STEPS, "save_steps": 2, "lora_dropout": 0.2}
    values = runs.text_values(base, data, folder, **{**options, **changes})
    return toys.write_config(folder / "run.yaml", **values)


class Train:
    """`python train.py --config …` in a process of its own, as a shell starts it."""

    def __init__(self, path: Path) -> None:
        self.output = path.parent / "output" / "toy"
        self._said = path.parent / "said"
        with self._said.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "train.py", "--config", str(path)],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(_threads())},
            )

    def said(self) -> str:
        return self._said.read_text(encoding="utf-8")

    def wait_for(self, is_there: Callable[[Train], bool]) -> None:
        """Wait for something to be seen of it."""
        until = time.monotonic() + 120
        while not is_there(self):
            assert self._process.poll() is None, self.said()
            assert time.monotonic() < until, self.said()
            time.sleep(0.002)

    def send(self, number: signal.Signals) -> None:
        """Ctrl-C goes to all processes of a terminal, SIGTERM to one."""
        if number is signal.SIGINT:
            os.killpg(self._process.pid, number)
        else:
            self._process.send_signal(number)

    def code(self) -> int:
        """Its exit code, at its end."""
        return self._process.wait(timeout=120)


def _threads() -> int:
    """As many as in this process, or the sums would be rounded in another way."""
    return torch.get_num_threads()


def has_taken(steps: int) -> Callable[[Train], bool]:
    """Whether so many steps stand in metrics.jsonl."""

    def is_there(train: Train) -> bool:
        path = train.output / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return text.count('"loss"') >= steps

    return is_there


def steps_saved(output: Path) -> Sequence[int]:
    """The steps of the checkpoints that are whole."""
    found = checkpoint.listed(output / "checkpoints")
    return [checkpoint.read_state(path).position.step for path in found]


def test_ctrl_c_and_sigterm_save_and_the_same_command_ends_equal(
    llama: Path, rows: Path, tmp_path: Path
) -> None:
    folder, whole = tmp_path / "stopped", tmp_path / "whole"
    folder.mkdir()
    whole.mkdir()
    path = config(llama, rows, folder)
    for number, seen in ((signal.SIGINT, 3), (signal.SIGTERM, 12)):
        train = Train(path)
        train.wait_for(has_taken(seen))
        train.send(number)
        assert train.code() == 75, train.said()
        last = len([row for row in runs.metrics(train.output) if "loss" in row])
        assert seen <= last < STEPS
        assert steps_saved(train.output)[-1] == last
        assert f"Interrupted after step {last} of {STEPS}. The same command goes on" in train.said()
    assert "Going on from" in train.said()

    assert pipeline.run(path) == pipeline.EXIT_DONE
    assert pipeline.run(config(llama, rows, whole)) == pipeline.EXIT_DONE
    assert runs.metrics(train.output) == runs.metrics(whole / "output" / "toy")
    name = "adapter_model.safetensors"
    a, b = (load_file(output / name) for output in (train.output, whole / "output" / "toy"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_second_ctrl_c_ends_at_once_and_the_last_checkpoint_is_good(
    llama: Path, rows: Path, tmp_path: Path
) -> None:
    path = config(llama, rows, tmp_path, gradient_accumulation_steps=LONG_STEP)
    train = Train(path)
    train.wait_for(lambda train: has_taken(2)(train) and (2 in steps_saved(train.output)))
    train.send(signal.SIGINT)
    train.wait_for(lambda train: "press Ctrl-C again to stop at once" in train.said())
    sent = time.monotonic()
    train.send(signal.SIGINT)
    assert train.code() == 75, train.said()
    assert time.monotonic() - sent < 5
    assert "Stopped. The same command goes on from the last checkpoint." in train.said()
    assert steps_saved(train.output) == [2]
    assert pipeline.run(path, ["max_train_steps=3"]) == pipeline.EXIT_DONE
    assert steps_saved(train.output) == [2, 3]


def test_sigterm_before_the_first_step_is_resumable_too(llama: Path, tmp_path: Path) -> None:
    """While 20,000 rows are read and tokenised."""
    data = text_toys.write_jsonl(tmp_path / "rows.jsonl", text_toys.conversations(20_000))
    train = Train(config(llama, data, tmp_path))
    train.wait_for(lambda train: (train.output / "run.log").is_file())
    train.send(signal.SIGTERM)
    assert train.code() == 75, train.said()
    assert "Stopped. The same command goes on from the last checkpoint." in train.said()
    assert steps_saved(train.output) == []
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_a_second_ctrl_c_may_come_while_the_first_is_told(before: Any) -> None:
    """Also where the run was started to ignore them, as a shell does behind an `&`."""

    class Again(logging.Handler):
        told = 0

        def emit(self, record: logging.LogRecord) -> None:
            self.told += 1
            if self.told == 1:
                signal.raise_signal(signal.SIGINT)

    again, logger = Again(), logging.getLogger(loop.__name__)
    logger.addHandler(again)
    usual = signal.signal(signal.SIGINT, before)
    try:
        with pytest.raises(KeyboardInterrupt), loop.stop_signals():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, usual)
        logger.removeHandler(again)
    assert again.told == 1
