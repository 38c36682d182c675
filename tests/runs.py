"""Runs of the real pipeline in the test's own process, at toy size."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from lora_scripts import pipeline
from lora_scripts.config import read
from lora_scripts.data.rows import AnyRows
from lora_scripts.device import Compute, choose
from lora_scripts.memory import foretelling
from lora_scripts.preflight import inputs
from lora_scripts.schema import Config, ImageConfig
from lora_scripts.tasks import build
from lora_scripts.tasks.diffusion import DiffusionTask
from lora_scripts.tasks.language import LanguageTask
from lora_scripts.tasks.task import Batch, Key, Loss
from tests import toys


def values(base: Path, data: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """The keys of a short run in float32."""
    return {
        "base_model": str(base),
        "train_data_dir": str(data),
        "output_dir": str(folder / "output" / "toy"),
        "cache_dir": str(folder / "cache"),
        "resolution": 64,
        "lora_rank": 4,
        "learning_rate": 1e-2,
        "batch_size": 2,
        "epochs": 2,
        "mixed_precision": "no",
        **changes,
    }


def text_values(base: Path, data: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """The keys of a short run on text in float32."""
    return {
        "task_type": "text-generation",
        "base_model": str(base),
        "train_data_dir": str(data),
        "output_dir": str(folder / "output" / "toy"),
        "cache_dir": str(folder / "cache"),
        "max_seq_length": 256,
        "lora_rank": 4,
        "learning_rate": 1e-2,
        "lr_warmup_steps": 0,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "epochs": 2,
        "validation_split": 0,
        "mixed_precision": "no",
        **changes,
    }


def run(base: Path, data: Path, folder: Path, **changes: Any) -> tuple[int, Path]:
    """A whole run on pictures. Returns the exit code and the output folder."""
    return _run(folder, values(base, data, folder, **changes))


def run_text(base: Path, data: Path, folder: Path, **changes: Any) -> tuple[int, Path]:
    """A whole run on texts. Returns the exit code and the output folder."""
    return _run(folder, text_values(base, data, folder, **changes))


def task(
    base: Path, data: Path, folder: Path, **changes: Any
) -> tuple[DiffusionTask, Config, Compute]:
    """A task on pictures as the pipeline builds it: encoded, with its LoRA attached."""
    built, config, compute = _build(folder, values(base, data, folder, **changes))
    assert isinstance(built, DiffusionTask)
    return built, config, compute


def text_task(
    base: Path, data: Path, folder: Path, **changes: Any
) -> tuple[LanguageTask, Config, Compute]:
    """A task on texts as the pipeline builds it: tokenised, with its LoRA attached."""
    built, config, compute = _build(folder, text_values(base, data, folder, **changes))
    assert isinstance(built, LanguageTask)
    return built, config, compute


def _run(folder: Path, values: dict[str, Any]) -> tuple[int, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    path = toys.write_config(folder / "run.yaml", **values)
    with _shapes_known():
        return pipeline.run(path), folder / "output" / "toy"


def _build(
    folder: Path, values: dict[str, Any]
) -> tuple[DiffusionTask | LanguageTask, Config, Compute]:
    folder.mkdir(parents=True, exist_ok=True)
    draft = read(toys.write_config(folder / "task.yaml", **values))
    rows, _ = inputs(draft)
    config = draft.checked()
    compute = choose(config.device, config.mixed_precision)
    built = build.build(config, rows, compute)
    built.encode(lambda what, done, total: None)
    built.attach()
    return built, config, compute


# what the memory of a run does not depend on
SHAPELESS = {"output_dir", "cache_dir", "epochs", "max_train_steps", "save_steps", "eval_steps",
             "learning_rate", "resume"}  # fmt: skip
_told: dict[tuple[object, ...], foretelling.Found] = {}


@contextmanager
def _shapes_known() -> Iterator[None]:
    """Within this context the memory of picture runs of the same shapes is found once for all.

    It takes two fifths of a run at toy size; `tests.memory` has it anew each time.
    """
    find = foretelling._images

    def found(config: ImageConfig, rows: AnyRows, compute: Compute) -> foretelling.Found:
        folders = [Path(config.base_model), *(Path(part.path) for _, part in rows.parts)]
        files = [path for folder in folders for path in [folder, *sorted(folder.rglob("*"))]]
        stamps = [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        key = (config.model_dump_json(exclude=SHAPELESS), *stamps, str(compute))
        if key not in _told:
            _told[key] = find(config, rows, compute)
        return _told[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foretelling, "_images", found)
        yield


@contextmanager
def terminated(kind: type[DiffusionTask] | type[LanguageTask], loss: int) -> Iterator[None]:
    """Within this context SIGTERM comes in the middle of training, at the loss of this number."""
    original: Any = kind.loss
    calls = 0

    def interrupted(task: Any, batch: Batch, key: Key) -> Loss:
        nonlocal calls
        calls += key.split == "train" and is_training()
        if calls == loss:
            signal.raise_signal(signal.SIGTERM)
            calls += 1
        found: Loss = original(task, batch, key)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "loss", interrupted)
        yield


def is_training() -> bool:
    """Whether a loss is of the training itself, not of the micro-step that measures memory."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_qualname.startswith("Learner."):
            return True
        frame = frame.f_back
    return False


def metrics(output: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without their times."""
    rows = [
        json.loads(line)
        for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]
