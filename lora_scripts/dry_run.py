"""`--dry-run`: a few real steps and a real export elsewhere, and how long the run will take."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_scripts.run_folder import Start
from lora_scripts.schema import Config
from lora_scripts.telling import duration
from lora_scripts.training.clock import Clock

logger = logging.getLogger(__name__)

MORE_STEPS = 4  # where steps are short: the first is slower than the others
SHORT = 5.0  # seconds of a step


def say_standing(config: Config, start: Start) -> None:
    """Where a run of this config would begin."""
    if start.finished:
        logger.info("The run in %s is finished: train would do nothing", config.output_dir)
    elif start.checkpoint is not None:
        logger.info("train would go on from %s", start.checkpoint[0])
    logger.info("Dry run: nothing is written to %s", config.output_dir)


@contextmanager
def elsewhere(config: Config) -> Iterator[Config]:
    """The config with its output in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="lora-scripts-") as folder:
        run = Path(folder) / "run"
        run.mkdir()
        yield config.model_copy(update={"output_dir": run, "resume": "auto", "save_steps": None})


def shortened(config: Config, micro_batch_seconds: float) -> Config:
    """The config with as many steps as show how long one takes: one, or a few short ones."""
    step = micro_batch_seconds * config.gradient_accumulation_steps
    most = 1 if step > SHORT else MORE_STEPS
    planned = config.max_train_steps or most
    return config.model_copy(update={"max_train_steps": min(planned, most)})


def outlook(config: Config, total_steps: int, clock: Clock) -> dict[str, tuple[int, float]]:
    """How often each kind of work will be done in the whole run, and the seconds of each time.

    `config`: of the whole run; `clock`: of the dry one. Checkpoints of the best are not foreseen.
    """
    saves = {total_steps}
    if config.save_steps:
        saves |= set(range(config.save_steps, total_steps, config.save_steps))
    every = config.save_every_epochs
    more = config.epochs // every if every else 0
    times = {
        "step": total_steps,
        "evaluation": 2 + (total_steps - 1) // config.eval_steps,  # before the first, and the last
        "samples": 2 + (total_steps - 1) // config.sample_steps if config.sample_prompts else 0,
        "checkpoint": len(saves) + more,
        "export": 1,
    }
    return {what: (count, clock.each(what)) for what, count in times.items()}


def say_outlook(config: Config, total_steps: int, clock: Clock, started: float) -> None:
    """The time of the whole run; `started`: seconds until its first step, with a warm cache."""
    parts = outlook(config, total_steps, clock)
    total = started + sum(count * seconds for count, seconds in parts.values())
    told = ", ".join(
        f"{count:,} × {what} {duration(count * seconds)}"
        for what, (count, seconds) in parts.items()
        if count
    )
    logger.info("The dry run is over: steps, samples, checkpoint and export work")
    most = "at most " if config.early_stopping_patience else ""
    logger.info(
        "The whole run will take %sabout %s: %s to the first step, %s",
        most, duration(total), duration(started), told,
    )  # fmt: skip
