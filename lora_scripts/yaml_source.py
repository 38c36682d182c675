"""YAML 1.2 with line numbers: text -> plain values and the line of every key.

ruamel.yaml parses; the scalars are read here by the YAML 1.2 core schema, so that `no` is a
text, `2e-4` a number and `012` is twelve. Tags, anchors' merge keys (`<<`) and objects are refused:
a config is data.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from lora_scripts.errors import Problem, UserError

Location = tuple[str | int, ...]

# YAML 1.2.2, section 10.3.2 "Tag Resolution" of the core schema. First match wins.
CORE_SCHEMA: tuple[tuple[re.Pattern[str], Callable[[str], Any]], ...] = (
    (re.compile(r"(?:null|Null|NULL|~|)\Z"), lambda text: None),
    (re.compile(r"(?:true|True|TRUE)\Z"), lambda text: True),
    (re.compile(r"(?:false|False|FALSE)\Z"), lambda text: False),
    (re.compile(r"[-+]?[0-9]+\Z"), int),
    (re.compile(r"0o[0-7]+\Z"), lambda text: int(text[2:], 8)),
    (re.compile(r"0x[0-9a-fA-F]+\Z"), lambda text: int(text[2:], 16)),
    (re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z"), float),
    (re.compile(r"[-+]?\.(?:inf|Inf|INF)\Z"), lambda text: float(text.replace(".", "", 1))),
    (re.compile(r"\.(?:nan|NaN|NAN)\Z"), lambda text: float("nan")),
)
MAX_INT_DIGITS = 30  # no field needs more; Python itself refuses beyond 4,300
MAX_DEPTH = 20
MAX_VALUES = 10_000  # aliases of aliases could otherwise grow without bound


@dataclass
class Document:
    """A parsed mapping: `values` as plain Python, `lines` from a location to a 1-based line."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[Location, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_scalar(text: str) -> Any:
    """A plain (unquoted) scalar by the core schema: null, bool, int, float or the text itself."""
    for pattern, convert in CORE_SCHEMA:
        if pattern.match(text):
            if convert is int and len(text) > MAX_INT_DIGITS:
                return text
            return convert(text)
    return text


def parse(text: str, name: str) -> Document:
    """Parse a document whose top level is a mapping.

    Duplicate keys and the like are collected in `problems`; the values read so far are kept so
    that the schema can be checked in the same pass.

    Raises:
        UserError: if the text is no YAML at all, or no mapping.
    """
    root = _compose(text, name)
    document = Document()
    if root is None:
        return document
    if not isinstance(root, MappingNode):
        what = "the file must be a list of `key: value` lines"
        raise UserError([Problem(f"{name} line {root.start_mark.line + 1}", what)])
    document.values = _construct(root, (), document, name)
    return document


def parse_value(text: str, name: str) -> Any:
    """One value, as on the right of a `key:` (used for command-line overrides)."""
    root = _compose(text, name)
    document = Document()
    value = None if root is None else _construct(root, (), document, name)
    if document.problems:
        raise UserError(document.problems)
    return value


def _compose(text: str, name: str) -> Node | None:
    try:
        return YAML(typ="safe", pure=True).compose(io.StringIO(text))
    except MarkedYAMLError as error:
        raise UserError([_syntax_problem(error, text, name)]) from None
    except (YAMLError, RecursionError) as error:
        raise UserError([Problem(name, f"not readable as YAML: {_first_line(error)}")]) from None


def _syntax_problem(error: MarkedYAMLError, text: str, name: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return Problem(name, f"not readable as YAML: {_first_line(error)}")
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    where = f"{name} line {mark.line + 1}"
    indent = line[: len(line) - len(line.lstrip())]
    if "\t" in indent or line[mark.column : mark.column + 1] == "\t":
        return Problem(where, "a tab stands here; YAML is indented with spaces only")
    if "escape character" in (error.problem or ""):
        what = "a backslash in double quotes is an escape; write paths with / or in single quotes"
        return Problem(where, what)
    return Problem(
        where, f"not readable as YAML: {error.problem or error.context}: `{line.strip()}`"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _construct(node: Node, location: Location, document: Document, name: str) -> Any:
    document.lines.setdefault(location, node.start_mark.line + 1)
    where = f"{name} line {node.start_mark.line + 1}"
    if len(location) > MAX_DEPTH:
        raise UserError([Problem(where, f"nested more than {MAX_DEPTH} levels deep")])
    if len(document.lines) > MAX_VALUES:
        raise UserError([Problem(where, f"more than {MAX_VALUES} values")])
    if (node.ctag is not None and str(node.ctag).startswith("!")) or "python" in str(node.tag):
        document.problems.append(Problem(where, f"the tag {node.tag} is not allowed in a config"))
        return None
    match node:
        case MappingNode():
            return _construct_mapping(node, location, document, name)
        case SequenceNode():
            return [
                _construct(child, (*location, i), document, name)
                for i, child in enumerate(node.value)
            ]
        case ScalarNode() if node.style is None:
            return read_scalar(node.value)
        case _:
            return node.value


def _construct_mapping(
    node: MappingNode, location: Location, document: Document, name: str
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    first_line: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, ScalarNode):
            document.problems.append(Problem(f"{name} line {line}", "a key must be a plain word"))
            continue
        key = key_node.value
        if key in values:
            what = f"{key} stands twice, first in line {first_line[key]}; keep one"
            document.problems.append(Problem(f"{name} line {line}", what))
            continue
        first_line[key] = line
        document.lines[(*location, key)] = line
        values[key] = _construct(value_node, (*location, key), document, name)
    return values
