"""Checkpoints: written whole or not at all, verified by checksums, rotated, read without pickle.

A checkpoint is a folder `step-000100` with

    training.safetensors   adapters in float32, their moving average, the optimizer's state
    NAME-000100.safetensors  the adapter as a ready file in the final layout
    state.json             where the run stands, its config, checksums of the other files and of
                           itself
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from lora_scripts import tensor_files
from lora_scripts.errors import Problem, UserError, user_error
from lora_scripts.files import file_hash, replace, sync, write_text

# 5: processes; 4: OWN_SUM; 3: may hold a moving average, and optimizer states that are maps
FORMAT_VERSION = 5
OWN_SUM = "state_sha256"  # what state.json says, without this key
# What a format has brought, and what it was before
ADDED: dict[int, dict[str, Any]] = {
    2: {"best": None, "tallies": {}, "passing": False},
    5: {"processes": 1},
}
FOLDER_NAME = re.compile(r"step-(\d{6,})")
NO_STATE = "does not hold what it must; the checkpoint is damaged, or not made by this program"
HALF = re.compile(r"\.step-\d{6,}\.(tmp|removed-\d+)")  # left by a stop while writing or removing


@dataclass(frozen=True)
class Position:
    """Where a run stands: everything that is not a function of the config."""

    step: int = 0  # optimizer steps taken
    epochs_done: int = 0
    batches_done: int = 0  # micro-batches taken of the epoch under way
    samples: int = 0  # samples seen since the start


@dataclass(frozen=True)
class Best:
    """The lowest held-out loss so far, and how many measurements came since without a lower one."""

    step: int
    loss: float
    waited: int = 0


def judged(best: Best | None, step: int, loss: float) -> Best:
    """The best after one more measurement."""
    if best is None or loss < best.loss:
        return Best(step, loss)
    return Best(best.step, best.loss, best.waited + 1)


@dataclass(frozen=True)
class State:
    """What `state.json` holds.

    Attributes:
        passing: Saved though it was not due: the best, or at a stop.
        processes: How many took part in each step.
    """

    position: Position
    best: Best | None
    tallies: Mapping[str, int]
    passing: bool
    processes: int
    total_steps: int
    precision: str
    scaler: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    config: Mapping[str, Any]
    fingerprint: Mapping[str, str]


def write(
    folder: Path,
    state: State,
    tensors: Mapping[str, torch.Tensor],
    write_adapter: Callable[[Path], list[Path]],
    limit: int | None,
) -> Path:
    """Write `folder/step-NNNNNN`, then remove the oldest beyond `limit`. Returns its path.

    The best checkpoint stays whatever `limit` says; one that was only saved for being the best
    goes when a better one is there.
    """
    name = name_of(state.position.step)
    temporary = folder / f".{name}.tmp"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    tensor_files.save(temporary / "training.safetensors", tensors)
    write_adapter(temporary)
    files = sorted(path for path in temporary.iterdir())
    for path in files:
        sync(path)
    values = {
        "format_version": FORMAT_VERSION,
        **asdict(state),
        "sha256": {path.name: file_hash(path) for path in files},
    }
    values[OWN_SUM] = _sum_of(json.loads(json.dumps(values)))
    text = json.dumps(values, indent=2, ensure_ascii=False)
    write_text(temporary / "state.json", text)
    sync(temporary)
    target = folder / name
    if target.exists():
        shutil.rmtree(target)
    replace(temporary, target)
    sync(folder)
    rotate(target, state.best, limit)
    return target


def rotate(newest: Path, best: Best | None, limit: int | None) -> None:
    """Remove the checkpoints that a new one makes superfluous."""
    for old in superseded(newest.parent, newest, best, limit):
        _remove(old)


def tidy(folder: Path) -> None:
    """Remove what a stop in the middle of writing or removing a checkpoint has left."""
    if folder.is_dir():
        for path in folder.iterdir():
            if HALF.fullmatch(path.name):
                shutil.rmtree(path)


def name_of(step: int) -> str:
    """The folder name of the checkpoint after `step`."""
    return f"step-{step:06d}"


def superseded(folder: Path, newest: Path, best: Best | None, limit: int | None) -> list[Path]:
    """The checkpoints that may go now. Later ones than `newest` are of a run that was gone back in.

    They are written anew when their step comes.
    """
    kept_name = name_of(best.step) if best else None
    until_now = listed(folder)
    earlier = until_now[: until_now.index(newest)]
    others = [path for path in earlier if path.name != kept_name]
    passing = [path for path in others if _is_passing(path)]
    due = [path for path in others if path not in passing]
    room = limit - 1 if limit else len(due)
    return passing + due[: max(0, len(due) - room)]


def _is_passing(checkpoint: Path) -> bool:
    """A checkpoint whose state cannot be read is not ours to remove early."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(state, dict) and bool(state.get("passing", False))


