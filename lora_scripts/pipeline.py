"""A run from beginning to end: preflight, data, task, training, export. The table of contents."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts import __version__, preflight
from lora_scripts import config as config_file
from lora_scripts.errors import Problem, UserError, WorkError
from lora_scripts.logs import file_log, quiet_libraries
from lora_scripts.schema import Config, ImageConfig, TextConfig

if TYPE_CHECKING:  # heavy imports happen in `run`, after the config has been checked
    from lora_scripts.device import Compute
    from lora_scripts.export.protocol import Export
    from lora_scripts.run_folder import Start
    from lora_scripts.tasks.diffusion import DiffusionTask
    from lora_scripts.tasks.language import LanguageTask
    from lora_scripts.training.loop import Outcome

    AnyTask = DiffusionTask | LanguageTask

logger = logging.getLogger(__name__)

EXIT_DONE = 0
EXIT_INTERRUPTED = 75


def run(config_path: Path, overrides: Sequence[str] = ()) -> int:
    """Train the LoRA that a config describes. Returns the exit code: 0 done, 75 resumable.

    Raises:
        UserError: if config, data or model cannot be worked with; all problems at once.
        WorkError: if the work itself fails.
    """
    draft = config_file.read(config_path, overrides)
    rows, problems = preflight.inputs(draft)
    preflight.refuse(problems, draft)
    config = draft.checked()
    try:
        return _run(config, draft.source.name, rows, problems)
    except UserError as error:
        raise UserError([draft.source.locate(problem) for problem in error.problems]) from None
    except OSError as error:
        if error.errno is None:  # a library's word for something else
            raise
        raise WorkError(_said_of_files(error)) from error


def _said_of_files(error: OSError) -> str:
    """A file that could not be written or read: what happened, and what to do."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    mend = "make room on that disk" if full else "mend that"
    return (
        f"{what}. What was saved before is untouched: {mend}, then the same command goes on from "
        "the last checkpoint"
    )


def _run(
    config: Config, config_name: str, rows: Sequence[preflight.Row], warnings: Sequence[Problem]
) -> int:
    preflight.environment(config.device)

    from lora_scripts import run_folder

    with run_folder.in_use(config.output_dir):
        start = run_folder.decide(config)
        with file_log(config.output_dir / "run.log"):
            preflight.say(warnings)
            if start.finished:
                _say_finished(config)
                return EXIT_DONE
            return _train(config, config_name, rows, start)


def _train(config: Config, config_name: str, rows: Sequence[preflight.Row], start: Start) -> int:
    from lora_scripts import device, run_folder
    from lora_scripts.tasks import build
    from lora_scripts.training import loop

    quiet_libraries()
    began = time.time()
    precision = start.checkpoint[1].precision if start.checkpoint else config.mixed_precision
    compute = device.choose(config.device, precision)
    task = build.build(config, rows, compute)
    if start.checkpoint is not None:
        run_folder.refuse_other_inputs(*start.checkpoint, task.fingerprint)
        logger.info("Going on from %s", start.checkpoint[0])
    task.encode(_EncodingLog())
    task.attach()
    _announce(task, config, compute)
    export = _export_of(task, config, compute, began)

    outcome = loop.train(
        task, config, compute, config.output_dir, export.checkpoint_files, start.checkpoint
    )
    if outcome.interrupted:
        logger.warning(
            "Interrupted after step %d of %d. The same command goes on from there.",
            outcome.position.step,
            outcome.total_steps,
        )
        return EXIT_INTERRUPTED
    _say_how_it_ended(config, outcome)
    _finish(task, config, config_name, compute, outcome, export, began)
    return EXIT_DONE


def _export_of(task: AnyTask, config: Config, compute: Compute, began: float) -> Export:
    """The layout that fits the task."""
    match config:
        case ImageConfig():
            from lora_scripts.export.image import ImageExport
            from lora_scripts.tasks.diffusion import DiffusionTask

            assert isinstance(task, DiffusionTask)
            return ImageExport(task, config, compute, began)
        case TextConfig():
            from lora_scripts.export.text import TextExport
            from lora_scripts.tasks.language import LanguageTask

            assert isinstance(task, LanguageTask)
            return TextExport(task, config, compute, began)


