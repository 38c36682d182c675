"""A run from beginning to end: preflight, data, task, training, export. The table of contents."""

from __future__ import annotations

import errno
import importlib.metadata
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts import __version__, collector, hosts, preflight
from lora_scripts import config as config_file
from lora_scripts.data.rows import AnyRows
from lora_scripts.errors import EXIT_INTERRUPTED, Problem, UserError, WorkError
from lora_scripts.logs import file_log, quiet, quiet_libraries
from lora_scripts.processes import ALONE, Processes, joined
from lora_scripts.schema import Config, ImageConfig, TextConfig

if TYPE_CHECKING:  # heavy imports happen in `run`, after the config has been checked
    from lora_scripts.device import Compute
    from lora_scripts.export.protocol import Export, Finished
    from lora_scripts.memory import Estimate
    from lora_scripts.run_folder import Start
    from lora_scripts.tasks.diffusion import DiffusionTask
    from lora_scripts.tasks.language import LanguageTask
    from lora_scripts.training.loop import Outcome

    AnyTask = DiffusionTask | LanguageTask

logger = logging.getLogger(__name__)

EXIT_DONE = 0


@dataclass(frozen=True)
class Ready:
    """A run that is ready for its first step.

    Attributes:
        config: With a number for `batch_size`.
        foretold: The memory that it will take, before anything was loaded.
        total_steps: Of the whole run.
        seconds: Of one micro-step; 0 where none was tried.
    """

    task: AnyTask
    config: Config
    compute: Compute
    foretold: Estimate
    total_steps: int
    seconds: float
    began: float


def run(config_path: Path, overrides: Sequence[str] = (), *, dry: bool = False) -> int:
    """Train the LoRA that a config describes. Returns the exit code: 0 done, 75 resumable.

    `dry` takes a step or a few and exports into a temporary folder, and foretells the whole. Where
    torchrun has started several processes, this is one of them.

    Raises:
        UserError: if config, data or model cannot be worked with; all problems at once.
        WorkError: if the work itself fails.
    """
    with joined() as processes:
        return _run_here(config_path, overrides, processes, dry=dry)


def _run_here(
    config_path: Path, overrides: Sequence[str], processes: Processes, *, dry: bool
) -> int:
    if not processes.is_first:
        quiet()
    draft = config_file.read(config_path, overrides)
    rows, own = preflight.inputs(draft)
    own = [*own, *preflight.of_processes(draft, processes, dry=dry)]
    problems = [*hosts.problems(draft, processes), *preflight.of_all(own, processes)]
    try:
        preflight.refuse(problems, draft)
    except UserError as error:
        if processes.is_first:
            raise
        processes.wait()  # until the first has told it, and ends this one
        raise SystemExit(error.exit_code) from None
    config = draft.checked()
    try:
        if dry:
            return _run_dry(config, draft.source.name, rows, problems)
        return _run(config, draft.source.name, rows, problems, processes)
    except UserError as error:
        raise UserError([draft.source.locate(problem) for problem in error.problems]) from None
    except OSError as error:
        if error.errno is None:  # a library's word for something else
            raise
        raise WorkError(_said_of_files(error, config.output_dir)) from error


def _said_of_files(error: OSError, output_dir: Path) -> str:
    """A file that could not be written or read: what happened, and what to do."""
    what = f"{error.filename or output_dir}: {error.strerror or error}"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    mend = "make room on that disk" if full else "mend that"
    return (
        f"{what}. What was saved before is untouched: {mend}, then the same command goes on from "
        "the last checkpoint"
    )


def _import_libraries(config: Config) -> None:
    """Import at once what the stages below import where they need it: that is faster."""
    with collector.importing():
        quiet_libraries()  # before they have something to say
        from lora_scripts import memory, telling  # noqa: F401

        match config:
            case ImageConfig():
                from lora_scripts.models import sd, sdxl  # noqa: F401
                from lora_scripts.tasks import diffusion  # noqa: F401
            case TextConfig():
                from lora_scripts.models import causal_lm  # noqa: F401
                from lora_scripts.tasks import language  # noqa: F401


def _run(
    config: Config,
    config_name: str,
    rows: AnyRows,
    warnings: Sequence[Problem],
    processes: Processes,
) -> int:
    preflight.environment(config.device, offload=config.offload)
    _import_libraries(config)

    from lora_scripts import disk, run_folder, telling
    from lora_scripts.run_folder import Start

    if not processes.is_first:
        start = processes.told_by_first(Start())
        return EXIT_DONE if start.finished else _train(config, config_name, rows, start, processes)
    with run_folder.in_use(config.output_dir):
        run_folder.make_room(config)
        with file_log(config.output_dir / "run.log"):
            start = run_folder.decide(config, processes.size)
            preflight.say(warnings)
            if not start.finished:
                disk.check(config, rows)
            processes.told_by_first(start)
            if start.finished:
                telling.finished_before(config)
                return EXIT_DONE
            return _train(config, config_name, rows, start, processes)


def _train(
    config: Config,
    config_name: str,
    rows: AnyRows,
    start: Start,
    processes: Processes,
) -> int:
    from lora_scripts import device, exhausted, telling
    from lora_scripts.training import loop

    with device.determinism(on=config.deterministic):
        ready = _prepare(config, rows, start, processes)
        export = _export_of(ready)
        with exhausted.answered(ready.config, rows, ready.compute, ready.foretold):
            outcome = loop.train(
                ready.task, ready.config, ready.compute, config.output_dir,
                export.checkpoint_files, start.checkpoint,
            )  # fmt: skip
            if outcome.interrupted:
                telling.interrupted(outcome)
                return EXIT_INTERRUPTED
            if not processes.is_first:
                if ready.compute.sharded:
                    export.follow()
                return EXIT_DONE
            telling.how_it_ended(config, outcome)
            finished = _finish(ready, config_name, outcome, export)
    telling.done(finished, export.hints(), time.time() - ready.began)
    return EXIT_DONE


