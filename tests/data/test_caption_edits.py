"""What the edits do to one caption, and that nothing else of a file changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_scripts.data import caption_files
from lora_scripts.data.caption_edits import Edits, edited, tags_of
from lora_scripts.data.metadata import READERS
from lora_scripts.errors import UserError

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("a, b, c", {"remove": ["B"]}, "a, c"),
    ("a, b, c", {"remove": ["a"]}, "b, c"),
    ("a , b,c,", {"remove": ["b"]}, "a ,c,"),
    ("long_hair, smile", {"remove": ["long hair"]}, "smile"),
    ("blurry", {"remove": ["blurry"]}, ""),
    ("blurry picture", {"remove": ["blurry"]}, "blurry picture"),  # no tag of its own
    ("a cat, cats, Cat", {"replace": [("cat", "dog")]}, "a dog, cats, Cat"),
    ("一辆红色的车", {"replace": [("红色", "蓝色")]}, "一辆蓝色的车"),
    ("a cat, a dog", {"replace": [("cat", "dog"), ("dog", "fox")]}, "a fox, a fox"),
    (r"a cat", {"replace": [("cat", r"\1 $x")]}, r"a \1 $x"),
    ("c++ code", {"replace": [("c++", "rust")]}, "rust code"),
    ("a car", {"add": ["zwx", "night"]}, "a car, zwx, night"),
    ("a car, ZWX", {"add": ["zwx"]}, "a car, ZWX"),
    ("a zwx car", {"add": ["zwx"]}, "a zwx car, zwx"),
    ("a car, ", {"add": ["zwx"]}, "a car, zwx"),
    ("  ", {"add": ["zwx"]}, "zwx"),
    ("a car", {"suffix": ", 4k"}, "a car, 4k"),
    ("a car, 4k", {"suffix": ", 4k"}, "a car, 4k"),
    ("a man", {"prefix": "portrait of "}, "portrait of a man"),
    ("portrait of a man", {"prefix": "portrait of "}, "portrait of a man"),
    ("a car", {"trigger": "zwx"}, "zwx, a car"),
    ("a ZWX car", {"trigger": "zwx"}, "a ZWX car"),
    ("", {"trigger": "zwx"}, "zwx"),
    ("a red car, blurry", {"trigger": "zwx", "prefix": "photo of ", "suffix": "!", "add": ["night"],
     "replace": [("red", "blue")], "remove": ["blurry"]}, "zwx, photo of a blue car, night!"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "edits", "after"), CASES)
def test_one_caption(before: str, edits: dict[str, Any], after: str) -> None:
    assert edited(before, Edits(**edits)) == after
    by_steps = before
    for _, step in Edits(**edits).each():
        by_steps = edited(by_steps, step)
    assert by_steps == after
    if "replace" not in edits:
        assert edited(after, Edits(**edits)) == after  # typed again it changes nothing


def test_tags() -> None:
    assert tags_of(" a,b c ,, ") == ["a", "b c"] and tags_of(" , ") == []


# --- files ----------------------------------------------------------------------------------------


def after(path: Path, content: str, old: str, new: str) -> str:
    """The file's bytes after one word is replaced in its captions, as text."""
    path.write_bytes(content.encode("utf-8"))
    (file,) = caption_files.plan(path, lambda caption: caption.replace(old, new))
    assert file.before == content and path.read_bytes() == content.encode("utf-8")
    return file.after


CSV = [
    ("a.png,a red car\nb.png,a cat\n", 'a.png,"a blue car"\nb.png,a cat\n'),
    ("a.png,a cat\r\nb.png,red", 'a.png,a cat\r\nb.png,"blue"'),
    ("\ufefffile_name,text\r\na.png,red\r\n", '\ufefffile_name,text\r\na.png,"blue"\r\n'),
    ('id,Text , file_name\n7 ,"red ""x""", "a.png"\n',
     'id,Text , file_name\n7 ,"blue ""x""", "a.png"\n'),
    ('a.png,"two\r\nred, lines"\r\nb.png,x\r\n', 'a.png,"two\r\nblue, lines"\r\nb.png,x\r\n'),
    ('a.png,x\n\naa.png,x\n a.jpg ,  red\n\n', 'a.png,x\n\naa.png,x\n a.jpg ,  "blue"\n\n'),
    ('图.png,"红 red，“x”"\n', '图.png,"红 blue，“x”"\n'),
    ('"a,red.png",red,\nb.png,x,\n', None),  # three cells where two are expected
]  # fmt: skip


@pytest.mark.parametrize(("before", "expected"), CSV)
def test_csv_cells_change_and_nothing_else(
    before: str, expected: str | None, tmp_path: Path
) -> None:
    if expected is None:
        with pytest.raises(UserError, match=r"metadata\.csv line 1: 3 fields found"):
            after(tmp_path / "metadata.csv", before, "red", "blue")
    else:
        assert after(tmp_path / "metadata.csv", before, "red", "blue") == expected