def _finish(
    task: AnyTask,
    config: Config,
    config_name: str,
    compute: Compute,
    outcome: Outcome,
    export: Export,
    began: float,
) -> None:
    """Write the finished files, prove them on a freshly read model, write card and record."""
    from lora_scripts import run_folder
    from lora_scripts.export import card
    from lora_scripts.files import write_text
    from lora_scripts.models import lora
    from lora_scripts.training import log

    peak = _cuda_peak(compute)
    facts = {"trainable": lora.share(task.adapted), "data": task.describe()}
    fingerprint = dict(task.fingerprint)
    finished = export.finish(outcome.exported)
    logger.info(
        "Read back by %s: outputs equal the trained model's (%.1e)",
        finished.reader, finished.difference,
    )  # fmt: skip
    write_text(config.output_dir / "config.yaml", config_file.dump(config))
    record = {
        "steps": outcome.exported.step,
        "last_step": outcome.position.step,
        "best": asdict(outcome.best) if outcome.best else None,
        "skipped_steps": outcome.skipped,
        "files": [path.name for path in finished.paths],
        "fingerprint": fingerprint,
        **facts,
        "base_model": config.base_model,
        "device": _device_name(compute),
        "precision": compute.precision,
        "seconds": round(time.time() - began, 1),
        "largest_difference_after_reload": finished.difference,
        "held_out_loss": log.held_out_losses(config.output_dir),
        "cuda_peak_reserved_bytes": peak,
        **_environment(),
    }
    card.write(config, config_name, record, export.card_usage())
    run_folder.write_record(config.output_dir, record)
    logger.info("Done in %.0f s. The LoRA, ready to be used:", time.time() - began)
    for path in finished.paths:
        logger.info("  %s (%s)", path, _size(path.stat().st_size))
    for hint in export.hints():
        logger.info("  %s", hint)


def _say_how_it_ended(config: Config, outcome: Outcome) -> None:
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


def _announce(task: AnyTask, config: Config, compute: Compute) -> None:
    """What is about to happen, in numbers, before the first step."""
    from lora_scripts.models import lora
    from lora_scripts.training import steps

    total = steps.count(task, config)
    per_step = config.batch_size * config.gradient_accumulation_steps
    views = total * per_step / task.items
    epochs_end = config.max_train_steps is None or total < config.max_train_steps
    logger.info("Device %s, precision %s", _device_name(compute), compute.precision)
    kind = {"lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA"}[config.lora_type]
    for component, module in task.adapted.items():
        logger.info(
            "%s on %s: %s (rank %d, alpha %g, learning rate %g)",
            kind, component, lora.describe(module), config.lora_rank, config.lora_alpha,
            task.learning_rates[component],
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


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.0f} kB"


def _say_finished(config: Config) -> None:
    logger.info("This run is finished; nothing was done. Its files:")
    record = json.loads((config.output_dir / "run.json").read_text(encoding="utf-8"))
    for name in record["files"]:
        logger.info("  %s", config.output_dir / name)
    logger.info(
        "To train it further raise epochs; for another run name another output_dir; to start it "
        "anew: resume=never (the files are kept in a sub-folder)."
    )


class _EncodingLog:
    """Tells how the encoding goes: a line every few seconds and at the end."""

    SECONDS = 5.0

    def __init__(self) -> None:
        self._last_line = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last_line >= self.SECONDS:
            logger.info("Encoded for the cache: %d of %d %s", done, total, what)
            self._last_line = now


def _device_name(compute: Compute) -> str:
    import torch

    if compute.device.type == "cuda":
        return torch.cuda.get_device_name(compute.device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _cuda_peak(compute: Compute) -> int | None:
    """The largest memory that this run has reserved on the card so far."""
    import torch

    return torch.cuda.max_memory_reserved() if compute.device.type == "cuda" else None


def _environment() -> dict[str, Any]:
    packages = ("torch", "diffusers", "transformers", "peft", "safetensors")
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "lora_scripts": __version__,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
