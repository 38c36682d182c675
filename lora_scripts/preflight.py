"""Everything that can be known before a GPU is used: paths, data rows, the model's kind, CUDA."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_scripts import datasets, picture_checks, run_files
from lora_scripts import environment as installed
from lora_scripts.config import Draft, schema_of
from lora_scripts.data import text_checks
from lora_scripts.data.looking import Look
from lora_scripts.data.rows import AnyRows, Rows
from lora_scripts.datasets import Location
from lora_scripts.environment import Finding
from lora_scripts.errors import UNNAMED, DataError, Problem, UserError, few, user_error
from lora_scripts.models import hub, kinds, signature, text_signature, vae_signature
from lora_scripts.models.header import read_header
from lora_scripts.models.json_file import read_json
from lora_scripts.processes import Processes, some_of
from lora_scripts.schema import Dataset, ImageDataset, TextConfig

logger = logging.getLogger(__name__)

OPTIMIZER_PACKAGES = {
    "adamw8bit": "bitsandbytes",
    "lion": "lion-pytorch",
    "prodigy": "prodigyopt",
}


@dataclass(frozen=True)
class Inputs:
    """What a config names.

    Attributes:
        rows: Records, each with its dataset; those of texts lie on disk.
        problems: Everything found; those of the data have a `kind`.
        looks: What each picture is, in the order of the rows; none for texts.
    """

    rows: AnyRows
    problems: list[Problem]
    looks: Sequence[Look]


def inputs(draft: Draft) -> tuple[AnyRows, list[Problem]]:
    """The rows of the data, and every problem found: `look` without the pictures' sizes."""
    found = look(draft)
    return found.rows, found.problems


def look(draft: Draft) -> Inputs:
    """Read everything the config names.

    Works on a config with mistakes too, so that all are answered at once. Needs no torch.
    """
    is_text = schema_of(draft.values) is TextConfig
    problems = list(draft.problems)
    read_base = _read_text_base if is_text else signature.read_signature
    problems += _model(draft, "base_model", read_base)
    if not is_text:
        problems += _model(draft, "vae", vae_signature.read_vae)
    problems += _output(draft)
    problems += _optimizer(draft)
    problems += _init_lora(draft, is_text=is_text)
    parts: list[tuple[Sequence[Any], Dataset]] = []
    cache_dir = datasets.cache_dir(draft)
    found_in_data: list[Problem] = []
    named = datasets.named(draft)
    for location, dataset in named:
        trouble = datasets.trouble(dataset.path, file_too=is_text)
        if trouble is not None:
            what = f"found {dataset.path}, {trouble}"
            problems.append(Problem(draft.source.where(*location), what))
            continue
        problems += _output_among_data(draft, dataset) + _mask_dir(draft, location, dataset)
        found, row_problems = datasets.read(
            draft, location, dataset, cache_dir, is_alone=len(named) == 1
        )
        found_in_data += row_problems
        parts.append((found, dataset))
    rows: AnyRows = Rows(parts)
    looks: Sequence[Look] = []
    try:
        if is_text:
            found_in_data += text_checks.check(rows, cache_dir)
        else:
            of_pictures, looks = picture_checks.check(rows, draft, cache_dir)
            found_in_data += of_pictures
    except OSError as error:  # no room for what the checks put on disk
        problems.append(Problem(str(error.filename or cache_dir), f"{error.strerror}"))
    problems += [replace(problem, kind=problem.kind or UNNAMED) for problem in found_in_data]
    return Inputs(rows, problems, looks)


def of_all(own: Sequence[Problem], processes: Processes) -> list[Problem]:
    """The problems of all processes, once; those that not all have name who has them."""
    every = processes.gathered((processes.name, list(own)))
    found = dict.fromkeys(problem for _, problems in every for problem in problems)
    result = []
    for problem in found:
        who = [name for name, problems in every if problem in problems]
        where = "" if len(who) == len(every) else f" ({some_of(who)})"
        result.append(replace(problem, what=f"{problem.what}{where}"))
    return result


