"""A config file read: `load(path, overrides)` answers with a frozen, fully resolved config, or with
every problem at once (`UserError`). What the keys are stands in `schema/`.
"""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_scripts import wording, yaml_source
from lora_scripts.errors import Problem, UserError, user_error
from lora_scripts.schema import (
    SCHEMAS,
    Config,
    ImageConfig,
    ImageDataset,
    SamplePrompt,
    Section,
    TextConfig,
    TextDataset,
    TextPrompt,
    misfits_of,
    other_names,
)

COMMAND_LINE, NOWHERE = 10**9, 10**9 + 1  # sorted behind every line of a file


@dataclass(frozen=True)
class Draft:
    """What a config file says: the config if it is valid, else everything that is wrong with it."""

    config: Config | None
    problems: list[Problem]
    values: dict[str, Any] = field(repr=False)  # the keys that passed, as written
    source: Source

    def checked(self) -> Config:
        """The config.

        Raises:
            UserError: with all problems found, each with file, line and key.
        """
        if self.config is None or self.problems:
            raise UserError(self.problems)
        return self.config


@dataclass(frozen=True)
class Source:
    """Where each key was written."""

    name: str
    lines: dict[yaml_source.Location, int]
    overridden: frozenset[str]

    def where(self, *location: str | int) -> str:
        """The place of a key, for an error message: `my.yaml line 7: lora_rank`."""
        key = ".".join(str(part) for part in location)
        if location and location[0] in self.overridden:
            return f"command line: {key}"
        for length in range(len(location), 0, -1):
            if location[:length] in self.lines:
                return f"{self.name} line {self.lines[location[:length]]}: {key}"
        return f"{self.name}: {key}"

    def locate(self, problem: Problem) -> Problem:
        """A problem that names a key, found later in the run, with the key's place in the file."""
        if not any(problem.where in schema.model_fields for schema in SCHEMAS.values()):
            return problem
        return replace(problem, where=self.where(problem.where))

    def line(self, location: Sequence[str | int]) -> int:
        """The line of the innermost part of `location` that was written, to sort by."""
        if location and location[0] in self.overridden:
            return COMMAND_LINE
        for length in range(len(location), 0, -1):
            if tuple(location[:length]) in self.lines:
                return self.lines[tuple(location[:length])]
        return NOWHERE


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override, check: the config of a run.

    Raises:
        UserError: with all problems found, each with file, line and key.
    """
    return read(path, overrides).checked()


def read(path: Path, overrides: Sequence[str] = ()) -> Draft:
    """Read `path`, apply `key=value` overrides (read by the same rules), check everything.

    Raises:
        UserError: if the file is not there or is no YAML mapping; all else is in the draft.
    """
    document = yaml_source.parse(_read_text(path), str(path))
    problems = list(document.problems)
    overridden = set()
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        if not equals or not key:
            problem = Problem(f"command line: {override}", "must have the form key=value")
            problems.append((COMMAND_LINE, problem))
            continue
        overridden.add(key)
        try:
            document.values[key] = yaml_source.parse_value(text, f"command line: {key}")
        except UserError as error:
            problems += [(COMMAND_LINE, problem) for problem in error.problems]
    source = Source(str(path), document.lines, frozenset(overridden))
    config, values, findings = _check(document.values, source)
    spoilt = {line for line, _ in problems}  # by a tag, say: not to be told twice
    problems += [finding for finding in findings if finding[0] not in spoilt - {COMMAND_LINE}]
    problems.sort(key=lambda placed: placed[0])
    return Draft(config, [problem for _, problem in problems], values, source)


def schema_of(values: Mapping[str, Any]) -> type[ImageConfig] | type[TextConfig]:
    """The class that `task_type` calls for; the nearest one if it is mistyped."""
    task_type = values.get("task_type", "image-generation")
    if not isinstance(task_type, str):
        return ImageConfig
    near = difflib.get_close_matches(task_type, SCHEMAS, n=1, cutoff=0.5)
    return SCHEMAS[near[0]] if near else ImageConfig


def _check(
    values: dict[str, Any], source: Source
) -> tuple[Config | None, dict[str, Any], list[tuple[int, Problem]]]:
    """The config if `values` are valid; the values that are; what is wrong, each with its line."""
    schema = schema_of(values)
    try:
        return schema.model_validate(values), values, []
    except ValidationError as error:
        findings = wording.merged(error.errors())
    wrong = {finding["loc"][0] for finding in findings if finding["loc"]}
    passed = {key: value for key, value in values.items() if key not in wrong}
    meant = {_nearest_key(schema, finding["loc"]) for finding in findings} - {None}
    problems = []
    for finding in findings:
        location = finding["loc"]
        if finding["type"] == "missing" and location in meant:
            continue  # a mistyped key beside it says so already
        if location:  # else: misfits, which are looked for below in any case
            told = _explain(schema, finding, source)
            problems += [(source.line(location), found) for found in told]
    for key, what in misfits_of(_with_defaults(schema, passed, wrong)):
        if (key,) not in meant:
            problems.append((source.line((key,)), Problem(source.where(key), what)))
    return None, passed, problems


def _with_defaults(
    schema: type[Section], passed: Mapping[str, Any], wrong: Collection[Any]
) -> dict[str, Any]:
    """The keys that passed, and what the others are when left out, where that can be told."""
    known = dict(passed)
    for name, key in schema.model_fields.items():
        if name in known or name in wrong or key.is_required():
            continue
        with suppress(KeyError, AttributeError):  # it follows from a key that is wrong or missing
            known[name] = key.get_default(call_default_factory=True, validated_data=known)
    return known


def dump(config: Config) -> str:
    """The config with every key as resolved, as YAML that `load` reads back to an equal config."""
    from ruamel.yaml import YAML

    stream = io.StringIO()
    writer = YAML(typ="rt")
    writer.width = 1000
    writer.allow_unicode = True
    writer.dump(_quoted(json.loads(config.model_dump_json())), stream)
    return stream.getvalue()


def _quoted(value: Any) -> Any:
    """Every text in double quotes: `no`, `.5e3` or a line end stay what they are."""
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    match value:
        case dict():
            return {key: _quoted(item) for key, item in value.items()}
        case list():
            return [_quoted(item) for item in value]
        case str():
            return DoubleQuotedScalarString(value)
        case _:
            return value


def schema() -> dict[str, Any]:
    """The JSON Schema that editors use to complete and check a config while it is typed."""
    kinds = {
        name: kind.model_json_schema(mode="validation", ref_template="#/$defs/{model}")
        for name, kind in SCHEMAS.items()
    }
    parts = {name: part for kind in kinds.values() for name, part in kind.pop("$defs", {}).items()}
    is_text = {"properties": {"task_type": {"const": "text-generation"}}, "required": ["task_type"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lora-scripts config",
        "$defs": {**parts, **kinds},
        "if": is_text,
        "then": {"$ref": "#/$defs/text-generation"},
        "else": {"$ref": "#/$defs/image-generation"},
    }


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise user_error(str(path), _missing_file(path)) from None
    except UnicodeDecodeError:
        raise user_error(str(path), "not written in UTF-8; save it with that encoding") from None
    except OSError as error:
        raise user_error(str(path), f"cannot be read: {error.strerror}") from None


def _missing_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"no such file; there is no folder {path.parent} either"
    others = sorted(other.name for other in path.parent.glob("*.y*ml"))
    near = difflib.get_close_matches(path.name, others, n=1)
    if near:
        return f"no such file; did you mean {path.parent / near[0]}?"
    return "no such file" + (f"; there are: {', '.join(others[:8])}" if others else "")


def _explain(schema: type[Section], details: Any, source: Source) -> list[Problem]:
    """One of pydantic's findings in our words: where, what was found, what is allowed."""
    location: tuple[str | int, ...] = details["loc"]
    where = source.where(*location)
    match details["type"]:
        case "default_factory_not_called":  # follows from another finding
            return []
        case "extra_forbidden":
            return [Problem(where, _unknown_key(schema, location))]
        case "missing":
            return [Problem(where, f"missing; {_field_of(schema, location)}")]
        case "literal_error" if location == ("task_type",):
            found = wording.shown(details["input"])
            return [Problem(where, f"found {found}, must be {' or '.join(SCHEMAS)}")]
        case _:
            what = f"found {wording.shown(details['input'])}, {wording.allowed(details)}"
            return [Problem(where, what)]


