"""The output folder of a run: who uses it, where it stands, and whether to go on from there."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_scripts import run_files
from lora_scripts.errors import Problem, UserError, user_error
from lora_scripts.files import replace
from lora_scripts.schema import Config, ImageConfig, TextConfig
from lora_scripts.training import checkpoint
from lora_scripts.training.checkpoint import State

logger = logging.getLogger(__name__)

# Keys that may differ between a checkpoint and the config that goes on from it: they change what
# is written, shown or how far a run goes, not the steps themselves. What data, base model (its VAE
# included) and init_lora are is told by their hashes, so their paths may change.
FREE_KEYS = frozenset(
    {
        "format_version", "base_model", "train_data_dir", "metadata_path", "datasets", "cache_dir",
        "epochs", "max_train_steps", "early_stopping_patience", "device",
        "mixed_precision", "gradient_checkpointing",
        "eval_steps", "histogram_steps", "sample_steps", "sample_prompts",
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


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Hold the folder for this run alone.

    Raises:
        UserError: if another run is writing to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise user_error(str(folder), "another run is writing to this output_dir now") from None
    try:
        yield
    finally:
        lock.release()


def decide(config: Config) -> Start:
    """What `resume` means for this config and this folder.

    Raises:
        UserError: if a checkpoint does not fit the config, with the differences and the ways on.
    """
    folder = config.output_dir
    checkpoint.tidy(folder / run_files.CHECKPOINTS)
    match config.resume:
        case "never":
            _move_aside(folder, config.output_name)
            return Start()
        case "auto":
            path = checkpoint.newest_good(folder / run_files.CHECKPOINTS, logger.warning)
            if path is None:
                return Start()
        case text:
            path = Path(text)
            if not (path / "state.json").is_file():
                what = f"found {text}; must be auto, never, or a folder checkpoints/step-NNNNNN"
                raise user_error("resume", what)
    state = checkpoint.read_state(path)
    _refuse_changes(config, path, state)
    finished = _is_finished(folder, config, state)
    is_newest = config.resume == "auto" and path == checkpoint.listed(path.parent)[-1]
    if is_newest and not finished:
        # a stop between writing this one and removing older ones may have left them
        checkpoint.rotate(path, state.best, config.save_total_limit)
    return Start((path, state), finished=finished)


def refuse_other_inputs(path: Path, state: State, fingerprint: Mapping[str, str]) -> None:
    """Data, base model and first matrices must be what the checkpoint was trained from.

    Raises:
        UserError: naming what changed.
    """
    names = {"data": "the data", "base_model": "the base model", "init_lora": "init_lora"}
    changed = [
        name for key, name in names.items() if state.fingerprint.get(key) != fingerprint.get(key)
    ]
    if changed:
        what = f"{' and '.join(changed)} changed since this checkpoint. {_ways_on()}"
        raise user_error(str(path), what)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """run.json: what this run was made of. Its being there says that the run is finished."""
    from lora_scripts.files import write_text

    write_text(folder / "run.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _is_finished(folder: Path, config: Config, state: State) -> bool:
    """Finished: exports are written and verified, and the config asks for no more steps."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    keys = ("epochs", "max_train_steps", "early_stopping_patience")
    same_length = all(state.config.get(key) == getattr(config, key) for key in keys)
    last_step = record.get("last_step", record["steps"])  # runs before early stopping had one only
    files_there = all((folder / name).is_file() for name in record["files"])
    return same_length and files_there and bool(last_step == state.position.step)


def _refuse_changes(config: Config, path: Path, state: State) -> None:
    now, then = config.model_dump(mode="json"), _in_todays_keys(state.config, type(config))
    changed = [key for key in now if key not in FREE_KEYS and now[key] != then[key]]
    problems = [
        Problem(key, f"found {now[key]}, but {path.name} was trained with {then[key]}")
        for key in changed
    ]
    if config.mixed_precision not in ("auto", state.precision):
        what = f"found {config.mixed_precision}, but {path.name} was trained with {state.precision}"
        problems.append(Problem("mixed_precision", what))
    if problems:
        raise UserError([*problems, Problem(str(config.output_dir), _ways_on())])


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
