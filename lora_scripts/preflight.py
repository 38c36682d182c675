"""Everything that can be known before a GPU is used: paths, data rows, the model's kind, CUDA."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_scripts import datasets, picture_checks, run_files
from lora_scripts.config import Draft, schema_of
from lora_scripts.data import text_checks
from lora_scripts.data.looking import Look
from lora_scripts.datasets import Location
from lora_scripts.errors import UNNAMED, DataError, Problem, UserError, few, user_error
from lora_scripts.models import hub, signature, text_signature, vae_signature
from lora_scripts.schema import Dataset, ImageDataset, TextConfig

logger = logging.getLogger(__name__)

CUDA_INSTALL = (
    "python -m pip install --force-reinstall torch==2.13.0 "
    "--index-url https://download.pytorch.org/whl/cu130"
)

OPTIMIZER_PACKAGES = {
    "adamw8bit": "bitsandbytes",
    "lion": "lion-pytorch",
    "prodigy": "prodigyopt",
}

Row = tuple[Any, Any]  # a record and the dataset that it stands in


@dataclass(frozen=True)
class Inputs:
    """What a config names.

    Attributes:
        rows: Records, each with its dataset.
        problems: Everything found; those of the data have a `kind`.
        looks: What each picture is, in the order of the rows; none for texts.
    """

    rows: list[Row]
    problems: list[Problem]
    looks: list[Look]


def inputs(draft: Draft) -> tuple[list[Row], list[Problem]]:
    """The rows of the data, and every problem found: `look` without the pictures' sizes."""
    found = look(draft)
    return found.rows, found.problems


def look(draft: Draft) -> Inputs:
    """Read everything the config names.

    Works on a config with mistakes too, so that all are answered at once. Needs no torch.
    """
    is_text = schema_of(draft.values) is TextConfig
    problems = list(draft.problems)
    read_base = text_signature.read_text_signature if is_text else signature.read_signature
    problems += _model(draft, "base_model", read_base)
    if not is_text:
        problems += _model(draft, "vae", vae_signature.read_vae)
    problems += _output(draft)
    problems += _optimizer(draft)
    problems += _init_lora(draft, is_text=is_text)
    rows: list[Row] = []
    found_in_data: list[Problem] = []
    named = datasets.named(draft)
    for location, dataset in named:
        trouble = datasets.trouble(dataset.path, file_too=is_text)
        if trouble is not None:
            what = f"found {dataset.path}, {trouble}"
            problems.append(Problem(draft.source.where(*location), what))
            continue
        problems += _output_among_data(draft, dataset) + _mask_dir(draft, location, dataset)
        found, row_problems = datasets.read(draft, location, dataset, is_alone=len(named) == 1)
        found_in_data += row_problems
        rows += [(record, dataset) for record in found]
    looks: list[Look] = []
    if is_text:
        found_in_data += text_checks.check(rows)
    else:
        of_pictures, looks = picture_checks.check(rows, draft)
        found_in_data += of_pictures
    problems += [replace(problem, kind=problem.kind or UNNAMED) for problem in found_in_data]
    return Inputs(rows, problems, looks)


def refuse(problems: Sequence[Problem], draft: Draft) -> None:
    """Stop for errors; with `strict_data` for warnings about the data, too.

    Raises:
        UserError: with all errors; a `DataError` if they are of the data alone.
    """
    stopping = [problem for problem in problems if problem.severity == "error"]
    warnings = [problem for problem in problems if problem.severity == "warning" and problem.kind]
    if draft.values.get("strict_data") is True and warnings:
        where, what = draft.source.where("strict_data"), "is true, so that warnings stop the run"
        stopping += [*warnings, Problem(where, what, kind="strict-data")]
    if not stopping:
        return
    raise (DataError if all(problem.kind for problem in stopping) else UserError)(stopping)


def say(problems: Sequence[Problem]) -> None:
    """Log warnings and notes; of each kind the first few, and how many there are besides."""
    for problem, text in few(problems):
        level = logging.INFO if problem.severity == "note" else logging.WARNING
        logger.log(level, "%s", text)


