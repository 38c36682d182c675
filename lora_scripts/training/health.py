"""What the losses of a run say of it: that it diverges, or that it learns its data by heart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

LONG = 50  # steps: a loss counts as high, or as fallen, if its median over so many is
FAR = 2.0  # times the median of the first LONG steps
WORSE = 1.2  # times the first held-out loss
RISES = 3  # measurements in a row above the best
RISEN = 1.02  # times the best held-out loss

Kind = Literal["diverging", "overfitting"]


@dataclass(frozen=True)
class Finding:
    """What is wrong, since when, and what to do."""

    kind: Kind
    text: str


@dataclass
class Losses:
    """The losses of a run so far: (step, loss) of each step, (step, held-out loss) of each look.

    `held_out`: whether what is measured is not learned from. Losses that are no number are left
    out.
    """

    held_out: bool
    training: list[tuple[int, float]] = field(default_factory=list)
    measured: list[tuple[int, float]] = field(default_factory=list)

    def add(self, step: int, loss: float) -> None:
        """The loss of a step."""
        if math.isfinite(loss):
            self.training.append((step, loss))

    def measure(self, step: int, loss: float) -> None:
        """A measurement."""
        if math.isfinite(loss):
            self.measured.append((step, loss))

    def finding(self) -> Finding | None:
        """What the losses say now, if they say something."""
        return self._diverging() or self._overfitting()

    def _diverging(self) -> Finding | None:
        """The training loss far above its start for long, or the measured one with it."""
        first, last = _ends(self.training)
        if first is None or last is None:
            return None
        measured = [loss for _, loss in self.measured]
        worse = len(measured) > RISES and min(measured[-RISES:]) > WORSE * measured[0]
        if last <= FAR * first and not (worse and last > first):
            return None
        text = (
            f"The run diverges: the median loss of the last {LONG} steps is {last:.4g}, that of "
            f"the first {LONG} was {first:.4g}. The learning_rate is too high: try a third or a "
            "tenth of it, with lr_warmup_steps; a checkpoint from before the rise is the better one"
        )
        return Finding("diverging", text)

    def _overfitting(self) -> Finding | None:
        """The held-out loss rising while the training loss falls."""
        if not self.held_out or len(self.measured) <= RISES:
            return None
        best_step, best = min(self.measured, key=lambda measured: measured[1])
        since = [loss for step, loss in self.measured if step > best_step]
        if len(since) < RISES or min(since[-RISES:]) <= RISEN * best:
            return None
        before = [loss for step, loss in self.training if step <= best_step][-LONG:]
        after = [loss for step, loss in self.training if step > best_step][-LONG:]
        if not before or not after or median(after) >= median(before):
            return None
        text = (
            f"The run overfits: since step {best_step} the held-out loss rose from {best:.4g} to "
            f"{since[-1]:.4g}, while the training loss fell from {median(before):.4g} to "
            f"{median(after):.4g}. Take the LoRA of step {best_step} (early_stopping_patience does "
            "so by itself); more data, lora_dropout, a lower lora_rank or fewer epochs help"
        )
        return Finding("overfitting", text)


def _ends(losses: Sequence[tuple[int, float]]) -> tuple[float, float] | tuple[None, None]:
    """The medians of the first and of the last LONG losses, once there are enough of both."""
    if len(losses) < 2 * LONG:
        return None, None
    values = [loss for _, loss in losses]
    return median(values[:LONG]), median(values[-LONG:])
