"""Checkpoints: written whole or not at all, verified by checksums, rotated, read without pickle.

A checkpoint is a folder `step-000100` with

    training.safetensors   adapters in float32, their moving average, the optimizer's state
    NAME-000100.safetensors  the adapter as a ready file in the final layout
    state.json             where the run stands, its config, checksums of the other files
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from lora_scripts import tensor_files
from lora_scripts.errors import UserError, user_error
from lora_scripts.files import file_hash, replace, sync, write_text

FORMAT_VERSION = 3  # 3: may hold a moving average, and optimizer states that are maps
ADAPTER = "adapter."  # before the names of the adapters as they are trained
ADDED_IN_2: dict[str, Any] = {"best": None, "tallies": {}, "passing": False}
FOLDER_NAME = re.compile(r"step-(\d{6,})")
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
    """What `state.json` holds. `passing`: saved for being the best only, not because it was due."""

    position: Position
    best: Best | None
    tallies: Mapping[str, int]
    passing: bool
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
    text = json.dumps(
        {
            "format_version": FORMAT_VERSION,
            **asdict(state),
            "sha256": {path.name: file_hash(path) for path in files},
        },
        indent=2,
        ensure_ascii=False,
    )
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
    """The checkpoints that may go now."""
    kept_name = name_of(best.step) if best else None
    others = [path for path in listed(folder) if path != newest and path.name != kept_name]
    passing = [path for path in others if _is_passing(path)]
    due = [path for path in others if path not in passing]
    room = limit - 1 if limit else len(due)
    return passing + due[: max(0, len(due) - room)]


def _is_passing(checkpoint: Path) -> bool:
    """A checkpoint whose state cannot be read is not ours to remove early."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(state.get("passing", False))


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
    except (OSError, ValueError) as error:
        what = f"is no usable checkpoint: {error}"
        raise user_error(str(checkpoint / "state.json"), what) from None
    if values.get("format_version") == 1:
        values |= {"format_version": 2, **ADDED_IN_2}
    if values.get("format_version") not in (2, FORMAT_VERSION):
        found = values.get("format_version")
        what = f"has format_version {found}; this version reads 1 to {FORMAT_VERSION}"
        raise user_error(str(checkpoint / "state.json"), what)
    for name, expected in values["sha256"].items():
        path = checkpoint / name
        if not path.is_file():
            raise user_error(str(path), "is missing from the checkpoint")
        if file_hash(path) != expected:
            raise user_error(
                str(path), "is damaged: its checksum is not the one noted in state.json"
            )
    plain = State.__dataclass_fields__.keys() - {"position", "best"}
    return State(
        position=Position(**values["position"]),
        best=Best(**values["best"]) if values["best"] else None,
        **{key: values[key] for key in plain},
    )


def newest_good(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose checksums hold; damaged ones are named aloud and passed over.

    Raises:
        UserError: if there are checkpoints but none is good. A run never starts anew in silence.
    """
    checkpoints = listed(folder)
    problems = []
    for checkpoint in reversed(checkpoints):
        try:
            read_state(checkpoint)
        except UserError as error:
            problems += error.problems
            say(f"Checkpoint {checkpoint.name} is not usable, trying the one before: {error}")
            continue
        return checkpoint
    if problems:
        raise UserError(problems)
    return None


def pack(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Adapters and optimizer as named tensors, and the optimizer's plain numbers.

    `parameters` must be in the order in which the optimizer was given them.
    """
    tensors = {f"{ADAPTER}{name}": p.detach().cpu() for name, p in parameters.items()}
    numbers: dict[str, Any] = {"state": {}, "groups": []}
    saved = optimizer.state_dict()
    for index, name in enumerate(parameters):
        for field, value in _flat(saved["state"].get(index, {})):
            if isinstance(value, torch.Tensor):
                # a copy: 8-bit states share their tables, which a file may not
                tensors[f"optimizer.{name}.{field}"] = value.detach().cpu().clone()
            else:
                numbers["state"].setdefault(name, {})[field] = value
    for group in saved["param_groups"]:
        numbers["groups"].append({k: v for k, v in group.items() if k != "params"})
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, numbers


def unpack(
    checkpoint: Path,
    state: State,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> dict[str, torch.Tensor]:
    """Put a checkpoint's adapters and optimizer state back. Returns all tensors of it.

    Raises:
        UserError: if the checkpoint belongs to other layers or another rank.
    """
    tensors = load_adapters(checkpoint, parameters)
    entries: dict[int, dict[str, Any]] = {}
    for index, name in enumerate(parameters):
        prefix = f"optimizer.{name}."
        fields = dict(state.optimizer["state"].get(name, {})) | {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix) and "." not in key.removeprefix(prefix)
        }
        entries[index] = _nested(fields)
    indices = iter(range(len(parameters)))
    groups = [
        {**saved, "params": [next(indices) for _ in group["params"]]}
        for saved, group in zip(state.optimizer["groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict(
        {"state": {i: e for i, e in entries.items() if e}, "param_groups": groups}
    )
    return tensors


def load_adapters(
    checkpoint: Path, parameters: Mapping[str, nn.Parameter], kept: str = ADAPTER
) -> dict[str, torch.Tensor]:
    """Put a checkpoint's adapters back: those whose names begin with `kept`.

    Returns all tensors of the checkpoint.

    Raises:
        UserError: if the checkpoint belongs to other layers or another rank.
    """
    tensors = load_file(checkpoint / "training.safetensors")
    adapters = {n.removeprefix(kept): t for n, t in tensors.items() if n.startswith(kept)}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    if {name: tuple(t.shape) for name, t in adapters.items()} != shapes:
        what = "its adapters do not have the layers and shapes of this config"
        raise user_error(str(checkpoint), what)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(adapters[name])
    return tensors


def go_back(
    folder: Path, best: Best, parameters: Mapping[str, nn.Parameter], kept: str = ADAPTER
) -> Position:
    """Put the adapters of the best checkpoint back. Returns where the run stood there.

    Raises:
        UserError: if that checkpoint is missing or damaged.
    """
    path = folder / name_of(best.step)
    position = read_state(path).position
    load_adapters(path, parameters, kept)
    return position


def _flat(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields of an optimizer's state; those of a map in it (bitsandbytes') as `map/field`."""
    for field, value in fields.items():
        if isinstance(value, dict):
            yield from ((f"{field}/{inner}", part) for inner, part in value.items())
        else:
            yield field, value


def _nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What `_flat` took apart, put together again."""
    whole: dict[str, Any] = {}
    for field, value in fields.items():
        outer, slash, inner = field.partition("/")
        if slash:
            whole.setdefault(outer, {})[inner] = value
        else:
            whole[field] = value
    return whole


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that a stop in the middle leaves no half of it under its name."""
    grave = checkpoint.with_name(f".{checkpoint.name}.removed-{os.getpid()}")
    replace(checkpoint, grave)
    shutil.rmtree(grave)