def _run_dry(config: Config, config_name: str, rows: AnyRows, warnings: Sequence[Problem]) -> int:
    """All of a run but most of its steps, in a temporary folder."""
    preflight.environment(config.device, offload=config.offload)
    _import_libraries(config)

    from lora_scripts import device, disk, dry_run, exhausted, run_folder
    from lora_scripts.training import loop

    preflight.say(warnings)
    dry_run.say_standing(config, run_folder.standing(config))
    disk.check(config, rows)
    with dry_run.elsewhere(config) as moved, device.determinism(on=config.deterministic):
        ready = _prepare(moved, rows, run_folder.Start(), ALONE)
        export = _export_of(ready)
        started = time.time() - ready.began
        with exhausted.answered(ready.config, rows, ready.compute, ready.foretold):
            outcome = loop.train(
                ready.task, dry_run.shortened(ready.config, ready.seconds), ready.compute,
                moved.output_dir, export.checkpoint_files, None,
            )  # fmt: skip
            if outcome.interrupted:
                return EXIT_INTERRUPTED
            with outcome.clock.time("export"):
                _finish(ready, config_name, outcome, export)
    dry_run.say_outlook(config, ready.total_steps, outcome.clock, started)
    return EXIT_DONE


def _prepare(config: Config, rows: AnyRows, start: Start, processes: Processes) -> Ready:
    """Everything before the first step: device, memory, model, cache, adapters."""
    from lora_scripts import (
        batch_size,
        device,
        exhausted,
        inventory,
        memory_check,
        run_folder,
        telling,
    )
    from lora_scripts.tasks import build
    from lora_scripts.training import steps

    began = time.time()
    saved = start.checkpoint[1] if start.checkpoint else None
    precision = saved.precision if saved else config.mixed_precision
    compute = device.choose(
        config.device, precision, processes,
        sharded=config.distributed == "fsdp", offloaded=config.offload,
    )  # fmt: skip
    automatic = config.batch_size == "auto"
    with processes.in_turn():  # rows of text are tokenised here
        config = batch_size.settle(config, rows, compute, saved.config if saved else None)
        foretold = memory_check.before(config, rows, compute)
    config = batch_size.smallest(config, processes)
    with exhausted.answered(config, rows, compute, foretold):
        task = build.build(config, rows, compute)
        if start.checkpoint is not None:
            path, state = start.checkpoint
            run_folder.refuse_other_inputs(
                path, state, task.fingerprint,
                lambda: inventory.changes(path.parent.parent, task.inventory()),
            )  # fmt: skip
            logger.info("Going on from %s", path)
        anew = start.checkpoint is None or config.resume != "auto"
        if anew and processes.is_first:
            inventory.write(config.output_dir, task.inventory())
        with processes.in_turn():
            task.encode(telling.EncodingLog())
        task.attach()
        if compute.sharded:
            task.shard(compute)
        seconds = 0.0
        if saved is None:  # a run that goes on has fitted before
            may_shrink = automatic and config.distributed != "fsdp"  # all would try again
            config, peak = batch_size.tried(task, config, compute, may_shrink=may_shrink)
            memory_check.after(foretold, peak, config, rows, compute)
            config = batch_size.smallest(config, processes)
            task.batch = config.micro_batch
            seconds = peak.seconds
    total = steps.count(task, config, processes)
    telling.announce(task, config, compute, total)
    if saved is not None:
        telling.another_length(saved.total_steps, total, config)
    return Ready(task, config, compute, foretold, total, seconds, began)


def _export_of(ready: Ready) -> Export:
    """The layout that fits the task."""
    match ready.config:
        case ImageConfig():
            from lora_scripts.export.image import ImageExport
            from lora_scripts.tasks.diffusion import DiffusionTask

            assert isinstance(ready.task, DiffusionTask)
            return ImageExport(ready.task, ready.config, ready.compute, ready.began)
        case TextConfig():
            from lora_scripts.export.text import TextExport
            from lora_scripts.tasks.language import LanguageTask

            assert isinstance(ready.task, LanguageTask)
            return TextExport(ready.task, ready.config, ready.compute, ready.began)


def _finish(ready: Ready, config_name: str, outcome: Outcome, export: Export) -> Finished:
    """Write the finished files, prove them on a freshly read model, write card and record."""
    from lora_scripts import run_folder, telling
    from lora_scripts.export import card
    from lora_scripts.files import write_text
    from lora_scripts.models import lora
    from lora_scripts.training import log

    task, config, compute = ready.task, ready.config, ready.compute
    peak = _cuda_peak(compute)
    facts = {"trainable": lora.share(task.adapted), "data": task.describe()}
    fingerprint = dict(task.fingerprint)
    finding = log.losses_of(config.output_dir, held_out=task.held_out).finding()
    if finding and finding.kind == "overfitting" and outcome.exported != outcome.position:
        finding = None  # what is exported is the best already
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
        "finding": finding.text if finding else None,
        "files": [path.name for path in finished.paths],
        "fingerprint": fingerprint,
        **facts,
        "base_model": config.base_model,
        "device": telling.device_name(compute),
        "processes": compute.processes.size,
        "precision": compute.precision,
        "seconds": round(time.time() - ready.began, 1),
        "largest_difference_after_reload": finished.difference,
        "held_out_loss": log.held_out_losses(config.output_dir),
        "cuda_peak_reserved_bytes": peak,
        **_environment(),
    }
    card.write(config, config_name, record, export.card_usage())
    run_folder.write_record(config.output_dir, record)
    return finished


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
