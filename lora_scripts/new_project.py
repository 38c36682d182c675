"""`lora-scripts new`: the folder for the data, its captions file, a config of five lines.

What is there already is never written over.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lora_scripts import file_names, files
from lora_scripts.data import conversations
from lora_scripts.data.image_folder import find_kohyas_folders, list_folder
from lora_scripts.data.reading import show, show_path
from lora_scripts.data.records import write_csv
from lora_scripts.errors import UserError, WorkError, user_error
from lora_scripts.models import hub
from lora_scripts.models.json_file import read_json
from lora_scripts.models.signature import read_signature
from lora_scripts.reference import json_schema
from lora_scripts.shell import typed

logger = logging.getLogger(__name__)

CONFIGS = Path("configs")
BASES = {
    "image-generation": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "text-generation": "Qwen/Qwen2.5-1.5B-Instruct",
}
USUAL_RESOLUTION, BUCKET_STEP = 512, 64  # what the config has by default
EXAMPLE_ROW = '{"prompt": "a question", "completion": "the answer"}'

_BAD = r'\\/:*?"<>|\x00-\x1f\x7f'  # what no name of a file may hold on Windows
_NAME = re.compile(rf"[^{_BAD}.\s-]([^{_BAD}]{{0,98}}[^{_BAD}.\s])?")
Task = Literal["image-generation", "text-generation"]


def run(name: str, data: Path, base: str | None, task: Task) -> None:
    """Make what is missing in the working directory, and say what to type next.

    Args:
        name: Of the LoRA: `configs/NAME.yaml`, `output/NAME`.
        data: The folder of its pictures, or the file or folder of its texts. A folder that is not
            there is made.
        base: The base model; None for one that is usual for the task.

    Raises:
        UserError: if the name or a path cannot be used, or the config or its output is there.
        WorkError: if something cannot be written.
    """
    config = CONFIGS / f"{name}.yaml"
    _refuse(name, data, base, config, task)
    base = base or BASES[task]
    resolution = _native_resolution(base) if task == "image-generation" else None
    try:
        if not data.exists():
            data.mkdir(parents=True)
            logger.info("%s: the folder is made.", show_path(data))
        steps = _prepare_texts(data) if task == "text-generation" else _prepare_pictures(data)
        CONFIGS.mkdir(exist_ok=True)
        if not (CONFIGS / "schema.json").exists():
            files.write_text(CONFIGS / "schema.json", json_schema())
        files.write_text(config, _config_text(name, data, base, task, resolution))
    except OSError as error:
        raise WorkError(f"{error.filename} cannot be written ({error.strerror})") from None
    logger.info("%s: the config is written.\nNext:", show_path(config))
    for step in steps:
        logger.info("  %s", step)
    for verb in ("check", "train"):
        logger.info("  %s", typed("lora-scripts", verb, "--config", config.as_posix()))


def _refuse(name: str, data: Path, base: str | None, config: Path, task: Task) -> None:
    if not _NAME.fullmatch(name) or name.lower().endswith((".yaml", ".yml")):
        what = r'is no name for a file: without \ / : * ? " < > | and .yaml, no dot or - before it'
        raise user_error(show(name), what)
    if (why := file_names.trouble(name)) is not None:
        raise user_error(show(name), why)
    output = Path("output") / name
    for path in (config, output):
        if path.exists():
            raise user_error(show_path(path), "is there already; choose another name")
    if base is not None:
        hub.local_path(base)
    if data.is_file() and task == "text-generation":
        return
    if data.exists() and not data.is_dir():
        raise user_error(
            show_path(data), "this is a file; expected a folder, which is made if need be"
        )
    if not data.exists() and data.suffix.lower() in conversations.DATA_SUFFIXES:
        what = "there is no such file; write it first, or name a folder, which is then made"
        raise user_error(show_path(data), what)


def _prepare_pictures(folder: Path) -> Sequence[str]:
    """Write the captions file if there are no captions; what is still to be done."""
    listing = list_folder(folder)
    if errors := [problem for problem in listing.problems if problem.severity == "error"]:
        raise UserError(errors)
    label = typed("lora-scripts", "label", "--input", folder.as_posix())
    if not listing.images:
        return [f"put your pictures into {show_path(folder)}", label]
    find_kohyas_folders(listing)
    metadata = folder / "metadata.csv"
    if metadata.exists() or (folder / "metadata.jsonl").exists() or listing.captions:
        return []
    if listing.repeats:  # kohya's folders, whose names are captions
        return []
    write_csv(metadata, [(name, "") for name in listing.images])
    count = len(listing.images)
    pictures = "1 picture" if count == 1 else f"{count:,} pictures"
    logger.info("%s: %s without captions yet.", show_path(metadata), pictures)
    return [label]


def _prepare_texts(path: Path) -> Sequence[str]:
    """What is still to be done."""
    if path.is_file() or conversations.read_texts(path, None).records:
        return []
    kinds = ", ".join((*conversations.DATA_SUFFIXES, *conversations.RAW_SUFFIXES))
    return [f"put your texts ({kinds}) into {show_path(path)}; a line of a .jsonl: {EXAMPLE_ROW}"]


def _config_text(name: str, data: Path, base: str, task: Task, resolution: int | None) -> str:
    lines = ["# yaml-language-server: $schema=schema.json"]
    if task == "text-generation":
        lines += ["task_type: text-generation"]
    lines += [
        f"base_model: {_quoted(base)}",
        f"train_data_dir: {_quoted(data.as_posix())}",
        f"output_dir: {_quoted(f'output/{name}')}",
        "lora_rank: 16",
    ]
    if task == "image-generation":
        lines += ["learning_rate: 1e-4"]
    if resolution and resolution != USUAL_RESOLUTION and resolution % BUCKET_STEP == 0:
        lines += [f"resolution: {resolution}"]
    return "\n".join(lines) + "\n"


def _native_resolution(base: str) -> int | None:
    """What a base model on this machine was made for, in pixels; None if its files do not tell."""
    path = hub.local_path(base)
    if path is None:
        return None
    found = read_signature(path)
    if found.layout == "diffusers":
        unet, vae = (read_json(path / part / "config.json") for part in ("unet", "vae"))
        side, halvings = unet.get("sample_size"), len(vae.get("block_out_channels", ())) - 1
        return side << halvings if isinstance(side, int) and halvings >= 0 else None
    return {"sd1": 512, "sd2": None, "sdxl": 1024}[found.family]


def _quoted(text: str) -> str:
    """A text in YAML's double quotes, which read as JSON's do."""
    return json.dumps(text, ensure_ascii=False)