def environment(device: str) -> None:
    """Refuse an NVIDIA card with a torch that cannot use it.

    Raises:
        UserError: with the line to type.
    """
    import torch

    if device == "cpu" or torch.version.cuda is not None or not _has_nvidia_card():
        return
    what = (
        "this machine has an NVIDIA card, but the installed torch is a build for the CPU only. "
        f"Type:\n  {CUDA_INSTALL}\nor set device: cpu in the config to train without the card"
    )
    raise user_error("torch", what)


def _has_nvidia_card() -> bool:
    if platform.system() == "Windows":
        return shutil.which("nvidia-smi") is not None
    return Path("/proc/driver/nvidia/gpus").is_dir() and shutil.which("nvidia-smi") is not None


def _model(draft: Draft, key: str, read: Callable[[Path], object]) -> list[Problem]:
    """A model that is not there, or that `read` cannot take; a hub id is not looked up."""
    value = draft.values.get(key)
    if not isinstance(value, str) or not value:
        return []
    try:
        path = hub.local_path(value)
        if path is not None:
            read(path)
    except UserError as error:
        where = draft.source.where(key)
        return [Problem(where, f"{p.where}: {p.what}", severity=p.severity) for p in error.problems]
    return []


def _optimizer(draft: Draft) -> list[Problem]:
    """An optimizer of a package that is not installed."""
    name = draft.values.get("optimizer")
    package = OPTIMIZER_PACKAGES.get(name) if isinstance(name, str) else None
    if package is None or importlib.util.find_spec(package.replace("-", "_")) is not None:
        return []
    what = f"found {name}, which needs a package that is not installed: pip install {package}"
    return [Problem(draft.source.where("optimizer"), what)]


def _init_lora(draft: Draft, *, is_text: bool) -> list[Problem]:
    """A finished LoRA that is not there, or is of the other kind."""
    value = draft.values.get("init_lora")
    if not isinstance(value, str) or not value:
        return []
    path = Path(value).expanduser()
    name = run_files.ADAPTER_NAME if is_text else run_files.DIFFUSERS_NAME
    try:
        is_there = (path / name).is_file() if path.is_dir() else path.is_file() and not is_text
    except OSError as error:  # a name too long, a folder that may not be entered
        what = f"found {value}, but it cannot be looked at: {error.strerror}"
        return [Problem(draft.source.where("init_lora"), what)]
    if is_there:
        return []
    wanted = f"a folder with {name}" if is_text else f"a .safetensors file or a folder with {name}"
    return [Problem(draft.source.where("init_lora"), f"found {value}; expected {wanted}")]


def _output(draft: Draft) -> list[Problem]:
    """The output folder, or the nearest folder above it, must be one that can be written to."""
    value = draft.values.get("output_dir")
    if not isinstance(value, str) or not value:
        return []
    nearest = Path(value).expanduser()
    where = draft.source.where("output_dir")
    try:
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
    except OSError as error:
        return [Problem(where, f"found {value}, but it cannot be looked at: {error.strerror}")]
    if not nearest.is_dir():
        return [Problem(where, f"found {value}, but {nearest} is a file, not a folder")]
    if not os.access(nearest, os.W_OK):
        return [Problem(where, f"found {value}, but {nearest} cannot be written to")]
    foreign = run_files.foreign(Path(value).expanduser())
    if foreign:
        what = f"found {value}, which holds {foreign} but no run; name a folder for the run alone"
        return [Problem(where, what)]
    return []


def _output_among_data(draft: Draft, dataset: Dataset) -> list[Problem]:
    """Samples in the data folder would be taken for data by the next run."""
    value = draft.values.get("output_dir")
    if not isinstance(value, str) or not value:
        return []
    if not Path(value).expanduser().resolve().is_relative_to(dataset.path.resolve()):
        return []
    what = f"found {value}, which lies in the data folder {dataset.path}; name another place"
    return [Problem(draft.source.where("output_dir"), what)]


def _mask_dir(draft: Draft, location: Location, dataset: Dataset) -> list[Problem]:
    """A folder of masks that is not there."""
    if not isinstance(dataset, ImageDataset) or dataset.mask_dir is None:
        return []
    trouble = datasets.trouble(dataset.mask_dir, file_too=False)
    where = draft.source.where(*location[:-1], "mask_dir")
    return [] if trouble is None else [Problem(where, f"found {dataset.mask_dir}, {trouble}")]
