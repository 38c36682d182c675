"""What makes two finished runs of one config equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from lora_scripts.training import checkpoint
from tests import runs
from tests.faults.cases import Case

RECORDED = ("steps", "last_step", "best", "skipped_steps", "files", "fingerprint", "held_out_loss")


def differences(case: Case, whole: Path, harmed: Path) -> list[str]:
    """What differs: exported weights bit for bit, checkpoints, metrics, TensorBoard, files."""
    one, other = case.output(whole), case.output(harmed)
    found = []
    if not _same_tensors(one, other, "*.safetensors"):
        found.append("the exported weights")
    if runs.metrics(one) != runs.metrics(other):
        found.append("metrics.jsonl")
    if board(one) != board(other):
        found.append(f"TensorBoard: {_other_tags(board(one), board(other))}")
    if _record(one) != _record(other):
        found.append("run.json")
    if _samples(one) != _samples(other):
        found.append("samples")
    names_matter = not case.variant.turns
    if _names(one, checkpoints=names_matter) != _names(other, checkpoints=names_matter):
        only = _names(one, checkpoints=names_matter) ^ _names(other, checkpoints=names_matter)
        found.append(f"the files: {sorted(only)}")
    return found + _checkpoints(one, other)


def _same_tensors(one: Path, other: Path, pattern: str) -> bool:
    names = sorted(path.name for path in one.glob(pattern))
    if not names or names != sorted(path.name for path in other.glob(pattern)):
        return False
    return all(equal(load_file(one / name), load_file(other / name)) for name in names)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """The same names, and the same bits."""
    same = a.keys() == b.keys() and all(a[key].dtype == b[key].dtype for key in a)
    return same and all(torch.equal(a[key], b[key]) for key in a)


def _checkpoints(one: Path, other: Path) -> list[str]:
    """Checkpoints of the same step hold the same: adapters, average, optimizer, scaler, best."""
    found = []
    for path in checkpoint.listed(one / "checkpoints"):
        twin = other / "checkpoints" / path.name
        if not twin.is_dir():
            continue
        a, b = checkpoint.read_state(path), checkpoint.read_state(twin)
        numbers = [(s.position, s.best, s.tallies, s.scaler, s.optimizer) for s in (a, b)]
        if numbers[0] != numbers[1] or not _same_tensors(path, twin, "*.safetensors"):
            found.append(f"checkpoint {path.name}")
    return found


def board(output: Path) -> dict[str, list[tuple[int, bytes]]]:
    """Curves, pictures, texts, histograms as (step, what is shown), as TensorBoard reads them."""
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: [(e.step, e.tensor_proto.SerializeToString()) for e in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }


def _other_tags(a: dict[str, Any], b: dict[str, Any]) -> str:
    tags = [tag for tag in {**a, **b} if a.get(tag) != b.get(tag)]
    steps = [[step for step, _ in shown.get(tags[0], [])] for shown in (a, b)]
    return f"{', '.join(tags[:4])} ({len(tags)} in all); steps of the first: {steps}"


def _samples(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("samples/*")}


def _names(output: Path, *, checkpoints: bool) -> set[str]:
    """All files and folders, TensorBoard's own names apart."""
    names = {path.relative_to(output).as_posix() for path in output.rglob("*")}
    left_out = ("tensorboard/",) if checkpoints else ("tensorboard/", "checkpoints/")
    return {name for name in names if not name.startswith(left_out)}


def _record(output: Path) -> dict[str, Any]:
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    return {key: record[key] for key in RECORDED}
