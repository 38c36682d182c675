"""A loss or a gradient that is no number: the step, its samples, the likely cause, what to do."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import nn

from lora_scripts.device import Compute
from lora_scripts.errors import WorkError
from lora_scripts.schema import Config
from lora_scripts.tasks.task import Task
from lora_scripts.training.steps import Step

logger = logging.getLogger(__name__)

SKIPPED = "skipped"  # name of their count in the metrics
MOST_SKIPPED = 10  # steps of a run; more than that is no accident
MOST_NAMED = 8  # samples


def is_usable(loss: float, norm: float, scaler: torch.amp.GradScaler) -> bool:
    """Whether a step's gradients may be used.

    A gradient that overflowed in fp16 is the scaler's to mend as long as it can halve its scale: it
    leaves the step out by itself.
    """
    overflowed = scaler.is_enabled() and scaler.get_scale() >= 1.0
    return math.isfinite(loss) and (math.isfinite(norm) or overflowed)


def refuse(
    step: Step,
    numbers: tuple[float, float],
    task: Task,
    parameters: Mapping[str, nn.Parameter],
    compute: Compute,
) -> WorkError:
    """The error that ends the run; `numbers` are loss and gradient norm."""
    return WorkError(
        f"{_what(step, numbers, task)}. {_cause(step, task, parameters, compute)}. "
        "Nothing was saved after the last checkpoint: the same command goes on from there"
    )


def skip(
    step: Step, numbers: tuple[float, float], task: Task, config: Config, skipped: int
) -> bool:
    """Whether the step may be left out; says so. `skipped`: those left out before."""
    if config.on_nonfinite != "skip" or skipped >= MOST_SKIPPED:
        return False
    logger.warning(
        "%s. The step is left out (on_nonfinite: skip), number %d of at most %d",
        _what(step, numbers, task), skipped + 1, MOST_SKIPPED,
    )  # fmt: skip
    return True


def _what(step: Step, numbers: tuple[float, float], task: Task) -> str:
    loss, norm = numbers
    places = [task.place(i, step.key) for indices in step.micro_batches for i in indices]
    few = ", ".join(dict.fromkeys(places[:MOST_NAMED]))
    more = f" and {len(places) - MOST_NAMED} more" if len(places) > MOST_NAMED else ""
    return (
        f"step {step.after.step}: loss {loss}, gradient norm {norm}, in epoch "
        f"{step.key.epoch + 1} (samples: {few}{more})"
    )


def _cause(step: Step, task: Task, parameters: Mapping[str, nn.Parameter], compute: Compute) -> str:
    """What is looked at in turn: what was read, the matrices, the precision."""
    broken = [place for indices in step.micro_batches for place in _broken(task, indices, step)]
    if broken:
        return (
            f"What was read of {', '.join(broken)} is not finite: the picture, or its entry in "
            "cache_dir, is damaged. Replace the picture; delete the folder cache_dir, it is made "
            "again"
        )
    largest = max(float(p.detach().abs().max()) for p in parameters.values())
    if not math.isfinite(largest):
        return (
            "The LoRA's own matrices are not finite any more: the learning_rate is too high. Try a "
            "tenth, with lr_warmup_steps"
        )
    if compute.precision == "fp16":
        return (
            "Likely an overflow in fp16, which holds numbers up to 65,504: set mixed_precision: "
            "bf16, or no"
        )
    return (
        "What was read and the matrices are finite, so the model itself overflowed: lower "
        f"learning_rate (the largest number in the LoRA is {largest:.3g}), or set "
        "mixed_precision: no"
    )


def _broken(task: Task, indices: tuple[int, ...], step: Step) -> list[str]:
    """The samples of which something that is not finite was read."""
    found = []
    for index in indices:
        batch = task.load((index,), step.key)
        tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            found.append(task.place(index, step.key))
    return found
