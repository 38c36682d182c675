"""YAML 1.2 as people type it: what a scalar means, where a key stands, what is refused."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_scripts import yaml_source
from lora_scripts.errors import UserError

NAME = "my.yaml"


def refused(text: str) -> str:
    """What is said about a text that cannot be read at all."""
    with pytest.raises(UserError) as caught:
        yaml_source.parse(text, NAME)
    return str(caught.value)


def said(text: str) -> list[str]:
    """What is said about a text that can be read, but for some places."""
    return [str(problem) for _, problem in yaml_source.parse(text, NAME).problems]


# --- scalars ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("tRue", "tRue"),
        ("", None),
        ("~", None),
        ("null", None),
        ("012", 12),
        ("-3", -3),
        ("+3", 3),
        ("0x1F", 31),
        ("0o17", 15),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("2e-4", 0.0002),
        ("1e5", 100000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.5E+2", -50.0),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("1e999", math.inf),
        ("v1-5-pruned.safetensors", "v1-5-pruned.safetensors"),
        ("<lora:style_v1>", "<lora:style_v1>"),
        ("'012'", "012"),
        ('"2e-4"', "2e-4"),
        ("'D:\\train'", "D:\\train"),
        ("D:\\train", "D:\\train"),
        ('"赛博朋克"', "赛博朋克"),
        ('"\\u8d5b \\ud83d\\ude00"', "赛 😀"),
        ("5 # five", 5),
        ("a#b", "a#b"),
        ("9" * 5000, "9" * 5000),
        ("0x" + "f" * 5000, "0x" + "f" * 5000),
    ],
)
def test_scalar(written: str, meant: Any) -> None:
    for found in (
        yaml_source.parse(f"key: {written}\n", NAME).values["key"],
        yaml_source.parse_value(written, "command line"),
    ):
        assert found == meant
        assert type(found) is type(meant)


def test_not_a_number() -> None:
    assert math.isnan(yaml_source.parse("key: .nan", NAME).values["key"])


def test_yaml_1_1_directive_changes_nothing() -> None:
    text = "%YAML 1.1\n---\na: no\nb: 012\n"
    assert yaml_source.parse(text, NAME).values == {"a": "no", "b": 12}


@given(st.integers(-(10**29), 10**29) | st.floats(allow_nan=False) | st.booleans() | st.none())
def test_json_scalars_are_read_as_they_are(value: Any) -> None:
    written = json.dumps(value).replace("-Infinity", "-.inf").replace("Infinity", ".inf")
    found = yaml_source.read_scalar(written)
    assert found == value
    assert type(found) is type(value)


# --- places -----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines(end: str) -> None:
    text = "# first\na: 1\n\nb:\n  - x\n  - c: 2\n    d: 3\ne: {f: 4,\n  g: 5}\n"
    document = yaml_source.parse(text.replace("\n", end), NAME)
    assert document.values == {"a": 1, "b": ["x", {"c": 2, "d": 3}], "e": {"f": 4, "g": 5}}
    places = {".".join(map(str, place)): line for place, line in document.lines.items() if place}
    assert places == {
        "a": 2, "b": 4, "b.0": 5, "b.1": 6, "b.1.c": 6, "b.1.d": 7, "e": 8, "e.f": 8, "e.g": 9,
    }  # fmt: skip


def test_anchor_stands_for_its_value() -> None:
    document = yaml_source.parse("a: &x [1, {b: 2}]\nc: *x\n", NAME)
    assert document.values["c"] == [1, {"b": 2}]
    assert document.values["c"] is not document.values["a"]
    assert document.lines["c",] == 2


def test_an_anchor_may_be_used_again() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        document = yaml_source.parse("a: &x 1\nb: *x\nc: &x 2\nd: *x\n", NAME)
    assert document.values == {"a": 1, "b": 1, "c": 2, "d": 2}


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "\ufeff"])
def test_nothing_written(text: str) -> None:
    assert yaml_source.parse(text, NAME).values == {}


def test_document_markers_and_byte_order_mark() -> None:
    assert yaml_source.parse("\ufeff---\na: 1\n...\n", NAME).values == {"a": 1}


# --- what is refused, with its place --------------------------------------------------------------


def test_every_duplicate_is_told() -> None:
    text = "a: 1\nb: 2\na: 3\nc: {d: 1,\n  d: 2}\na: 4\n"
    assert said(text) == [
        "my.yaml line 3: a stands twice, first in line 1; keep one",
        "my.yaml line 5: d stands twice, first in line 4; keep one",
        "my.yaml line 6: a stands twice, first in line 1; keep one",
    ]
    assert yaml_source.parse(text, NAME).values["a"] == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [("a:\n\tb: 1\n", 2), ("\ta: 1\n", 1), ("a: 1\nb:\n  - x\n\t- y\n", 4)],
)
def test_tab(text: str, line: int) -> None:
    assert (
        refused(text)
        == f"my.yaml line {line}: a tab stands here; YAML is indented with spaces only"
    )


@pytest.mark.parametrize(
    "value",
    [
        "!!str 5",
        "!!python/object/apply:os.system ['echo']",
        "!!python/name:os.system",
        "!<tag:yaml.org,2002:python/name:os.system>",
        "!include other.yaml",
        "!foo {a: 1}",
        "&x !foo 5",
    ],
)
def test_tag(value: str) -> None:
    (problem,) = said(f"a: 1\nb: {value}\n")
    assert problem.startswith("my.yaml line 2: the tag !")
    with pytest.raises(UserError, match="the tag !"):
        yaml_source.parse_value(value, "command line: b")


def test_tag_on_the_whole_document() -> None:
    assert said("!config\na: 1\n") == ["my.yaml line 1: the tag !config is not allowed; remove it"]


def test_merge_key_is_a_key_like_any_other() -> None:
    assert yaml_source.parse("x: &a {q: 1}\n<<: *a\n", NAME).values == {
        "x": {"q": 1},
        "<<": {"q": 1},
    }


def test_bombs_are_stopped() -> None:
    levels = [
        f"{name}: &{name} [{', '.join([f'*{below}'] * 10)}]"
        for below, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    assert "more than 10000 values" in refused("\n".join(["a: &a [x, x]", *levels]))
    assert "nested more than 20 levels" in refused("a: &a [*a]")
    assert "nested more than 20 levels" in refused(f"a: {'[' * 30}{']' * 30}")
    assert "nested more than 20 levels" in refused("a: " + "[" * 5000)
    assert "more than 10000 values" in refused("a: {" + "b," * 50_000 + "}")
    assert "300,003 characters are too many" in refused("a: " + "b" * 300_000)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('a: 1\nb: "C:\\pics\\new"\n', "line 2: a backslash in double quotes is an escape; write"),
        ("a: 1\n---\nb: 2\n", "line 2: a second document begins here; a config is one document"),
        ("a: 1\n...\nb: 2\n", "line 3: a second document begins here"),
        ("- a\n- b\n", "line 1: the file must be a list of `key: value` lines"),
        ("just words\n", "line 1: the file must be a list of `key: value` lines"),
        ("null\n", "line 1: the file must be a list of `key: value` lines"),
        ("a: @x\n", "line 1: a value that begins with @ must be in quotes"),
        ("a: 50\nb: %x\n", "line 2: a value that begins with % must be in quotes"),
        ("a: one: two\n", "line 1: a colon too many, or this line does not fit"),
        (
            "lora_rank 5\nb: 2\n",
            "line 2: a colon too many, or this line does not fit the one above",
        ),
        ("a: 1\n  b: 2\n", "line 2: a colon too many, or this line does not fit the one above"),
        ("a: 2\nlora_rank:5\n", "line 2: what begins here lacks its `: ` in `lora_rank:5`"),
        ('a: "x\nb: 1\n', 'line 1: what begins here lacks its closing quote or bracket in `a: "x`'),
        ("a: [1, 2\nb: 3\n", "line 1: what begins here lacks its closing quote or bracket"),
        ("a: *x\n", "line 1: not readable as YAML: found undefined alias 'x'"),
        ("a: 1\nb: \0\n", "line 2: not readable as YAML: the character U+0000 is not allowed"),
        ('a: "\\UFFFFFFFF"\n', "my.yaml: not readable as YAML"),
        (f"%YAML 1.{'1' * 5000}\n---\na: 1\n", "my.yaml: not readable as YAML"),
    ],
)
def test_refused(text: str, what: str) -> None:
    assert what in refused(text)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: 1\n? [b]\n: 2\n", "my.yaml line 2: a key must be a plain word"),
        ('a: 1\nb: "\\ud83d"\n', "my.yaml line 2: a character escape is half of a pair"),
    ],
)
def test_said(text: str, what: str) -> None:
    (problem,) = said(text)
    assert problem.startswith(what)
    assert yaml_source.parse(text, NAME).values["a"] == 1


@given(st.text() | st.text("ab:-[]{}&*!|>'\"%@#\\, \n\t~<?.015eExu", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (yaml_source.parse, yaml_source.parse_value):
        try:
            read(text, NAME)
        except UserError as error:
            assert error.problems
