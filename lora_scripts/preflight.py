"""Everything that can be known before a GPU is used: paths, data rows, the model's kind, CUDA."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_scripts import run_files
from lora_scripts.config import Draft, schema_of
from lora_scripts.data import conversations, masks, records, validate
from lora_scripts.errors import Problem, UserError, user_error
from lora_scripts.models import hub, signature, text_signature, vae_signature
from lora_scripts.schema import Dataset, ImageDataset, TextConfig, TextDataset

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

Location = tuple[str | int, ...]  # of a key in the config
Row = tuple[Any, Any]  # a record and the dataset that it stands in


def inputs(draft: Draft) -> tuple[list[Row], list[Problem]]:
    """Read everything the config names: the rows of the data, and every problem found.

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
    for location, dataset in _datasets(draft):
        trouble = _data_trouble(dataset.path, file_too=is_text)
        if trouble is not None:
            what = f"found {dataset.path}, {trouble}"
            problems.append(Problem(draft.source.where(*location), what))
            continue
        problems += _output_among_data(draft, dataset) + _mask_dir(draft, location, dataset)
        found, row_problems = _read(dataset)
        problems += [_placed(draft, location, problem) for problem in row_problems]
        rows += [(record, dataset) for record in found]
    if not is_text:
        problems += validate.check([record for record, _ in rows])
        if draft.values.get("masked_loss") is True:
            problems += [draft.source.locate(problem) for problem in masks.check(rows)]
    return rows, problems


def _read(dataset: Dataset) -> tuple[Sequence[Any], list[Problem]]:
    """The records of one dataset; a file that cannot be looked at becomes a problem."""
    try:
        match dataset:
            case ImageDataset():
                return records.read_images(
                    dataset.path, dataset.metadata_path, dataset.caption_keys
                )
            case TextDataset():
                found = conversations.read_texts(dataset.path, dataset.metadata_path)
                forms = ", ".join(f"{count:,} × {form}" for form, count in found.forms.items())
                if forms:
                    logger.info("Data in %s: %s", dataset.path, forms)
                return found.records, found.problems
    except OSError as error:  # a name too long, a file that may not be read
        return [], [Problem(str(error.filename), f"{error.strerror}")]


def _placed(draft: Draft, location: Location, problem: Problem) -> Problem:
    """A problem that names a key of a dataset, with the key's place in the file."""
    if problem.where not in ImageDataset.model_fields:
        return problem
    return replace(problem, where=draft.source.where(*location[:-1], problem.where))


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
    trouble = _data_trouble(dataset.mask_dir, file_too=False)
    where = draft.source.where(*location[:-1], "mask_dir")
    return [] if trouble is None else [Problem(where, f"found {dataset.mask_dir}, {trouble}")]


def _datasets(draft: Draft) -> list[tuple[Location, Dataset]]:
    """The datasets that the config names, with the key of each; also of a config with mistakes."""
    located: list[tuple[Location, Dataset]] = []
    if draft.config is not None and draft.config.train_data_dir is not None:
        located.append((("train_data_dir",), draft.config.all_datasets()[0]))
    elif draft.config is not None:
        written: Sequence[Dataset] = draft.config.datasets
        for number, dataset in enumerate(written):
            located.append((("datasets", number, "path"), dataset))
    else:
        values: dict[str, Any] = draft.values
        is_text = schema_of(values) is TextConfig
        folder = values.get("train_data_dir")
        if folder is not None:
            keys = ["metadata_path"] if is_text else ["metadata_path", "caption_keys", "mask_dir"]
            entry = {"path": folder, **{key: values.get(key) for key in keys}}
            located.append((("train_data_dir",), _dataset(entry, is_text=is_text)))
            return located
        for number, entry in enumerate(values.get("datasets", [])):
            located.append((("datasets", number, "path"), _dataset(entry, is_text=is_text)))
    return located


def _dataset(entry: dict[str, Any], *, is_text: bool) -> Dataset:
    return TextDataset.model_validate(entry) if is_text else ImageDataset.model_validate(entry)


def _data_trouble(path: Path, *, file_too: bool) -> str | None:
    """Why `path` is no folder (or file) to read; None if it is one."""
    try:
        return None if path.is_dir() or (file_too and path.is_file()) else _not_there(path)
    except OSError as error:  # a name too long, a folder that may not be entered
        return f"but it cannot be looked at: {error.strerror}"


def _not_there(path: Path) -> str:
    if path.exists():
        return "but that is a file, not a folder"
    if not path.parent.is_dir():
        return f"but there is no such folder, nor {path.parent}"
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir() or path.suffix]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"but there is no such {'file' if path.suffix else 'folder'}" + (
        f"; did you mean {path.parent / near[0]}?" if near else ""
    )