def _section_at(schema: type[Section], location: Sequence[str | int]) -> type[Section]:
    is_text = schema is TextConfig
    match [part for part in location if isinstance(part, str)]:
        case ["datasets", *_]:
            return TextDataset if is_text else ImageDataset
        case ["sample_prompts", *_]:
            return TextPrompt if is_text else SamplePrompt
        case _:
            return schema


def _field_of(schema: type[Section], location: Sequence[str | int]) -> str:
    return _section_at(schema, location).model_fields[str(location[-1])].description or ""


def _unknown_key(schema: type[Section], location: Sequence[str | int]) -> str:
    for task_type, other in SCHEMAS.items():
        if location[-1] in _section_at(other, location[:-1]).model_fields:
            return f"unknown key; it belongs to task_type: {task_type}"
    here = other_names.HERE.get(str(location[-1]))
    if here in _section_at(schema, location[:-1]).model_fields:
        return f"unknown key; here it is called {here}"
    near = _nearest_key(schema, location)
    if near is not None:
        return f"unknown key; did you mean {near[-1]}?"
    return "unknown key; configs/schema.json lists every key"


def _nearest_key(
    schema: type[Section], location: Sequence[str | int]
) -> tuple[str | int, ...] | None:
    """The key that was probably meant, if `location` is no key."""
    if not location or not isinstance(location[-1], str):
        return None
    known = list(_section_at(schema, location[:-1]).model_fields)
    if location[-1] in known:
        return None
    if (here := other_names.HERE.get(location[-1])) in known:
        return (*location[:-1], str(here))
    near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    return (*location[:-1], near[0]) if near else None
