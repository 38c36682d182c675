"""`batch_size: auto`: as many samples at once as fit, the samples of a step staying what they are.

`gradient_accumulation_steps` says then how many samples make an optimizer step; of its divisors the
largest that fits becomes the batch, and what is left over is accumulated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from lora_scripts import memory
from lora_scripts.data.rows import AnyRows
from lora_scripts.device import Compute
from lora_scripts.errors import out_of_memory
from lora_scripts.memory import Peak
from lora_scripts.processes import Processes
from lora_scripts.schema import Config
from lora_scripts.tasks.task import Task

logger = logging.getLogger(__name__)


def settle(
    config: Config,
    rows: AnyRows,
    compute: Compute,
    saved: Mapping[str, Any] | None,
) -> Config:
    """The config with a number for `batch_size`, and the accumulation that goes with it.

    `saved`: the config of the checkpoint that the run goes on from; its batch is kept, so that the
    run's samples come in the same batches.
    """
    if config.batch_size != "auto":
        return config
    samples = config.gradient_accumulation_steps
    if saved is not None:
        return _with(config, int(saved["batch_size"]))
    chosen = memory.largest_batch(config, rows, compute, samples, memory.free(compute))
    logger.info(
        "batch_size: %d, accumulated %d times, is the largest of %d samples a step that fits",
        chosen, samples // chosen, samples,
    )  # fmt: skip
    return _with(config, chosen)


def tried(task: Task, config: Config, compute: Compute, *, may_shrink: bool) -> tuple[Config, Peak]:
    """One real micro-step; with `may_shrink` a smaller batch where that does not fit after all.

    Returns the config with the batch that fitted, and what the micro-step took.

    Raises:
        torch.OutOfMemoryError: if not even the smallest batch fits, or it may not shrink.
    """
    while True:
        try:
            return config, memory.micro_step(task, config, compute)
        except (MemoryError, RuntimeError) as error:
            smaller = next(_divisors_below(config), None) if may_shrink else None
            if smaller is None or not out_of_memory(error):
                raise
        config = _with(config, smaller)
        task.batch = smaller
        logger.info("That did not fit after all; batch_size: %d is tried", smaller)


def smallest(config: Config, processes: Processes) -> Config:
    """The config with the batch of the process that has found room for least."""
    found = min(processes.gathered(config.micro_batch))
    return config if found == config.micro_batch else _with(config, found)


def _divisors_below(config: Config) -> Iterator[int]:
    samples = config.micro_batch * config.gradient_accumulation_steps
    return (n for n in range(config.micro_batch - 1, 0, -1) if samples % n == 0)


def _with(config: Config, size: int) -> Config:
    samples = config.gradient_accumulation_steps
    if config.batch_size != "auto":
        samples *= config.micro_batch
    changes = {"batch_size": size, "gradient_accumulation_steps": samples // size}
    return config.model_copy(update=changes)