def of_processes(draft: Draft, processes: Processes, *, dry: bool) -> list[Problem]:
    """What does not go with the number of processes: `distributed: fsdp`, `offload`, a trial."""
    if dry and processes.size > 1:
        return [Problem("--dry-run", "tries one process; start it without torchrun")]
    spread = draft.values.get("distributed") == "fsdp"
    if spread and processes.size == 1:
        what = "found fsdp, but this is one process: start it with torchrun, or leave this key out"
        return [Problem(draft.source.where("distributed"), what)]
    if draft.values.get("offload") is True and processes.size > 1 and not spread:
        what = "found true for several processes: set distributed: fsdp, too; each keeps a share"
        return [Problem(draft.source.where("offload"), what)]
    return []


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


def environment(device: str, *, offload: bool = False) -> None:
    """Refuse what a run would stumble over later: a package that is missing, a card left unused.

    Packages of versions that are not known to work are named. `device`, `offload`: the config's
    keys.

    Raises:
        UserError: with what to type.
    """
    _packages()
    if device == "cpu":
        return
    from lora_scripts import cards

    without = "\nor set device: cpu in the config to train without the card"
    problems = [
        Problem(row.what, _said(row) + without * (device == "auto"))
        for row in cards.rows(device)
        if row.state == "bad"
    ]
    if problems:
        raise UserError(problems)
    if offload:
        needs_card()


def needs_card() -> None:
    """Refuse weights that are to wait in RAM where there is no card that they could wait for.

    Raises:
        UserError: naming the key.
    """
    import torch

    if not torch.cuda.is_available():
        what = "found true, but no card is used: without one all weights lie in RAM anyway"
        raise user_error("offload", what)


def _packages() -> None:
    bad = [row for row in installed.version_rows() if row.state == "bad"]
    missing = [row for row in bad if row.found == installed.MISSING]
    if missing:
        raise UserError([Problem(row.what, _said(row)) for row in missing])
    for row in bad:
        logger.warning("%s: %s", row.what, _said(row))


def _said(row: Finding) -> str:
    needed = f"; needed: {row.needed}" if row.needed else ""
    return f"found {row.found}{needed}. What to do:\n  {row.to_type}"


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


def _read_text_base(path: Path) -> object:
    """Recognise a language model; of files and folders for images it is said what they are."""
    if path.is_dir() and (path / "config.json").is_file():
        part = read_json(path / "config.json").get("_class_name")
        if part is not None:
            raise user_error(str(path), f"this is a part of a model for images ({part})")
    if path.is_file() and path.suffix.lower() == ".safetensors":
        kind = kinds.kind_of_file(read_header(path))
        if kind in signature.NAMES:
            what = f"this is a model for images ({kind}): set task_type: image-generation"
            raise user_error(str(path), what)
        if kind == "lora":
            raise user_error(str(path), f"this is a LoRA, not a base model. {text_signature.TAKES}")
    return text_signature.read_text_signature(path)


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
        return _other_base(draft, path, is_text=is_text) or _other_keys(draft, path)
    wanted = f"a folder with {name}" if is_text else f"a .safetensors file or a folder with {name}"
    return [Problem(draft.source.where("init_lora"), f"found {value}; expected {wanted}")]


def _other_base(draft: Draft, lora: Path, *, is_text: bool) -> list[Problem]:
    """A finished LoRA of another base model; nothing if the base is not here or wrong itself."""
    from lora_scripts import belonging

    name = draft.values.get("base_model")
    if not isinstance(name, str) or not name:
        return []
    try:
        own_code = draft.values.get("trust_remote_code") is True
        base = belonging.find(name, is_text=is_text, own_code=own_code)
    except UserError:
        return []  # `_model` says so
    if base is None:
        return []
    return belonging.problems(lora, base, draft.source.where("init_lora"))


def _other_keys(draft: Draft, lora: Path) -> list[Problem]:
    """Rank, kind and parts of a finished LoRA that are not those of the config."""
    from lora_scripts import belonging

    if draft.config is None:
        return []
    where = draft.source.where("init_lora")
    try:
        return [Problem(where, what) for what in belonging.misfits(lora, draft.config)]
    except UserError as error:
        return [Problem(where, str(problem)) for problem in error.problems]


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
