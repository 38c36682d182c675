"""YAML 1.2 with line numbers: text -> plain values and the line of every key.

ruamel.yaml parses; the scalars are read here by the YAML 1.2 core schema, so that `no` is a
text, `2e-4` a number and `012` is twelve. Tags are refused, merge keys (`<<`) are keys like any
other: a config is data.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, StringMark, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent, NodeEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from lora_scripts.errors import Problem, UserError

Location = tuple[str | int, ...]

# YAML 1.2.2, section 10.3.2 "Tag Resolution" of the core schema. First match wins.
CORE_SCHEMA: tuple[tuple[re.Pattern[str], Callable[[str], Any]], ...] = (
    (re.compile(r"(?:null|Null|NULL|~|)\Z"), lambda text: None),
    (re.compile(r"(?:true|True|TRUE)\Z"), lambda text: True),
    (re.compile(r"(?:false|False|FALSE)\Z"), lambda text: False),
    (re.compile(r"[-+]?[0-9]{1,30}\Z"), int),
    (re.compile(r"0o[0-7]{1,30}\Z"), lambda text: int(text[2:], 8)),
    (re.compile(r"0x[0-9a-fA-F]{1,30}\Z"), lambda text: int(text[2:], 16)),
    (re.compile(r"[-+]?[0-9]{31,}\Z"), str),  # no field needs more; Python refuses beyond 4,300
    (re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z"), float),
    (re.compile(r"[-+]?\.(?:inf|Inf|INF)\Z"), lambda text: float(text.replace(".", "", 1))),
    (re.compile(r"\.(?:nan|NaN|NAN)\Z"), lambda text: float("nan")),
)
# What ruamel gives a node that has no tag of its own.
IMPLICIT_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in (
        "null",
        "bool",
        "int",
        "float",
        "str",
        "seq",
        "map",
        "timestamp",
        "merge",
        "value",
    )
)
MAX_DEPTH = 20
MAX_VALUES = 10_000  # aliases of aliases could otherwise grow without bound
MAX_LETTERS = 1 << 18  # a config has a few thousand; the parser needs a second for so many


@dataclass
class Document:
    """A parsed mapping: `values` as plain Python, `lines` from a location to a 1-based line.

    `problems` are in the order of the lines, each with its line.
    """

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[Location, int] = field(default_factory=dict)
    problems: list[tuple[int, Problem]] = field(default_factory=list)


def read_scalar(text: str) -> Any:
    """A plain (unquoted) scalar by the core schema: null, bool, int, float or the text itself."""
    for pattern, convert in CORE_SCHEMA:
        if pattern.match(text):
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
    document.values = _construct(root, (), document, name) or {}
    return document


def parse_value(text: str, name: str) -> Any:
    """One value, as on the right of a `key:` (used for command-line overrides)."""
    root = _compose(text, name)
    document = Document()
    value = None if root is None else _construct(root, (), document, name)
    if document.problems:
        raise UserError([problem for _, problem in document.problems])
    return value


def _compose(text: str, name: str) -> Node | None:
    if len(text) > MAX_LETTERS:
        what = f"{len(text):,} characters are too many for a config; at most {MAX_LETTERS:,}"
        raise UserError([Problem(name, what)])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReusedAnchorWarning)  # YAML 1.2 allows it
            _refuse_excess(text, name)
            return YAML(typ="safe", pure=True).compose(io.StringIO(text))
    except UserError:
        raise
    except MarkedYAMLError as error:
        raise UserError([_syntax_problem(error, text, name)]) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"not readable as YAML: the character U+{error.character:04X} is not allowed"
        raise UserError([Problem(f"{name} line {line}", what)]) from None
    except RecursionError:
        raise UserError([Problem(name, "not readable as YAML: nested too deep")]) from None
    except (YAMLError, ValueError, OverflowError) as error:  # the latter of numbers in escapes
        raise UserError([Problem(name, f"not readable as YAML: {_first_line(error)}")]) from None


def _refuse_excess(text: str, name: str) -> None:
    """Stop at the first value too deep, or too many: ruamel's time grows with their square."""
    depth = values = 0
    for event in YAML(typ="safe", pure=True).parse(io.StringIO(text)):
        depth += isinstance(event, CollectionStartEvent)
        depth -= isinstance(event, CollectionEndEvent)
        values += isinstance(event, NodeEvent)
        where = f"{name} line {event.start_mark.line + 1}"
        if depth > MAX_DEPTH + 1:
            raise _too_deep(where)
        if values > 2 * MAX_VALUES:  # a key counts, too
            raise _too_many(where)


