"""The toy runs that are harmed, one of each task, and what makes two runs of one equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import runs, text_toys, toys

IMAGE: dict[str, Any] = {
    "gradient_accumulation_steps": 2,
    "lora_dropout": 0.2,
    "random_flip": True,
    "caption_dropout": 0.2,
    "validation_split": 0.2,
    "ema_decay": 0.9,
    "epochs": 3,
    "save_steps": 2,
    "save_total_limit": 1,
    "eval_steps": 2,
    "histogram_steps": 3,
    "lr_scheduler": "cosine",
}
TEXT: dict[str, Any] = {
    "lora_dropout": 0.2,
    "epochs": 3,
    "batch_size": 3,
    "validation_split": 0.2,
    "early_stopping_patience": 4,
    "save_steps": 2,
    "save_total_limit": 1,
    "eval_steps": 1,
    "lr_scheduler": "cosine",
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "image": ("image", {}),
    "image, fp16": ("image", {"mixed_precision": "fp16"}),
    "image, Prodigy": ("image", {"optimizer": "prodigy", "learning_rate": 1.0}),
    "text": ("text", {}),
    "text, bf16 with accumulation": (
        "text", {"mixed_precision": "bf16", "gradient_accumulation_steps": 2}
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A run that can be started in any folder."""

    name: str
    run: Callable[[Path], int]  # below this folder; the exit code
    weights: str  # the exported file's name

    def output(self, folder: Path) -> Path:
        """The run's own folder."""
        return folder / "output" / "toy"


def make(work: Path, names: list[str]) -> list[Case]:
    """The toy bases and data below `work`, and the cases that use them."""
    base, data = toys.save_stable_diffusion(work / "sd"), toys.save_pictures(work / "pictures", 8)
    chat, rows = text_toys.save_model(work / "llama"), text_toys.write_jsonl(work / "rows.jsonl")
    return [_case(name, base, data, chat, rows) for name in names]


def _case(name: str, base: Path, data: Path, chat: Path, rows: Path) -> Case:
    kind, changes = VARIANTS[name]
    if kind == "image":
        options = {**IMAGE, **changes}
        weights = "pytorch_lora_weights.safetensors"
        return Case(name, lambda folder: runs.run(base, data, folder, **options)[0], weights)
    options = {**TEXT, **changes}
    weights = "adapter_model.safetensors"
    return Case(name, lambda folder: runs.run_text(chat, rows, folder, **options)[0], weights)


def differences(case: Case, whole: Path, harmed: Path) -> list[str]:
    """What differs in two finished runs: weights bit for bit, metrics, TensorBoard, files."""
    one, other = case.output(whole), case.output(harmed)
    found = []
    a, b = load_file(one / case.weights), load_file(other / case.weights)
    if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
        found.append("the exported weights")
    if runs.metrics(one) != runs.metrics(other):
        found.append("metrics.jsonl")
    if _scalars(one) != _scalars(other):
        found.append("TensorBoard's curves")
    if _names(one) != _names(other):
        found.append(f"the files: {sorted(_names(one) ^ _names(other))}")
    if _best(one) != _best(other):
        found.append("the best step in run.json")
    return found


def _scalars(output: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve as (step, value), as TensorBoard shows it."""
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def _names(output: Path) -> set[str]:
    """All files and folders, TensorBoard's own names apart."""
    names = {path.relative_to(output).as_posix() for path in output.rglob("*")}
    return {name for name in names if not name.startswith("tensorboard/")}


def _best(output: Path) -> Any:
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    return record["best"], record["steps"], record["last_step"]
