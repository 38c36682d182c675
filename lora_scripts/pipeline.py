"""A run from beginning to end: preflight, data, task, training, export. The table of contents."""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import platform
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts import __version__, preflight
from lora_scripts import config as config_file
from lora_scripts.config import Config
from lora_scripts.errors import Problem, UserError
from lora_scripts.logs import file_log, quiet_libraries
from lora_scripts.run_files import DIFFUSERS_NAME

if TYPE_CHECKING:  # heavy imports happen in `run`, after the config has been checked
    from lora_scripts.device import Compute
    from lora_scripts.models.signature import Signature
    from lora_scripts.run_folder import Start
    from lora_scripts.tasks.diffusion import DiffusionTask
    from lora_scripts.training.loop import Outcome

logger = logging.getLogger(__name__)

EXIT_DONE = 0
EXIT_INTERRUPTED = 75
FEW_STEPS = 300
FEW_VIEWS = 15


def run(config_path: Path, overrides: Sequence[str] = ()) -> int:
    """Train the LoRA that a config describes. Returns the exit code: 0 done, 75 resumable.

    Raises:
        UserError: if config, data or model cannot be worked with; all problems at once.
        WorkError: if the work itself fails.
    """
    draft = config_file.read(config_path, overrides)
    rows, problems = preflight.inputs(draft)
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise UserError(errors)
    config = draft.checked()
    try:
        return _run(config, draft.source.name, rows, problems)
    except UserError as error:
        raise UserError([draft.source.locate(problem) for problem in error.problems]) from None


def _run(
    config: Config, config_name: str, rows: Sequence[preflight.Row], warnings: Sequence[Problem]
) -> int:
    preflight.environment(config.device)

    from lora_scripts import run_folder

    with run_folder.in_use(config.output_dir):
        start = run_folder.decide(config)
        with file_log(config.output_dir / "run.log"):
            for warning in warnings:
                logger.warning("%s", warning)
            if start.finished:
                _say_finished(config)
                return EXIT_DONE
            return _train(config, config_name, rows, start)


def _train(config: Config, config_name: str, rows: Sequence[preflight.Row], start: Start) -> int:
    from lora_scripts import device, run_folder
    from lora_scripts.export import image as export
    from lora_scripts.tasks import build
    from lora_scripts.training import loop

    quiet_libraries()
    began = time.time()
    precision = start.checkpoint[1].precision if start.checkpoint else config.mixed_precision
    compute = device.choose(config.device, precision)
    found = build.find_base(config.base_model)
    task = build.build(config, rows, found, compute)
    if start.checkpoint is not None:
        run_folder.refuse_other_inputs(*start.checkpoint, task.fingerprint)
        logger.info("Going on from %s", start.checkpoint[0])
    task.encode(_EncodingLog())
    task.attach()
    _announce(task, config, compute)

    outcome = loop.train(
        task,
        config,
        compute,
        config.output_dir,
        partial(export.write_checkpoint_file, task, config, began),
        start.checkpoint,
    )
    if outcome.interrupted:
        logger.warning(
            "Interrupted after step %d of %d. The same command goes on from there.",
            outcome.position.step,
            outcome.total_steps,
        )
        return EXIT_INTERRUPTED
    _export(task, config, config_name, compute, outcome, found, began)
    return EXIT_DONE


def _export(
    task: DiffusionTask,
    config: Config,
    config_name: str,
    compute: Compute,
    outcome: Outcome,
    found: Signature,
    began: float,
) -> None:
    """Write the finished files, prove them on a freshly read model, write card and record."""
    from lora_scripts import run_folder
    from lora_scripts.export import card, files
    from lora_scripts.export import image as export
    from lora_scripts.files import write_text
    from lora_scripts.models import lora
    from lora_scripts.tasks import build
    from lora_scripts.training import log

    paths = export.write_finished(task, config, began, outcome.position)
    peak = _cuda_peak(compute)
    facts = {"trainable": lora.share(task.adapted), "data": task.describe()}
    fingerprint = dict(task.fingerprint)
    reference = export.reference_output(task.family, files.DTYPES[config.save_dtype])
    task.release()
    gc.collect()
    difference = export.check_reload(
        reference, build.load_family(found, compute), config.output_dir
    )
    logger.info("Read back by diffusers: outputs equal the trained model's (%.1e)", difference)
    write_text(config.output_dir / "config.yaml", config_file.dump(config))
    record = {
        "steps": outcome.position.step,
        "files": [path.name for path in paths],
        "fingerprint": fingerprint,
        **facts,
        "base_model": config.base_model,
        "device": _device_name(compute),
        "precision": compute.precision,
        "seconds": round(time.time() - began, 1),
        "largest_difference_after_reload": difference,
        "held_out_loss": log.held_out_losses(config.output_dir),
        "cuda_peak_reserved_bytes": peak,
        **_environment(),
    }
    card.write(config, config_name, record)
    run_folder.write_record(config.output_dir, record)
    logger.info("Done in %.0f s. The LoRA, ready to be copied:", time.time() - began)
    for path in paths:
        logger.info("  %s (%s)", path, _size(path.stat().st_size))
    logger.info("  in a WebUI prompt: <lora:%s:0.8>; in diffusers: load_lora_weights(%r)",
                config.output_name, str(config.output_dir))  # fmt: skip


def _announce(task: DiffusionTask, config: Config, compute: Compute) -> None:
    """What is about to happen, in numbers, before the first step."""
    from lora_scripts.models import lora
    from lora_scripts.training import loop

    total = loop.count_steps(task, config)
    per_step = config.batch_size * config.gradient_accumulation_steps
    views = total * per_step / task.items
    epochs_end = config.max_train_steps is None or total < config.max_train_steps
    logger.info("Device %s, precision %s", _device_name(compute), compute.precision)
    for component, module in task.adapted.items():
        logger.info(
            "LoRA on %s: %s (rank %d, alpha %g)",
            component, lora.describe(module), config.lora_rank, config.lora_alpha,
        )  # fmt: skip
    logger.info("Trainable: %s", lora.share(task.adapted))
    logger.info("Data: %s", task.describe())
    logger.info(
        "%d steps of up to %d samples, ended by %s: each sample is seen about %.0f times",
        total, per_step, "epochs" if epochs_end else "max_train_steps", views,
    )  # fmt: skip
    if total < FEW_STEPS or views < FEW_VIEWS:
        logger.warning(
            "That is little: a LoRA seldom takes shape in fewer than %d steps or %d views of each "
            "sample. Raise epochs or repeats, or lower batch_size.", FEW_STEPS, FEW_VIEWS,
        )  # fmt: skip


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.0f} kB"


def _say_finished(config: Config) -> None:
    logger.info("This run is finished; nothing was done. Its files:")
    for name in (f"{config.output_name}.safetensors", DIFFUSERS_NAME):
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
