"""Runs of the real pipeline in the test's own process, at toy size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_scripts import pipeline
from lora_scripts.config import Config, read
from lora_scripts.device import Compute, choose
from lora_scripts.preflight import inputs
from lora_scripts.tasks import build
from lora_scripts.tasks.diffusion import DiffusionTask
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


def run(base: Path, data: Path, folder: Path, **changes: Any) -> tuple[int, Path]:
    """A whole run. Returns the exit code and the output folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = toys.write_config(folder / "run.yaml", **values(base, data, folder, **changes))
    return pipeline.run(path), folder / "output" / "toy"


def task(
    base: Path, data: Path, folder: Path, **changes: Any
) -> tuple[DiffusionTask, Config, Compute]:
    """A task as the pipeline builds it: encoded, with its LoRA attached."""
    folder.mkdir(parents=True, exist_ok=True)
    path = toys.write_config(folder / "task.yaml", **values(base, data, folder, **changes))
    draft = read(path)
    rows, _ = inputs(draft)
    config = draft.checked()
    compute = choose(config.device, config.mixed_precision)
    built = build.build(config, rows, build.find_base(config.base_model), compute)
    built.encode(lambda what, done, total: None)
    built.attach()
    return built, config, compute


def metrics(output: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without their times."""
    rows = [
        json.loads(line)
        for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]
