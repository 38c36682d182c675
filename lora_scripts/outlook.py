"""A config's run as it would go on this machine: packages, paths, base model, standing, disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lora_scripts import belonging, datasets, disk, environment, preflight, run_lock, written
from lora_scripts.config import Draft, schema_of
from lora_scripts.data.rows import AnyRows
from lora_scripts.environment import Finding
from lora_scripts.errors import Problem, UserError
from lora_scripts.models import hub
from lora_scripts.models.signature import NAMES, Signature
from lora_scripts.models.text_signature import TextSignature
from lora_scripts.schema import Config, TextConfig
from lora_scripts.written import Outlook


@dataclass
class Found:
    """What is found of a config's run.

    Attributes:
        problems: As before every run, and of the disk.
        wanted: Packages that the config asks for.
        paths: Every path, and what may be done there.
        run: What is trained, where it stands, what it will write.
        rows: The data, where nothing is wrong that stops a run.
    """

    problems: list[Problem]
    wanted: list[Finding] = field(default_factory=list)
    paths: list[Finding] = field(default_factory=list)
    run: list[Finding] = field(default_factory=list)
    rows: AnyRows | None = None


def look(draft: Draft) -> Found:
    """Everything that is known of a run before it; of a config with mistakes what can be known."""
    inputs = preflight.look(draft)
    found = Found(list(inputs.problems))
    found.wanted = list(_wanted(draft))
    found.paths = list(_paths(draft))
    if draft.config is None or any(p.severity == "error" for p in found.problems):
        return found
    try:
        found.run, more = _run(draft.config, inputs.rows)
        found.rows = inputs.rows
        found.problems += [draft.source.locate(problem) for problem in more]
    except UserError as error:
        found.problems += [draft.source.locate(problem) for problem in error.problems]
    return found


# --- packages -------------------------------------------------------------------------------------


def _wanted(draft: Draft) -> Iterator[Finding]:
    """The packages of extras that a config asks for, each with the key that does."""
    optimizer = draft.values.get("optimizer")
    if isinstance(optimizer, str) and optimizer in preflight.OPTIMIZER_PACKAGES:
        package = preflight.OPTIMIZER_PACKAGES[optimizer]
        yield environment.wanted_row(package, _needed_by(draft, "optimizer"))
    if draft.values.get("quantization"):
        yield environment.wanted_row("bitsandbytes", _needed_by(draft, "quantization"))
    if str(draft.values.get("base_model", "")).lower().endswith(".gguf"):
        yield environment.wanted_row("gguf", _needed_by(draft, "base_model"))
    if any(_has_parquet(dataset.path) for _, dataset in datasets.named(draft)):
        yield environment.wanted_row("pyarrow", "needed by .parquet data")


def _needed_by(draft: Draft, key: str) -> str:
    place = draft.source.where(key).removesuffix(f": {key}")
    value = "" if key == "base_model" else f": {draft.values[key]}"  # may be long
    return f"needed by {key}{value} ({place})"


def _has_parquet(path: Path) -> bool:
    if path.is_dir():
        return any(path.rglob("*.parquet"))
    return path.suffix.lower() == ".parquet"


# --- paths ----------------------------------------------------------------------------------------


def _paths(draft: Draft) -> Iterator[Finding]:
    """Every path of a config: what is there, and whether it may be read or written."""
    values = draft.values
    for key in ("base_model", "vae"):
        if isinstance(values.get(key), str):
            yield _model(key, values[key], is_text=schema_of(values) is TextConfig)
    for key in ("init_lora", "metadata_path", "mask_dir"):
        if isinstance(values.get(key), str):
            yield _readable(key, Path(values[key]).expanduser())
    for location, dataset in datasets.named(draft):
        yield _readable(".".join(str(part) for part in location), dataset.path)
    for key, usual in (("cache_dir", "cache"), ("output_dir", "")):
        value = values.get(key, usual)
        if isinstance(value, str) and value:
            yield _writable(key, Path(value).expanduser())


def _model(key: str, value: str, *, is_text: bool) -> Finding:
    """A model's path, or where the hub's files of it are."""
    try:
        path = hub.local_path(value)
    except UserError:
        return Finding(key, f"{value}: nothing is there", "read", state="bad")
    if path is not None:
        return _readable(key, path)
    if key == "base_model" and belonging.find(value, is_text=is_text) is not None:
        return Finding(key, f"{value} of the hub, on this machine")
    return Finding(key, f"{value} of the hub, to be fetched", "the network", state="note")


def _readable(key: str, path: Path) -> Finding:
    try:
        is_there = path.exists()
    except OSError as error:
        return Finding(key, f"{path}: {error.strerror}", "read", state="bad")
    if not is_there:
        return Finding(key, f"{path}: nothing is there", "read", state="bad")
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        return Finding(key, f"{path}: may not be read", "read", "the right to read it", "bad")
    said = "a folder" if path.is_dir() else f"a file of {disk.size(path.stat().st_size)}"
    return Finding(key, f"{path}: {said}", "read")


def _writable(key: str, path: Path) -> Finding:
    """A folder that will be written to: a file is made in it, or in the nearest one above."""
    try:
        nearest = disk.nearest(path)
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        found = f"{path}: cannot be written to ({error.strerror})"
        return Finding(key, found, "read and write", "the right to write, or another folder", "bad")
    said = "can be written to" if nearest == path.absolute() else "will be made"
    return Finding(key, f"{path}: {said}", "read and write")


# --- the run --------------------------------------------------------------------------------------


def _run(config: Config, rows: AnyRows) -> tuple[list[Finding], list[Problem]]:
    """The run as it would go, and what is to be said of the disk.

    Raises:
        UserError: if the base model cannot be taken, or a checkpoint does not fit.
    """
    base = belonging.of(config)
    findings = [] if base is None else [_base(base)]
    if isinstance(base, TextSignature) and isinstance(config, TextConfig):
        _check_quantization(config, base)
    roles = "rows" if isinstance(config, TextConfig) else "pictures with captions"
    findings += [Finding("data", f"{len(rows):,} {roles}"), _standing(config)]
    foreseen = disk.foresee(config, rows, base)
    if foreseen is None:
        unknown = "not known before the base model is here"
        return [*findings, Finding("disk", unknown, state="note")], []
    room = disk.room(config)
    problems = disk.problems(config, foreseen, room)
    return [*findings, *_disk(config, rows, foreseen, room, problems)], problems


def _base(base: belonging.Base) -> Finding:
    if isinstance(base, Signature):
        layout = "diffusers folder" if base.layout == "diffusers" else "one file"
        return Finding("base model", f"{NAMES[base.family]}, {layout}")
    kind = base.config.get("model_type") or base.config.get("general.architecture")
    return Finding("base model", f"{kind}, layout {base.layout}")


def _check_quantization(config: TextConfig, base: TextSignature) -> None:
    from lora_scripts import device
    from lora_scripts.models import causal_lm

    compute = device.choose(config.device, "no")
    causal_lm.check_quantization(config.quantization, compute, base)


def _standing(config: Config) -> Finding:
    """What `train` would do with the output folder.

    Raises:
        UserError: if a checkpoint does not fit the config, with the differences and the ways on.
    """
    from lora_scripts import run_folder

    holder = run_lock.taken_by(config.output_dir)
    if holder is not None:
        found = f"another run is writing to it: {holder}"
        mend = "wait for it, or name another output_dir"
        return Finding("output folder", found, "one run at a time", mend, "bad")
    start = run_folder.standing(config)
    if start.finished:
        return Finding("output folder", "its run is finished: train would do nothing", state="note")
    if start.checkpoint is not None:
        return Finding("output folder", f"train would go on from {start.checkpoint[0].name}")
    return Finding("output folder", "train would begin anew")


def _disk(
    config: Config,
    rows: AnyRows,
    foreseen: Outlook,
    room: disk.Room,
    problems: list[Problem],
) -> Iterator[Finding]:
    steps = written.planned_steps(config, rows)
    yield Finding("checkpoints", f"{foreseen.made:,} in about {steps:,} steps, "
                  f"{disk.size(foreseen.checkpoint)} each")  # fmt: skip
    cache = foreseen.cache if room.cache_free is None else 0
    said = disk.told(foreseen, cache)
    state: environment.State = "good"
    if problems:
        state = "bad" if any(problem.severity == "error" for problem in problems) else "note"
    needed = f"{disk.size(foreseen.output + cache)}: {said}"
    yield Finding("disk", f"{disk.size(room.free)} free for {config.output_dir}", needed,
                  state=state)  # fmt: skip
    if room.cache_free is not None:
        found = f"{disk.size(room.cache_free)} free for {config.cache_dir}"
        yield Finding("cache's disk", found, f"up to {disk.size(foreseen.cache)}")
