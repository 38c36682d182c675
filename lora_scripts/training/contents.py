"""What a checkpoint keeps as tensors: adapters, their average, the optimizer's state; and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lora_scripts.errors import Problem, UserError, user_error
from lora_scripts.training.checkpoint import NO_STATE, Best, Position, State, name_of, read_state

ADAPTER = "adapter."  # before the names of the adapters as they are trained


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


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint.

    Raises:
        UserError: if they cannot be read.
    """
    try:
        return load_file(checkpoint / "training.safetensors")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        what = f"cannot be read: {error}"
        raise user_error(str(checkpoint / "training.safetensors"), what) from None


def unpack(
    checkpoint: Path,
    tensors: Mapping[str, torch.Tensor],
    state: State,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put a checkpoint's adapters and optimizer state back. `checkpoint`: its name in errors.

    Raises:
        UserError: if the checkpoint belongs to other layers or another rank.
    """
    put_adapters(checkpoint, tensors, parameters)
    entries: dict[int, dict[str, Any]] = {}
    for index, name in enumerate(parameters):
        prefix = f"optimizer.{name}."
        fields = _numbers_of(checkpoint, state, name) | {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix) and "." not in key.removeprefix(prefix)
        }
        entries[index] = _nested(fields)
    indices = iter(range(len(parameters)))
    try:
        groups = [
            {**saved, "params": [next(indices) for _ in group["params"]]}
            for saved, group in zip(state.optimizer["groups"], optimizer.param_groups, strict=True)
        ]
        optimizer.load_state_dict(
            {"state": {i: e for i, e in entries.items() if e}, "param_groups": groups}
        )
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        what = f"its optimizer's state does not fit this config ({error})"
        raise user_error(str(checkpoint), what) from None


def _numbers_of(checkpoint: Path, state: State, name: str) -> dict[str, Any]:
    """The plain numbers of an optimizer's state for one parameter."""
    of_all = state.optimizer.get("state")
    fields = of_all.get(name, {}) if isinstance(of_all, dict) else None
    if not isinstance(fields, dict):
        raise user_error(str(checkpoint / "state.json"), f"{NO_STATE}: optimizer.state")
    return dict(fields)


def put_adapters(
    checkpoint: Path,
    tensors: Mapping[str, torch.Tensor],
    parameters: Mapping[str, nn.Parameter],
    kept: str = ADAPTER,
) -> None:
    """Put a checkpoint's adapters back: those whose names begin with `kept`.

    Raises:
        UserError: if the checkpoint belongs to other layers or another rank.
    """
    adapters = {n.removeprefix(kept): t for n, t in tensors.items() if n.startswith(kept)}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    if {name: tuple(t.shape) for name, t in adapters.items()} != shapes:
        what = "its adapters do not have the layers and shapes of this config"
        raise user_error(str(checkpoint), what)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(adapters[name])


def go_back(
    folder: Path, best: Best, parameters: Mapping[str, nn.Parameter], kept: str = ADAPTER
) -> Position:
    """Put the adapters of the best checkpoint back. Returns where the run stood there.

    Raises:
        UserError: if that checkpoint is missing or damaged.
    """
    path = folder / name_of(best.step)
    try:
        position = read_state(path).position
    except UserError as error:
        what = (
            "the best checkpoint is lost; with early_stopping_patience=null the last step is taken"
        )
        raise UserError([*error.problems, Problem("early_stopping_patience", what)]) from None
    put_adapters(path, read_tensors(path), parameters, kept)
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
