"""The toy runs that are harmed: both tasks, with what makes a run hard to go on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from lora_scripts import cli
from lora_scripts.training import checkpoint
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
    "sample_steps": 4,
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
    "histogram_steps": 3,
    "sample_steps": 4,
    "lr_scheduler": "cosine",
}
DRAWN = {"prompt": "a square", "steps": 2, "guidance_scale": 1.0}
ASKED = {"prompt": "What is number 3?", "max_new_tokens": 8, "temperature": 0.8}


@dataclass(frozen=True)
class Variant:
    """What a case changes of its task's keys.

    Attributes:
        changes: Keys of every start.
        first: Keys of an earlier, shorter run in the same folder, which the case goes on from.
        turns: Keys that each start takes the next value of; the checkpoints' names follow from
            them and are not compared.
        shows: What the undisturbed run must have gone through, from its output folder.
    """

    kind: Literal["image", "text"]
    changes: Mapping[str, Any] = field(default_factory=dict)
    first: Mapping[str, Any] | None = None
    turns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    shows: Callable[[Path], bool] = lambda output: True


def _last_state(output: Path) -> checkpoint.State:
    return checkpoint.read_state(checkpoint.listed(output / "checkpoints")[-1])


def _scaler_halved(output: Path) -> bool:
    """The scaler found an overflow: its scale is below the one it began with."""
    return bool(_last_state(output).scaler["scale"] < 2.0**16)


def _stopped_early(output: Path) -> bool:
    """The run ended before its last step, and took an earlier step's adapters."""
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    return bool(record["steps"] < record["last_step"] < _last_state(output).total_steps)


VARIANTS: dict[str, Variant] = {
    "image": Variant("image", {"sample_prompts": [DRAWN]}),
    "image, fp16 that overflows": Variant(
        "image",
        {"mixed_precision": "fp16", "lora_alpha": 6000},
        shows=_scaler_halved,
    ),
    "image, Prodigy": Variant("image", {"optimizer": "prodigy", "learning_rate": 1.0}),
    "image, text encoder, random crops": Variant(
        "image", {"train_text_encoder": True, "random_crop": True, "aspect_ratio_buckets": False}
    ),
    "image, Lion, gradient checkpointing": Variant(
        "image", {"optimizer": "lion", "learning_rate": 1e-3, "gradient_checkpointing": True}
    ),
    "image, then more epochs": Variant("image", {"lr_scheduler": "constant"}, first={"epochs": 2}),
    "image, three checkpoints": Variant("image", {"save_total_limit": 3}),
    "text": Variant("text", {"sample_prompts": [ASKED]}),
    "text, three checkpoints": Variant("text", {"save_total_limit": 3}),
    "text, bf16 with accumulation": Variant(
        "text", {"mixed_precision": "bf16", "gradient_accumulation_steps": 2}
    ),
    "text, unpacked, gradient checkpointing": Variant(
        "text", {"packing": False, "gradient_checkpointing": True, "lora_type": "dora"}
    ),
    "text, stopped early": Variant(
        "text",
        {
            "learning_rate": 0.05,
            "lora_alpha": 64,
            "early_stopping_patience": 2,
            "save_total_limit": 3,
        },
        shows=_stopped_early,
    ),
    "text, 8-bit Adam": Variant("text", {"optimizer": "adamw8bit"}),
    "text, other save_steps each time": Variant(
        "text", {"save_total_limit": None}, turns={"save_steps": (2, 3, 1, None)}
    ),
    "text, then more steps": Variant(
        "text", {"lr_scheduler": "constant"}, first={"max_train_steps": 5}
    ),
}


@dataclass(frozen=True)
class Case:
    """A run that can be started in any folder."""

    name: str
    base: Path
    data: Path

    @property
    def variant(self) -> Variant:
        return VARIANTS[self.name]

    @property
    def lengths(self) -> int:
        """How many runs it is in a row, each longer than the one before."""
        return 1 if self.variant.first is None else 2

    def start(self, folder: Path, *, start: int = 0, length: int | None = None) -> int:
        """The command, in this process. Returns its exit code; the arguments are `config`'s."""
        path = self.config(folder, start=start, length=length)
        return command(["train", "--config", str(path)])

    def config(self, folder: Path, *, start: int = 0, length: int | None = None) -> Path:
        """The config's file.

        `start`: which start of the run it is, from 0; `length`: 0 for the first of `lengths`.
        """
        values = self._values(folder)
        for key, turns in self.variant.turns.items():
            values[key] = turns[start % len(turns)]
        if self.variant.first is not None and length == 0:
            values |= self.variant.first
        folder.mkdir(parents=True, exist_ok=True)
        return toys.write_config(folder / "run.yaml", **values)

    def output(self, folder: Path) -> Path:
        """The run's own folder."""
        return folder / "output" / "toy"

    def _values(self, folder: Path) -> dict[str, Any]:
        changes = self.variant.changes
        if self.variant.kind == "image":
            return runs.values(self.base, self.data, folder, **{**IMAGE, **changes})
        return runs.text_values(self.base, self.data, folder, **{**TEXT, **changes})


def command(arguments: Sequence[str]) -> int:
    """`lora-scripts` with these arguments, in this process. Returns its exit code."""
    try:
        cli.main(arguments)
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code
    return 0


def make(work: Path, names: Sequence[str]) -> list[Case]:
    """The toy bases and data below `work`, and the cases that use them."""
    sources = {
        "image": (toys.save_stable_diffusion(work / "sd"), wide_pictures(work / "pictures")),
        "text": (text_toys.save_model(work / "llama"), text_toys.write_jsonl(work / "rows.jsonl")),
    }
    return [Case(name, *sources[VARIANTS[name].kind]) for name in names]


def wide_pictures(folder: Path, count: int = 8) -> Path:
    """Pictures of 96×64 pixels, so that a square cut of them may lie here or there."""
    toys.save_pictures(folder, count)
    random = np.random.default_rng(1)
    for path in sorted(folder.glob("*.png")):
        pixels = np.full((64, 96, 3), random.integers(0, 255, 3), np.uint8)
        pixels[16:48, 32:48] = random.integers(0, 255, 3)
        Image.fromarray(pixels).save(path)
    return folder
