"""Everything that can be known before a GPU is used: paths, data rows, the model's kind, CUDA."""

from __future__ import annotations

import difflib
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from lora_scripts import run_files
from lora_scripts.config import Dataset, Draft
from lora_scripts.data import records, validate
from lora_scripts.errors import Problem, UserError, user_error
from lora_scripts.models import hub, signature

CUDA_INSTALL = (
    "python -m pip install --force-reinstall torch==2.13.0 "
    "--index-url https://download.pytorch.org/whl/cu130"
)

Row = tuple[records.Record, Dataset]


def inputs(draft: Draft) -> tuple[list[Row], list[Problem]]:
    """Read everything the config names: the rows of the data, and every problem found.

    Works on a config with mistakes too, so that all are answered at once. Needs no torch.
    """
    problems = list(draft.problems)
    problems += _base_model(draft)
    problems += _output(draft)
    rows: list[Row] = []
    for location, dataset in _datasets(draft):
        trouble = _folder_trouble(dataset.path)
        if trouble is not None:
            what = f"found {dataset.path}, {trouble}"
            problems.append(Problem(draft.source.where(*location), what))
            continue
        problems += _output_among_pictures(draft, dataset)
        try:
            found, row_problems = records.read_images(dataset.path, dataset.metadata_path)
        except OSError as error:  # a name too long, a file that may not be read
            found, row_problems = [], [Problem(str(error.filename), f"{error.strerror}")]
        problems += row_problems
        rows += [(record, dataset) for record in found]
    problems += validate.check([record for record, _ in rows])
    return rows, problems


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


def _base_model(draft: Draft) -> list[Problem]:
    base_model = draft.values.get("base_model")
    if not isinstance(base_model, str) or not base_model:
        return []
    try:
        path = hub.local_path(base_model)
        if path is not None:
            signature.read_signature(path)
    except UserError as error:
        where = draft.source.where("base_model")
        return [Problem(where, f"{p.where}: {p.what}", severity=p.severity) for p in error.problems]
    return []


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


def _output_among_pictures(draft: Draft, dataset: Dataset) -> list[Problem]:
    """Sample pictures in the data folder would be taken for data by the next run."""
    value = draft.values.get("output_dir")
    if not isinstance(value, str) or not value:
        return []
    if not Path(value).expanduser().resolve().is_relative_to(dataset.path.resolve()):
        return []
    what = f"found {value}, which lies in the data folder {dataset.path}; name another place"
    return [Problem(draft.source.where("output_dir"), what)]


def _datasets(draft: Draft) -> list[tuple[tuple[str | int, ...], Dataset]]:
    """The datasets that the config names, with the key of each; also of a config with mistakes."""
    if draft.config is not None:
        if draft.config.train_data_dir is not None:
            return [(("train_data_dir",), draft.config.all_datasets()[0])]
        return [(("datasets", i, "path"), data) for i, data in enumerate(draft.config.datasets)]
    values: dict[str, Any] = draft.values
    folder, metadata = values.get("train_data_dir"), values.get("metadata_path")
    if folder is None:
        entries = enumerate(values.get("datasets", []))
        return [(("datasets", i, "path"), Dataset.model_validate(data)) for i, data in entries]
    return [
        (("train_data_dir",), Dataset.model_validate({"path": folder, "metadata_path": metadata}))
    ]


def _folder_trouble(path: Path) -> str | None:
    """Why `path` is no folder to read; None if it is one."""
    try:
        return None if path.is_dir() else _no_folder(path)
    except OSError as error:  # a name too long, a folder that may not be entered
        return f"but it cannot be looked at: {error.strerror}"


def _no_folder(path: Path) -> str:
    if path.exists():
        return "but that is a file, not a folder"
    if not path.parent.is_dir():
        return f"but there is no such folder, nor {path.parent}"
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return "but there is no such folder" + (
        f"; did you mean {path.parent / near[0]}?" if near else ""
    )
