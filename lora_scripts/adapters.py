"""Finished LoRAs as they are named on the command line; of those for texts, what they belong to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.errors import Problem, UserError, user_error
from lora_scripts.models.header import read_header
from lora_scripts.models.json_file import read_json
from lora_scripts.run_files import ADAPTER_NAME, CHECKPOINTS, DIFFUSERS_NAME, SYSTEM_PROMPT

if TYPE_CHECKING:
    from lora_scripts.models.text_signature import TextSignature

CONFIG_NAME = "adapter_config.json"
BASE_KEY = "base_model_name_or_path"  # PEFT's name for it in adapter_config.json
IMAGE_LAYERS = (".down_blocks.", ".mid_block.", ".up_blocks.", "text_model.encoder.layers.")


@dataclass(frozen=True)
class Adapter:
    """A LoRA's file or folder, and its strength (1.0: as trained)."""

    path: Path
    scale: float

    @property
    def label(self) -> str:
        """What stands above its pictures: the run's name, where the file has diffusers' own."""
        path = self.path.parent if self.path.name in (DIFFUSERS_NAME, ADAPTER_NAME) else self.path
        name = path.stem if path.suffix.lower() == ".safetensors" else path.resolve().name
        return f"{name} : {self.scale:g}"


def parse(text: str) -> Adapter:
    """`PATH` or `PATH:SCALE`; a Windows drive's colon is no scale."""
    path, colon, end = text.rpartition(":")
    try:
        scale = float(end)
    except ValueError:
        return Adapter(Path(text), 1.0)
    is_scale = colon and path and math.isfinite(scale)
    return Adapter(Path(path), scale) if is_scale else Adapter(Path(text), 1.0)


def is_for_images(path: Path) -> bool:
    """Whether a path is a LoRA file, or a folder with one, for a model of images.

    Of PEFT's folders, which serve both, the names of the layers tell.
    """
    if path.is_dir() and (path / DIFFUSERS_NAME).is_file():
        return True
    file = path / ADAPTER_NAME if path.is_dir() else path
    if file.name != ADAPTER_NAME:
        return file.suffix.lower() == ".safetensors"
    names = read_header(file) if file.is_file() else ()
    return any(mark in name for name in names for mark in IMAGE_LAYERS)


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


def find_base(adapters: Sequence[Adapter], named: str | None) -> tuple[str, TextSignature]:
    """The base model that was named, else the one that the adapters name; and what it is.

    Raises:
        UserError: if none is named anywhere, two adapters name different ones, or it is not there.
    """
    from lora_scripts.tasks import build

    base = _base_of(adapters) if named is None else named
    try:
        return base, build.find_text_base(base)
    except UserError as error:
        if named is not None:
            raise
        place = adapters[0].path / CONFIG_NAME
        raise UserError(
            [
                *error.problems,
                Problem("--base", f"{place} names this base model; if it lies elsewhere, name it"),
            ]
        ) from None


def tokenizer_folder(adapters: Sequence[Adapter]) -> Path | None:
    """The first adapter's folder that has a tokenizer, and with it the template of its training."""
    folders = (adapter.path for adapter in adapters)
    return next((path for path in folders if (path / "tokenizer_config.json").is_file()), None)


def system_prompt(adapters: Sequence[Adapter]) -> str | None:
    """The system message that the first adapter was trained with, if it was with one."""
    from safetensors import safe_open

    for adapter in adapters:
        with safe_open(adapter.path / ADAPTER_NAME, framework="np") as stored:
            said = (stored.metadata() or {}).get(SYSTEM_PROMPT)
        if said:
            return str(said)
    return None


def _base_of(adapters: Sequence[Adapter]) -> str:
    if not adapters:
        raise user_error("--base", "name the base model: hub id, folder or .gguf file")
    bases = {
        adapter.path: read_json(adapter.path / CONFIG_NAME).get(BASE_KEY) for adapter in adapters
    }
    silent = [str(path) for path, base in bases.items() if not isinstance(base, str) or not base]
    if silent:
        raise user_error("--base", f"{silent[0]} does not say which base model it is for; name it")
    if len(set(bases.values())) > 1:
        each = ", ".join(f"{path} on {base}" for path, base in bases.items())
        raise user_error("--base", f"the LoRAs name different base models ({each}); name one")
    return str(bases.popitem()[1])


def _trouble(path: Path) -> str | None:
    """Why `path` is no finished text LoRA; None if it is one."""
    from lora_scripts.training import checkpoint

    if path.is_file() and (path.parent / CONFIG_NAME).is_file():
        return f"must be the folder of a finished run: {path.parent}"
    if path.suffix == ".safetensors" and path.is_file():
        return f"must be a folder with {CONFIG_NAME}; LoRAs for pictures: `lora-scripts sample`"
    if not path.is_dir():
        return "must be the folder of a finished run; there is no such folder here"
    missing = [name for name in (CONFIG_NAME, ADAPTER_NAME) if not (path / name).is_file()]
    if not missing:
        return _unreadable(path / CONFIG_NAME)
    if (path / DIFFUSERS_NAME).is_file():
        return "this is a LoRA for pictures; see what it draws by `lora-scripts sample`"
    if checkpoints := checkpoint.listed(path / CHECKPOINTS):
        return f"this run is not finished; its newest checkpoint is {checkpoints[-1]}"
    return f"there is no {' and no '.join(missing)} in it"


def _unreadable(path: Path) -> str | None:
    try:
        read_json(path)
    except UserError as error:
        return f"its {path.name}: {error.problems[0].what}"
    return None