JSONL = [
    ('{"file_name": "a.png", "text": "red"}\n', '{"file_name": "a.png", "text": "blue"}\n'),
    ('\n{"id":1.50,"text" : "a \\"red\\"","file_name":"red.png" }\r\n',
     '\n{"id":1.50,"text" : "a \\"blue\\"","file_name":"red.png" }\r\n'),
    ('\ufeff{"text":"\\u7ea2 red","file":"a.png"}', '\ufeff{"text":"\\u7ea2 blue","file":"a.png"}'),
    ('{"text":"红 red","x":{"text":"red"},"file":"a.png"}',
     '{"text":"红 blue","x":{"text":"red"},"file":"a.png"}'),
    ('{"text": "old", "file": "a.png", "text": "red"}',
     '{"text": "old", "file": "a.png", "text": "blue"}'),
]  # fmt: skip


@pytest.mark.parametrize(("before", "expected"), JSONL)
def test_json_values_change_and_nothing_else(before: str, expected: str, tmp_path: Path) -> None:
    assert after(tmp_path / "metadata.jsonl", before, "red", "blue") == expected


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("a red car", "a blue car"),
        ("\ufeff a red\r\ncar \r\n", "\ufeff a blue\r\ncar \r\n"),
        ("一辆 red 车\n", "一辆 blue 车\n"),
    ],
)
def test_text_files(before: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "README.txt").write_text("red", encoding="utf-8")
    (tmp_path / "a.txt").write_bytes(before.encode("utf-8"))
    (file,) = caption_files.plan(tmp_path, lambda caption: caption.replace("red", "blue"))
    assert file.path == tmp_path / "a.txt" and file.after == expected


WORDS = st.text(st.sampled_from('ab红,"\n \r\t“;'), max_size=12)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5), data=st.data())
def test_any_csv_that_is_read_is_edited_exactly(
    rows: list[tuple[str, str]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every caption is what was wanted, and every other cell as before: read by the real reader."""
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    lines = ["id,file_name,text"]
    for number, (extra, caption) in enumerate(rows):
        cells = [
            '"' + text.replace('"', '""') + '"' if '"' in text or data.draw(st.booleans())
            or any(c in text for c in ',\r\n') or text != text.strip() else text
            for text in (extra, f"{number}.png", caption)
        ]  # fmt: skip
        lines.append(",".join(cells))
    text = end.join(lines) + end
    path = tmp_path_factory.mktemp("csv") / "metadata.csv"
    path.write_bytes(text.encode("utf-8"))
    (file,) = caption_files.plan(path, lambda caption: caption.replace("a", "“\nb,"))
    read = list(READERS[".csv"](text, "metadata.csv", ["text", "id"]))
    again = list(READERS[".csv"](file.after, "metadata.csv", ["text", "id"]))
    assert [row.caption.replace("a", "“\nb,") for row in read] == [row.caption for row in again]  # type: ignore[union-attr]
    assert [row[1:2] + row[3:] for row in read] == [row[1:2] + row[3:] for row in again]  # type: ignore[index]


# --- what is refused ------------------------------------------------------------------------------


def refused(path: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        caption_files.plan(path, lambda caption: caption + "!")
    return [str(problem) for problem in caught.value.problems]


def test_every_bad_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metadata.csv"
    path.write_text('a.png,x\nb.png,y,z\nc.png,"open\n', encoding="utf-8")
    second, third = refused(path)
    assert second.startswith("metadata.csv line 2: 3 fields found")
    assert third.startswith("metadata.csv line 3: unbalanced quotes")
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "a.png"}\nx\n', encoding="utf-8")
    assert [what[:22] for what in refused(path)] == [
        "metadata.jsonl line 1:",
        "metadata.jsonl line 2:",
    ]


def test_files_that_hold_no_captions(tmp_path: Path) -> None:
    assert "there is no such file or folder" in refused(tmp_path / "gone.csv")[0]
    assert "no captions found" in refused(tmp_path)[0]
    (tmp_path / "a.csv").write_text("", encoding="utf-8")
    assert "there is no row in it" in refused(tmp_path / "a.csv")[0]
    (tmp_path / "a.json").write_text("[]", encoding="utf-8")
    assert "is no file of captions; expected a metadata.csv" in refused(tmp_path / "a.json")[0]
    (tmp_path / "gbk.csv").write_bytes("a.png,红色的汽车停在路边\n".encode("gbk"))
    assert "the file is not UTF-8" in refused(tmp_path / "gbk.csv")[0]
    (tmp_path / "1.png").touch()
    (tmp_path / "2.png").touch()
    (tmp_path / "1.txt").write_bytes(b"\xff\xfea\0")
    (tmp_path / "2.txt").write_bytes(b"fine")
    assert refused(tmp_path) == ["1.txt: the file seems to be UTF-16; save it as UTF-8"]
