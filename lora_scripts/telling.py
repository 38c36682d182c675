"""What a run says of itself in the log: what is about to happen, how it ended, its files."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lora_scripts.device import Compute
from lora_scripts.export.protocol import Finished
from lora_scripts.models import lora
from lora_scripts.schema import Config
from lora_scripts.training import steps
from lora_scripts.training.loop import Outcome

if TYPE_CHECKING:
    from lora_scripts.tasks.diffusion import DiffusionTask
    from lora_scripts.tasks.language import LanguageTask

logger = logging.getLogger(__name__)

KINDS = {"lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA"}


def announce(
    task: DiffusionTask | LanguageTask, config: Config, compute: Compute, total: int
) -> None:
    """What is about to happen, in numbers, before the first step. `total`: steps of the run."""
    per_step = config.micro_batch * steps.at_once(config, compute.processes)
    views = total * per_step / task.items
    epochs_end = config.max_train_steps is None or total < config.max_train_steps
    logger.info("Device %s, precision %s", device_name(compute), compute.precision)
    for component, module in task.adapted.items():
        logger.info(
            "%s on %s: %s (rank %d, alpha %g, learning rate %g)",
            KINDS[config.lora_type], component, lora.describe(module), config.lora_rank,
            config.lora_alpha, task.learning_rates[component],
        )  # fmt: skip
    logger.info("Trainable: %s", lora.share(task.adapted))
    logger.info("Data: %s", task.describe())
    logger.info(
        "%d steps of up to %d samples, ended by %s: each sample is seen about %.0f times",
        total, per_step, "epochs" if epochs_end else "max_train_steps", views,
    )  # fmt: skip
    advice = task.advice(total, views)
    if advice:
        logger.warning("%s", advice)


def another_length(then: int, now: int, config: Config) -> None:
    """That a run which goes on is longer or shorter than it was, where its rates follow from that.

    `then`, `now`: steps of the whole run.
    """
    follows = config.lr_scheduler != "constant" or config.lr_warmup_steps is None
    if then != now and follows:
        logger.warning(
            "The checkpoint is of a run of %d steps, this one has %d: from here on the learning "
            "rate follows the new length (lr_scheduler: %s, lr_warmup_steps: %s). What comes out "
            "is not what a run of this length from the beginning would give",
            then, now, config.lr_scheduler, config.lr_warmup_steps,
        )  # fmt: skip


def how_it_ended(config: Config, outcome: Outcome) -> None:
    """Steps left out, an early end, which step's LoRA it is."""
    best, last = outcome.best, outcome.position.step
    if outcome.skipped:
        logger.warning(
            "Steps left out because their loss or gradient was no number: %d; run.log names them "
            "and their samples", outcome.skipped,
        )  # fmt: skip
    if last < outcome.total_steps:
        logger.info(
            "Ended after step %d of %d: the held-out loss has not fallen for %d measurements",
            last, outcome.total_steps, config.early_stopping_patience,
        )  # fmt: skip
    if best is None:
        return
    if outcome.exported.step == best.step:
        logger.info("The LoRA is that of step %d: held-out loss %.5f", best.step, best.loss)
    else:
        logger.info(
            "The held-out loss was lowest after step %d (%.5f): that checkpoint is kept, too",
            best.step, best.loss,
        )  # fmt: skip


def done(finished: Finished, hints: Sequence[str], seconds: float) -> None:
    """The files, and how they are used."""
    logger.info("Done in %.0f s. The LoRA, ready to be used:", seconds)
    for path in finished.paths:
        logger.info("  %s (%s)", path, size(path.stat().st_size))
    for hint in hints:
        logger.info("  %s", hint)


def interrupted(outcome: Outcome) -> None:
    """Where it stands, and that it goes on from there."""
    logger.warning(
        "Interrupted after step %d of %d. The same command goes on from there.",
        outcome.position.step,
        outcome.total_steps,
    )


def finished_before(config: Config) -> None:
    """That there was nothing to do, and what could be."""
    logger.info("This run is finished; nothing was done. Its files:")
    record = json.loads((config.output_dir / "run.json").read_text(encoding="utf-8"))
    for name in record["files"]:
        logger.info("  %s", config.output_dir / name)
    logger.info(
        "To train it further raise epochs; for another run name another output_dir; to start it "
        "anew: resume=never (the files are kept in a sub-folder)."
    )


class EncodingLog:
    """Tells how the encoding goes: a line every few seconds and at the end."""

    SECONDS = 5.0

    def __init__(self) -> None:
        self._last_line = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last_line >= self.SECONDS:
            logger.info("Encoded for the cache: %d of %d %s", done, total, what)
            self._last_line = now


def device_name(compute: Compute) -> str:
    """The card, or the CPU with its threads."""
    if compute.device.type == "cuda":
        return torch.cuda.get_device_name(compute.device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def size(count: int) -> str:
    """Bytes of a file for people."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """Seconds for people: `48 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
