"""The datasets that a config names, and what is read of them; also of a config with mistakes."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_scripts.config import Draft, schema_of
from lora_scripts.data import conversations, records
from lora_scripts.data.reading import show_path
from lora_scripts.errors import Problem
from lora_scripts.schema import Dataset, ImageDataset, TextConfig, TextDataset

logger = logging.getLogger(__name__)

Location = tuple[str | int, ...]  # of a key in the config


def named(draft: Draft) -> list[tuple[Location, Dataset]]:
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


def cache_dir(draft: Draft) -> Path:
    """Where the run keeps encoded data; the default beside a mistake in that key."""
    if draft.config is not None:
        return draft.config.cache_dir
    written = draft.values.get("cache_dir")
    if isinstance(written, str) and written.strip():
        return Path(written).expanduser()
    return Path(str(TextConfig.model_fields["cache_dir"].default))


def trouble(path: Path, *, file_too: bool) -> str | None:
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


def read(
    draft: Draft, location: Location, dataset: Dataset, spool_dir: Path, *, is_alone: bool
) -> tuple[Sequence[Any], list[Problem]]:
    """The records of one dataset, and every problem, each with its place.

    `spool_dir`: near it what was read is put on disk. `is_alone`: no other dataset is named; else
    places are told with their folders.
    """
    found, problems = _read(dataset, spool_dir, is_alone=is_alone)
    return found, [_placed(draft, location, problem) for problem in problems]


def _read(
    dataset: Dataset, spool_dir: Path, *, is_alone: bool
) -> tuple[Sequence[Any], list[Problem]]:
    """The records of one dataset; a file that cannot be looked at becomes a problem."""
    try:
        match dataset:
            case ImageDataset():
                found, problems = records.read_images(
                    dataset.path, dataset.metadata_path, dataset.caption_keys, spool_dir
                )
                if not is_alone:
                    found, problems = _with_folder(dataset.path, found, problems, spool_dir)
                return found, problems
            case TextDataset():
                texts = conversations.read_texts(dataset.path, dataset.metadata_path, spool_dir)
                forms = ", ".join(f"{count:,} × {form}" for form, count in texts.forms.items())
                if forms:
                    logger.info("Data in %s: %s", dataset.path, forms)
                return texts.records, texts.problems
    except OSError as error:  # a name too long, a file that may not be read
        where = str(error.filename or spool_dir)
        return [], [Problem(where, f"{error.strerror}", kind="unreadable-file")]


def _with_folder(
    folder: Path, found: records.Records, problems: Sequence[Problem], spool_dir: Path
) -> tuple[records.Records, list[Problem]]:
    """Places with their folder: several may hold a `metadata.csv`."""

    def placed(where: str) -> str:
        known = where in ImageDataset.model_fields or Path(where).is_relative_to(folder)
        return where if known else show_path(folder / where)

    named = records.Records(spool_dir)
    for record in found:
        named.add(replace(record, where=placed(record.where)))
    return named, [replace(problem, where=placed(problem.where)) for problem in problems]


def _placed(draft: Draft, location: Location, problem: Problem) -> Problem:
    """A problem that names a key of a dataset, with the key's place in the file."""
    if problem.where not in ImageDataset.model_fields:
        return problem
    return replace(problem, where=draft.source.where(*location[:-1], problem.where))