def listed(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if FOLDER_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def read_state(checkpoint: Path) -> State:
    """Read and verify a checkpoint's state.

    Raises:
        UserError: if a file is missing or does not match its checksum, or the format is unknown.
    """
    try:
        text = (checkpoint / "state.json").read_text(encoding="utf-8")
        values = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        what = f"is no usable checkpoint: {error}"
        raise user_error(str(checkpoint / "state.json"), what) from None
    if not isinstance(values, dict):
        raise user_error(str(checkpoint / "state.json"), NO_STATE)
    found: Any = values.get("format_version")
    if found not in range(1, FORMAT_VERSION + 1):
        what = f"has format_version {found}; this version reads 1 to {FORMAT_VERSION}"
        raise user_error(str(checkpoint / "state.json"), what)
    if found >= 4 and values.get(OWN_SUM) != _sum_of(values):
        what = "is damaged: its checksum is not the one noted in it"
        raise user_error(str(checkpoint / "state.json"), what)
    for version, added in ADDED.items():
        if found < version:
            values |= added
    there = {path.name for path in checkpoint.iterdir()}
    for name, expected in _sums(checkpoint, values).items():
        path = checkpoint / name
        if name not in there:
            raise user_error(str(path), "is missing from the checkpoint")
        if file_hash(path) != expected:
            raise user_error(
                str(path), "is damaged: its checksum is not the one noted in state.json"
            )
    return _state_of(checkpoint, values)


def _sums(checkpoint: Path, values: Mapping[str, Any]) -> dict[str, str]:
    """The checksums of the files beside state.json, by their names."""
    sums = values.get("sha256")
    if not isinstance(sums, dict) or any(Path(name).name != name for name in sums):
        raise user_error(str(checkpoint / "state.json"), NO_STATE)
    return sums


def _state_of(checkpoint: Path, values: Mapping[str, Any]) -> State:
    """Every value of the kind that it must be; what else stands there is passed over."""
    try:
        state = TypeAdapter(State).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise user_error(str(checkpoint / "state.json"), f"{NO_STATE}: {place}") from None
    if min(asdict(state.position).values()) < 0:
        raise user_error(str(checkpoint / "state.json"), f"{NO_STATE}: position")
    if state.processes < 1:
        raise user_error(str(checkpoint / "state.json"), f"{NO_STATE}: processes")
    return state


def _sum_of(values: Mapping[str, Any]) -> str:
    """SHA-256 of what a state.json says, whatever its spaces and the order of its keys."""
    said = {key: value for key, value in values.items() if key != OWN_SUM}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def newest_good(folder: Path, say: Callable[[str], None], *, with_best: bool) -> Path | None:
    """The newest checkpoint whose checksums hold; damaged ones are named aloud and passed over.

    `with_best`: the best one that it points at must be good, too, as it may be what is exported;
    from an earlier one it is made again. One that is not there any more gave way to a better one.

    Raises:
        UserError: if there are checkpoints but none is good. A run never starts anew in silence.
    """
    problems: list[Problem] = []
    for checkpoint in reversed(listed(folder)):
        try:
            best = read_state(checkpoint).best
            if with_best and best is not None and (folder / name_of(best.step)).is_dir():
                read_state(folder / name_of(best.step))
        except UserError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            say(f"Checkpoint {checkpoint.name} is not usable, trying the one before: {error}")
            continue
        return checkpoint
    if not problems:
        return None
    ways = (
        "put a good copy back; or set resume=never to start anew (what is here is kept beside it)"
    )
    if with_best:
        ways += "; or early_stopping_patience=null, if the best checkpoint alone is damaged"
    raise UserError(
        [*problems, Problem(str(folder), f"no checkpoint here is usable. Ways on: {ways}")]
    )


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that a stop in the middle leaves no half of it under its name."""
    grave = checkpoint.with_name(f".{checkpoint.name}.removed-{os.getpid()}")
    replace(checkpoint, grave)
    shutil.rmtree(grave)