def _too_deep(where: str) -> UserError:
    return UserError([Problem(where, f"nested more than {MAX_DEPTH} levels deep")])


def _too_many(where: str) -> UserError:
    return UserError([Problem(where, f"more than {MAX_VALUES} values")])


def _syntax_problem(error: MarkedYAMLError, text: str, name: str) -> Problem:
    """The place and the words for what ruamel's scanner or parser stumbled over."""
    mark: StringMark | None = error.problem_mark or error.context_mark
    said = error.problem or error.context or ""
    if mark is None:
        return Problem(name, f"not readable as YAML: {said}")
    line = _line(text, mark)
    indent = line[: len(line) - len(line.lstrip())]
    if "\t" in indent or line[mark.column : mark.column + 1] == "\t":
        what = "a tab stands here; YAML is indented with spaces only"
    elif "escape character" in said:
        what = "a backslash in double quotes is an escape; write paths with / or in single quotes"
    elif "another document" in said:
        what = "a second document begins here; a config is one document"
    elif "cannot start any token" in said:
        what = f"a value that begins with {line[mark.column : mark.column + 1]} must be in quotes"
    elif "mapping values are not allowed" in said:
        what = (
            "a colon too many, or this line does not fit the one above: is it indented otherwise, "
            f"or does that one lack its colon? `{_shorten(line)}`"
        )
    elif error.context_mark is not None and _is_unfinished(error):
        mark = error.context_mark
        missing = "its `: `" if "expected ':'" in said else "its closing quote or bracket"
        what = f"what begins here lacks {missing} in `{_shorten(_line(text, mark))}`"
    else:
        what = f"not readable as YAML: {said}: `{_shorten(line)}`"
    return Problem(f"{name} line {mark.line + 1}", what)


def _is_unfinished(error: MarkedYAMLError) -> bool:
    """An open quote or bracket, or a key without a colon: the place is where it begins."""
    words = ("end of stream", "document separator", "expected ':'", "expected ',' or")
    return any(word in (error.problem or "") for word in words)


def _line(text: str, mark: StringMark) -> str:
    lines = text.splitlines()
    return lines[mark.line] if mark.line < len(lines) else ""


def _shorten(line: str) -> str:
    line = line.strip()
    return line if len(line) <= 80 else f"{line[:79]}…"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _construct(node: Node, location: Location, document: Document, name: str) -> Any:
    document.lines.setdefault(location, node.start_mark.line + 1)
    line = node.start_mark.line + 1
    where = f"{name} line {line}"
    if len(location) > MAX_DEPTH:
        raise _too_deep(where)
    if len(document.lines) > MAX_VALUES:
        raise _too_many(where)
    if node.ctag.handle is not None or node.tag not in IMPLICIT_TAGS:
        tag = f"{node.ctag.handle}{node.ctag.suffix}" if node.ctag.handle else f"!<{node.tag}>"
        document.problems.append((line, Problem(where, f"the tag {tag} is not allowed; remove it")))
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
            return _joined(node.value, where, line, document)


def _joined(text: str, where: str, line: int, document: Document) -> str | None:
    r"""Two escapes of 16 bits, as JSON writes an emoji (`"\ud83d\ude00"`), are one character."""
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        what = "a character escape is half of a pair; write the character itself"
        document.problems.append((line, Problem(where, what)))
        return None


def _construct_mapping(
    node: MappingNode, location: Location, document: Document, name: str
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    first_line: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, ScalarNode):
            problem = Problem(f"{name} line {line}", "a key must be a plain word")
            document.problems.append((line, problem))
            continue
        key = key_node.value
        if key in values:
            what = f"{key} stands twice, first in line {first_line[key]}; keep one"
            document.problems.append((line, Problem(f"{name} line {line}", what)))
            continue
        first_line[key] = line
        document.lines[(*location, key)] = line
        values[key] = _construct(value_node, (*location, key), document, name)
    return values
