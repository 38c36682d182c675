"""Whatever bytes come in: records or a problem that names its place, and no other exception."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_scripts.data import conversations, records
from lora_scripts.errors import Problem

NAMES = ["a.png", "b.jpg", "图.webp"]
GOOD_CSV = (
    'file_name,text,id\na.png,"a red, ""big"" car",7\nb.jpg,一只猫,\n图.webp,"two\nlines",9\n'
)
GOOD_JSONL = "".join(
    json.dumps({"file_name": name, "text": f"{name} “红”", "n": 1}, ensure_ascii=ascii) + "\n"
    for name, ascii in zip(NAMES, (True, False, False), strict=True)
)
CALL = {"name": "look", "arguments": '{"city": "巴黎"}'}
GOOD_ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "你好"}]},
    {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
    {"instruction": "sum", "input": "1 2", "output": "3", "history": [["a", "b"]]},
    {"prompt": "p", "completion": "c", "system": "s"},
    {"text": "a raw text"},
    {"messages": [
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": CALL, "id": "1"}]},
        {"role": "tool", "content": "{}"}, {"role": "assistant", "content": "sun"},
    ], "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}]},
]  # fmt: skip
GOOD_TEXTS = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in GOOD_ROWS)
GOOD_TEXT_CSV = 'prompt,completion,history\n"one, two",three,"[[""a"", ""b""]]"\nvier,"fünf\n六",\n'

# What breaks files: marks of the formats, of encodings, and what editors leave in them.
BITS = [
    b'"', b",", b"\n", b"\r", b"\r\n", b"\0", b"\\", b"{", b"}", b"[", b"]", b":", b";", b"\t",
    b"\xff\xfe", b"\xef\xbb\xbf", b"\xc4\xe3", b"\x80", b"\xed\xa0\x80", b"\\ud800", b"\\u0000",
    b"null", b"NaN", b"1e999", b"-", b"../", b"C:", b"/etc/passwd", b"a.png", b'""', b" ",
    "“".encode(), "，".encode(), "\u2028".encode(), "\x85".encode(), b"file_name", b"text",
    b"9" * 5000, b"[" * 3000,
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, good: str, encodings: tuple[str, ...] = ("utf-8",)) -> bytes:
    """A good file with some places cut out, doubled, or with something put in."""
    data = good.encode(draw(st.sampled_from(encodings)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = at + draw(st.integers(0, 12))
        bit = draw(st.one_of(st.sampled_from([*BITS, data[at:end] * 2]), st.binary(max_size=4)))
        data = data[:at] + bit + data[end if draw(st.booleans()) else at :]
    return data


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gb18030")


@contextmanager
def pictures() -> Iterator[Path]:
    """A folder of the pictures that the good files name."""
    with TemporaryDirectory() as name:
        for number, file in enumerate(NAMES):
            Image.new("RGB", (8, 8), (number * 80, 0, 0)).save(Path(name, file))
        yield Path(name)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with pictures() as path:
        yield path


def check_problems(problems: list[Problem]) -> None:
    """Each names a place and says something; both can be written anywhere, on one line."""
    for problem in problems:
        assert problem.where.strip() and problem.what.strip()
        line = str(problem)
        line.encode("utf-8")
        assert "\n" not in line and "\0" not in line and "Traceback" not in line


def read_images(folder: Path, name: str, data: bytes) -> None:
    for old in folder.glob("metadata*"):
        old.unlink()
    (folder / name).write_bytes(data)
    found, problems = records.read_images(folder, None)
    check_problems(problems)
    assert found or any(problem.severity == "error" for problem in problems)
    for record in found:
        assert Path(record.file).parent == folder and record.name in NAMES
        record.caption.encode("utf-8")
        assert "\r" not in record.caption and record.where.startswith(f"{name} line ")
    named = [record.file for record in found]
    assert len(set(named)) == len(named)


def read_texts(folder: Path, name: str, data: bytes) -> None:
    path = folder / name
    path.write_bytes(data)
    found = conversations.read_texts(path, None)
    path.unlink()
    check_problems(found.problems)
    assert found.records or any(problem.severity == "error" for problem in found.problems)
    for record in found.records:
        assert record.where.startswith(name)
        json.dumps([record.messages, record.tools, record.text], ensure_ascii=False).encode("utf-8")
        if record.text is not None:
            assert record.text.strip() and not record.messages
        else:
            assert any(message["role"] == "assistant" for message in record.messages)
            assert all(isinstance(message["content"], str) for message in record.messages)


QUICK = settings(max_examples=150, deadline=None)
IMAGE_FILES = pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
TEXT_FILES = pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.json", "x.txt", "x.md"])


@IMAGE_FILES
@QUICK
@given(data=st.binary(max_size=60))
def test_any_bytes_beside_pictures(folder: Path, name: str, data: bytes) -> None:
    read_images(folder, name, data)


@TEXT_FILES
@QUICK
@given(data=st.binary(max_size=60))
def test_any_bytes_as_texts(folder: Path, name: str, data: bytes) -> None:
    read_texts(folder, name, data)


@QUICK
@given(data=mutated(GOOD_CSV, ENCODINGS))
def test_a_broken_csv_of_captions(folder: Path, data: bytes) -> None:
    read_images(folder, "metadata.csv", data)


@QUICK
@given(data=mutated(GOOD_JSONL, ENCODINGS))
def test_a_broken_jsonl_of_captions(folder: Path, data: bytes) -> None:
    read_images(folder, "metadata.jsonl", data)


@QUICK
@given(data=mutated(GOOD_TEXTS, ENCODINGS))
def test_a_broken_jsonl_of_texts(folder: Path, data: bytes) -> None:
    read_texts(folder, "x.jsonl", data)


@QUICK
@given(data=mutated(json.dumps(GOOD_ROWS, ensure_ascii=False, indent=1), ENCODINGS))
def test_a_broken_json_of_texts(folder: Path, data: bytes) -> None:
    read_texts(folder, "x.json", data)


@QUICK
@given(data=mutated(GOOD_TEXT_CSV, ENCODINGS))
def test_a_broken_csv_of_texts(folder: Path, data: bytes) -> None:
    read_texts(folder, "x.csv", data)


# --- values of any kind in the right places -----------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
    | st.text(max_size=6) | st.sampled_from(["user", "assistant", "system", "tool", "hi"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "tool_calls", "function", "name",
                         "arguments", "type", "text", "file_name", "id", "weight"]),
        inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
FIELDS = st.sampled_from(
    ["messages", "conversations", "instruction", "input", "output", "history", "prompt", "system",
     "completion", "text", "file_name", "tools", "functions", "question", "answer", "images",
     "chosen", "rejected", "metadata"]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(rows=st.lists(st.dictionaries(FIELDS, VALUES, max_size=4), min_size=1, max_size=3))
def test_rows_of_any_values(folder: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    read_texts(folder, "x.jsonl", lines.encode("utf-8"))
    read_texts(folder, "x.json", json.dumps(rows).encode("utf-8"))


@QUICK
@given(name=st.text(max_size=300), more=st.text("./\\ aC:", max_size=6))
def test_names_of_any_kind(folder: Path, name: str, more: str) -> None:
    read_images(folder, "metadata.jsonl", _line({"file_name": name + ".png", "text": "x"}))
    row = {"file_name": more + name + ".txt", "text": "an answer"}
    read_texts(folder, "x.jsonl", _line(row))


def _line(row: dict[str, str]) -> bytes:
    return json.dumps(row).encode("utf-8") + b"\n"


def test_what_these_tests_have_found(folder: Path) -> None:
    """Files that were once answered with an exception, or with nothing."""
    read_images(folder, "metadata.csv", b"file_name,text,id\n")
    read_texts(folder, "x.jsonl", _line({"file_name": "a" * 300 + ".txt", "text": "x"}))
    read_texts(folder, "x.jsonl", b'{"p\\ud800ompt": "x", "completion": "y"}\n')
    read_texts(folder, "x.jsonl", b'{"text": " "}\n')


# --- what is written is read back ---------------------------------------------------------------

CAPTION = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


@settings(max_examples=300, deadline=None)
@given(captions=st.tuples(CAPTION, CAPTION, CAPTION))
def test_any_captions_come_back_from_a_csv(folder: Path, captions: tuple[str, ...]) -> None:
    for old in folder.glob("metadata*"):
        old.unlink()
    records.write_csv(folder / "metadata.csv", zip(NAMES, captions, strict=True))
    found, problems = records.read_images(folder, None)
    assert all(problem.kind == "empty-caption" for problem in problems), problems
    expected = [text.replace("\r\n", "\n").replace("\r", "\n") for text in captions]
    assert [record.caption for record in found] == expected
    assert [record.name for record in found] == NAMES


def test_thousands_of_mutations_by_plain_chance(folder: Path) -> None:
    """Hypothesis looks closely at a few; this looks roughly at many."""
    chance = random.Random(6)
    for good, name, read in (
        (GOOD_CSV, "metadata.csv", read_images),
        (GOOD_JSONL, "metadata.jsonl", read_images),
        (GOOD_TEXTS, "x.jsonl", read_texts),
        (GOOD_TEXT_CSV, "x.csv", read_texts),
    ):
        for _ in range(500):
            data = bytearray(good.encode("utf-8"))
            for _ in range(chance.randint(1, 3)):
                at = chance.randrange(len(data))
                data[at : at + chance.randint(0, 3)] = chance.choice(BITS)
            read(folder, name, bytes(data))
