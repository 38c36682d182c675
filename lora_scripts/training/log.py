"""What a run tells: a progress bar, TensorBoard, metrics.jsonl. All get the same numbers."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from PIL.Image import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter

from lora_scripts.errors import WorkError
from lora_scripts.files import write_text
from lora_scripts.run_files import METRICS
from lora_scripts.training.health import LONG, Losses
from lora_scripts.training.nonfinite import SKIPPED

logger = logging.getLogger(__name__)
COUNTED = ("epoch", "samples")  # numbers that need no curve
SECONDS_BETWEEN_LINES = 15.0  # where there is no terminal to draw a bar on


class RunLog:
    """Writes one run's numbers. `first_step` is the step a resumed run goes on from.

    What an interrupted run had written after that step is cut off, so that no step stands twice.
    """

    def __init__(self, folder: Path, first_step: int, total_steps: int, *, held_out: bool) -> None:
        self.folder = folder
        self.metrics_path = folder / METRICS
        # a run that begins anew writes step 0, too, which one that goes on has behind it
        first_kept = first_step + 1 if first_step else 0
        cut_back(self.metrics_path, first_kept)
        is_there = self.metrics_path.is_file()
        self._losses = losses_of(folder, held_out=held_out) if is_there else Losses(held_out)
        self._said: set[str] = set()
        self._metrics = self.metrics_path.open("a", encoding="utf-8", newline="\n")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_kept)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(),
            disable=not Console().is_terminal,
        )
        self._task = self._bar.add_task(
            "training", total=total_steps, completed=first_step, numbers=""
        )
        self._total_steps = total_steps
        self._last_line = time.monotonic()
        # the first step that was seen here, its tallies and when it was done: rates count from it
        self._first: tuple[int, dict[str, int], float] | None = None

    def __enter__(self) -> RunLog:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        self._metrics.close()
        self._board.close()

    def step(
        self,
        step: int,
        numbers: Mapping[str, float],
        tallies: Mapping[str, int],
        group_norms: Mapping[str, float],
    ) -> None:
        """One optimizer step: `numbers` into every place, `group_norms` into TensorBoard.

        `tallies` are counts since the start of the run (tokens, say); their rates are shown.
        """
        self._write({"step": step, **numbers, **tallies})
        self._losses.add(step, numbers["loss"])
        if step % LONG == 0:
            self._say_finding()
        for name, number in numbers.items():
            if name not in COUNTED:
                self._board.add_scalar(f"train/{name}", number, step)
        for name, norm in group_norms.items():
            self._board.add_scalar(f"grad_norm/{name}", norm, step)
        shown = f"loss {numbers['loss']:.4f}  lr {numbers['learning_rate']:.1e}"
        left = ""
        if self._first is None:
            self._first = step, dict(tallies), time.monotonic()
        else:
            first, before, then = self._first
            seconds = max(1e-9, time.monotonic() - then)
            shown += f"  {(step - first) / seconds:.2f} it/s" + _rates(before, tallies, seconds)
            left = f"  {(self._total_steps - step) * seconds / (step - first):.0f} s left"
        self._bar.update(self._task, completed=step, numbers=shown)
        if self._bar.disable and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            logger.info("step %d/%d  %s%s", step, self._total_steps, shown, left)
            self._last_line = time.monotonic()

    def evaluation(self, step: int, eval_loss: float) -> None:
        """One held-out measurement."""
        self._write({"step": step, "eval_loss": eval_loss})
        self._board.add_scalar("eval/loss", eval_loss, step)
        logger.info("step %d: held-out loss %.5f", step, eval_loss)
        self._losses.measure(step, eval_loss)
        self._say_finding()

    def _say_finding(self) -> None:
        """Once each: that the run diverges, that it overfits."""
        found = self._losses.finding()
        if found is not None and found.kind not in self._said:
            self._said.add(found.kind)
            logger.warning("%s", found.text)

    def histograms(self, step: int, gradients: Mapping[str, torch.Tensor]) -> None:
        """The distribution of the gradients of every adapter matrix."""
        for name, gradient in gradients.items():
            self._board.add_histogram(f"gradients/{name}", gradient.float().cpu().numpy(), step)

    def samples(self, step: int, samples: Mapping[str, Image | str]) -> None:
        """What the model makes now: into samples/ and TensorBoard."""
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        for name, sample in samples.items():
            if isinstance(sample, str):
                write_text(folder / f"step-{step:06d}_{name}.txt", sample)
                self._board.add_text(f"samples/{name}", sample, step)
            else:
                sample.save(folder / f"step-{step:06d}_{name}.png")
                self._board.add_image(
                    f"samples/{name}", np.asarray(sample), step, dataformats="HWC"
                )

    def flush(self) -> None:
        """Everything written so far is in the files; the metrics are on the disk."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        self._board.flush()

    def _write(self, row: Mapping[str, float]) -> None:
        """One row; JSON has no infinity, so a gradient norm that overflowed is null."""
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._metrics.write(json.dumps({**finite, "time": round(time.time(), 3)}) + "\n")
        self._metrics.flush()


class NoLog:
    """What a process writes that is not the first: nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def step(self, *numbers: object) -> None: ...

    def histograms(self, *gradients: object) -> None: ...

    def evaluation(self, *loss: object) -> None: ...

    def samples(self, *samples: object) -> None: ...

    def flush(self) -> None: ...


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    text = (folder / METRICS).read_text(encoding="utf-8")
    # by line ends alone: a text may hold what Python takes for others
    return [json.loads(line) for line in text.split("\n") if line]


def losses_of(folder: Path, *, held_out: bool) -> Losses:
    """What a run's metrics.jsonl says so far."""
    losses = Losses(held_out)
    for row in read_metrics(folder):
        if row.get("loss") is not None:
            losses.add(row["step"], row["loss"])
        elif row.get("eval_loss") is not None:
            losses.measure(row["step"], row["eval_loss"])
    return losses


def held_out_losses(folder: Path) -> dict[str, float]:
    """The first and the last held-out loss of a run.

    Raises:
        WorkError: if its metrics.jsonl holds none any more.
    """
    losses = [row["eval_loss"] for row in read_metrics(folder) if "eval_loss" in row]
    if not losses:
        what = "holds no measurement any more: was it emptied or removed while the run stood still?"
        raise WorkError(f"{folder / METRICS} {what} Put it back, or start anew with resume=never")
    return {"first": losses[0], "last": losses[-1]}


def cut_back(metrics_path: Path, first_dropped: int) -> None:
    """Drop the rows of metrics.jsonl from step `first_dropped` on, a torn last row included."""
    if not metrics_path.is_file():
        return
    lines = metrics_path.read_bytes().split(b"\n")
    kept = [line.decode("utf-8") for line in lines if _is_row_before(line, first_dropped)]
    write_text(metrics_path, "".join(f"{line}\n" for line in kept))


def _is_row_before(line: bytes, step: int) -> bool:
    """Whether a line is a row of a run, whole and with numbers only, of an earlier step."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):  # the row that was being written when the run was stopped
        return False
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return False
    numbers = all(value is None or isinstance(value, int | float) for value in row.values())
    return numbers and int(row["step"]) < step


def _rates(before: Mapping[str, int], tallies: Mapping[str, int], seconds: float) -> str:
    """What was counted a second since `before`."""
    counted = {name: count for name, count in tallies.items() if name != SKIPPED}
    rates = {name: (count - before.get(name, 0)) / seconds for name, count in counted.items()}
    return "".join(f"  {rate:.0f} {name}/s" for name, rate in rates.items())
