"""Finished text LoRAs as they are named on the command line, and the base that they belong to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_scripts.errors import Problem, UserError, user_error
from lora_scripts.run_files import ADAPTER_NAME

CONFIG_NAME = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """A PEFT directory and its strength (1.0: as trained)."""

    path: Path
    scale: float


def parse(text: str) -> Adapter:
    """`PATH` or `PATH:SCALE`; a Windows drive's colon is no scale."""
    path, colon, scale = text.rpartition(":")
    try:
        return Adapter(Path(path), float(scale)) if colon and path else Adapter(Path(text), 1.0)
    except ValueError:
        return Adapter(Path(text), 1.0)


def check(adapters: Sequence[Adapter]) -> None:
    """Every adapter must be a folder in PEFT's layout.

    Raises:
        UserError: naming each that is not, and what was found there.
    """
    problems = [
        Problem(f"--lora {adapter.path}", what)
        for adapter in adapters
        if (what := _trouble(adapter.path)) is not None
    ]
    if problems:
        raise UserError(problems)


def base_of(adapters: Sequence[Adapter], named: str | None) -> str:
    """The base model that was named, else the one that the adapters name.

    Raises:
        UserError: if none is named anywhere, or two adapters name different ones.
    """
    if named is not None:
        return named
    bases = {str(_config(adapter.path).get("base_model_name_or_path")) for adapter in adapters}
    if len(bases) > 1:
        what = f"the LoRAs were trained on different models ({', '.join(sorted(bases))}); name one"
        raise user_error("--base", what)
    if not bases or bases == {"None"}:
        raise user_error("--base", "name the base model: hub id, folder or .gguf file")
    return bases.pop()


def tokenizer_folder(adapters: Sequence[Adapter]) -> Path | None:
    """The first adapter's folder that has a tokenizer, and with it the template of its training."""
    folders = (adapter.path for adapter in adapters)
    return next((path for path in folders if (path / "tokenizer_config.json").is_file()), None)


def _config(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    return content


def _trouble(path: Path) -> str | None:
    if not path.is_dir():
        return "must be the folder of a finished run (with adapter_config.json); nothing is there"
    missing = [name for name in (CONFIG_NAME, ADAPTER_NAME) if not (path / name).is_file()]
    if not missing:
        return None
    if (path / "pytorch_lora_weights.safetensors").is_file():
        return "this is a LoRA for images; use lora-scripts sample"
    checkpoints = sorted((path / "checkpoints").glob("step-*"))
    advice = f"; the run is not finished, try {checkpoints[-1]}" if checkpoints else ""
    return f"there is no {' and no '.join(missing)} in it{advice}"
