"""The output folder of a run: who uses it, where it stands, and whether to go on from there."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_scripts import belonging, run_files
from lora_scripts.errors import Problem, UserError, user_error
from lora_scripts.files import replace
from lora_scripts.run_lock import in_use
from lora_scripts.schema import Config, ImageConfig, TextConfig
from lora_scripts.training import checkpoint
from lora_scripts.training.checkpoint import State

__all__ = ["Start", "decide", "in_use", "refuse_other_inputs", "standing", "write_record"]

logger = logging.getLogger(__name__)

ACCUMULATION = "gradient_accumulation_steps"
SHOWN = 8  # numbers of processes of which it is said what they would have to set
# Keys that may differ between a checkpoint and the config that goes on from it: they change what
# is written, shown or how far a run goes, not the steps themselves. What data, base model (its VAE
# included) and init_lora are is told by their hashes, so their paths may change.
FREE_KEYS = frozenset(
    {
        "format_version", "base_model", "train_data_dir", "metadata_path", "datasets", "cache_dir",
        "epochs", "max_train_steps", "early_stopping_patience", "device",
        "mixed_precision", "gradient_checkpointing",
        "eval_steps", "histogram_steps", "sample_steps", "sample_prompts",
        "deterministic", "distributed", "offload",
        "output_dir", "output_name", "save_steps", "save_every_epochs", "save_total_limit",
        "save_dtype", "resume", "strict_data", "on_nonfinite", "trust_remote_code", "vae",
        "cache_latents", "init_lora",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Where a run begins: anew, or at a checkpoint and its state; `finished` if all is done."""

    checkpoint: tuple[Path, State] | None = None
    finished: bool = False


def make_room(config: Config) -> None:
    """Tidy the folder up for a run: what a stop has left goes, with `resume: never` all that is."""
    checkpoint.tidy(config.output_dir / run_files.CHECKPOINTS)
    if config.resume == "never":
        _move_aside(config.output_dir, config.output_name)


def decide(config: Config, processes: int = 1) -> Start:
    """What `resume` means for this config and this folder.

    `processes`: how many go on together.

    Raises:
        UserError: if a checkpoint does not fit the config, with the differences and the ways on.
    """
    start = standing(config, processes)
    if start.checkpoint is None:
        return start
    path, state = start.checkpoint
    is_newest = config.resume == "auto" and path == checkpoint.listed(path.parent)[-1]
    if is_newest and not start.finished:
        # a stop between writing this one and removing older ones may have left them
        checkpoint.rotate(path, state.best, config.save_total_limit)
    return start


def standing(config: Config, processes: int | None = None) -> Start:
    """Where a run of this config begins; nothing is written.

    `processes`: how many go on together; None: as many as fit.

    Raises:
        UserError: if a checkpoint does not fit the config, with the differences and the ways on.
    """
    folder = config.output_dir
    match config.resume:
        case "never":
            return Start()
        case "auto":
            stops_early = config.early_stopping_patience is not None
            checkpoints = folder / run_files.CHECKPOINTS
            path = checkpoint.newest_good(checkpoints, logger.warning, with_best=stops_early)
            if path is None:
                return Start()
        case text:
            path = Path(text)
            if not (path / "state.json").is_file():
                what = f"found {text}; must be auto, never, or a folder checkpoints/step-NNNNNN"
                raise user_error("resume", what)
    state = checkpoint.read_state(path)
    _refuse_changes(config, path, state, processes)
    finished = _is_finished(folder, config, state)
    if not finished:
        _refuse_other_base(config, path, state)
    return Start((path, state), finished=finished)


def refuse_other_inputs(
    path: Path, state: State, fingerprint: Mapping[str, str], difference: Callable[[], str]
) -> None:
    """Data, base model and first matrices must be what the checkpoint was trained from.

    `difference`: what changed in the data, if that can be told; it is only called if they did.

    Raises:
        UserError: naming what changed.
    """
    names = {"data": "the data", "base_model": "the base model", "init_lora": "init_lora"}
    changed = [
        name for key, name in names.items() if state.fingerprint.get(key) != fingerprint.get(key)
    ]
    if not changed:
        return
    told = difference() if "the data" in changed else ""
    said = f": {told}" if told else ""
    what = f"{' and '.join(changed)} changed since this checkpoint{said}. {_ways_on()}"
    raise user_error(str(path), what)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """run.json: what this run was made of. Its being there says that the run is finished."""
    from lora_scripts.files import write_text

    write_text(folder / "run.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _is_finished(folder: Path, config: Config, state: State) -> bool:
    """Finished: exports are written and verified, and the config asks for no more steps."""
    path = folder / "run.json"
    if not path.is_file():
        return False
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        last_step = record.get("last_step", record["steps"])  # before early stopping: one only
        files_there = all((folder / name).is_file() for name in record["files"])
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        what = "is damaged; remove it, and the same command writes it and the exports again"
        raise user_error(str(path), what) from None
    keys = ("epochs", "max_train_steps", "early_stopping_patience")
    same_length = all(state.config.get(key) == getattr(config, key) for key in keys)
    return same_length and files_there and bool(last_step == state.position.step)


def _refuse_changes(config: Config, path: Path, state: State, processes: int | None) -> None:
    now = config.model_dump(mode="json")
    try:
        then = _in_todays_keys(state.config, type(config))
        other_step = _other_step(now, then, state.processes, processes)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
        what = "its config is not one of this program; the checkpoint is damaged"
        raise user_error(str(path / "state.json"), what) from None
    free = {*FREE_KEYS, ACCUMULATION}
    if now["batch_size"] == "auto":
        free.add("batch_size")  # the checkpoint's is kept
    changed = [key for key in now if key not in free and now[key] != then[key]]
    problems = [
        Problem(key, f"found {now[key]}, but {path.name} was trained with {then[key]}")
        for key in changed
    ]
    if other_step:
        what = f"found {now[ACCUMULATION]}, but {path.name} was trained with {other_step}"
        problems.append(Problem(ACCUMULATION, what))
    if config.mixed_precision not in ("auto", state.precision):
        what = f"found {config.mixed_precision}, but {path.name} was trained with {state.precision}"
        problems.append(Problem("mixed_precision", what))
    if problems:
        raise UserError([*problems, Problem(str(config.output_dir), _ways_on())])


def _refuse_other_base(config: Config, path: Path, state: State) -> None:
    """Before a base model is loaded its layers show whether the checkpoint can be of it.

    Whether it is that very model is told by its hash, once it is loaded (`refuse_other_inputs`).
    """
    base = belonging.of(config)
    if base is None:
        return
    try:
        belonging.check_checkpoint(path, base, str(state.config["base_model"]))
    except UserError as error:
        raise UserError([*error.problems, Problem("base_model", _ways_on())]) from None


def _other_step(
    now: Mapping[str, Any], then: Mapping[str, Any], before: int, processes: int | None
) -> str:
    """With what a step was trained that would take other micro-batches now; "" if it would not.

    N processes with an accumulation of k take in a step what one takes with N × k. `now`, `then`:
    a config's keys as plain values; `before`, `processes`: how many there were and are, if known.
    """
    # with `auto` the key counts samples, and the checkpoint's batch is kept
    unit = int(then["batch_size"]) if now["batch_size"] == "auto" else 1
    whole, found = before * int(then[ACCUMULATION]) * unit, now[ACCUMULATION]
    taken = found * (processes or whole // found)
    if taken == whole and found % unit == 0:
        return ""
    if before == processes == 1:
        return f"{whole}"
    was = f"{_so_many(before)} × {whole // before}"
    most = processes or SHOWN
    ways = [n for n in range(1, most + 1) if whole % (n * unit) == 0]
    if processes is None:
        return f"{was}: set " + ", ".join(f"{whole // n} with {_so_many(n)}" for n in ways)
    if processes in ways:
        return f"{was}: with {_so_many(processes)} set {ACCUMULATION}: {whole // processes}"
    fewer = ", ".join(map(str, ways))
    return f"{was}, which {_so_many(processes)} cannot share alike; as many can: {fewer}"


def _so_many(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def _in_todays_keys(
    config: Mapping[str, Any], schema: type[ImageConfig] | type[TextConfig]
) -> dict[str, Any]:
    """A checkpoint's config; keys that are newer than it at their defaults."""
    renamed = dict(config)
    if "target_modules" in renamed:  # until there were presets
        renamed["lora_targets"] = renamed.pop("target_modules") or "linear"
    newer = {key: value for key, value in _defaults(schema, renamed).items() if key not in renamed}
    return {**renamed, **newer}


def _defaults(schema: type[ImageConfig] | type[TextConfig], known: Mapping[str, Any]) -> Any:
    """What the keys are that were left out."""
    return schema.model_construct(**known).model_dump(mode="json", warnings=False)


def _ways_on() -> str:
    return (
        "Ways on: put the old values back to continue; or name another output_dir; or set "
        "resume=never to start anew (the earlier run is kept beside it)."
    )


def _move_aside(folder: Path, output_name: str) -> None:
    """An earlier run's files go to a sub-folder `earlier-N`, so that nothing is overwritten."""
    if not run_files.holds_a_run(folder):
        return
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    target = folder / f"earlier-{number}"
    target.mkdir()
    for path in run_files.of_run(folder, output_name):
        replace(path, target / path.name)
    logger.info("resume is never: the earlier run is now in %s", target)
