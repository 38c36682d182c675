from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lora_scripts.data.records import Record, read_images, write_csv
from lora_scripts.errors import Problem

NAMES = ("img01.jpg", "img02.png", "图03.webp", "sub/IMG04.JPEG", "img05.bmp")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of images; their content is nobody's business here."""
    folder = tmp_path / "赛博朋克 城市"
    (folder / "sub").mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_bytes(b"")
    return folder


def read(folder: Path, text: str | bytes, file: str = "metadata.csv") -> tuple[list[Record], str]:
    """The records of a metadata file, and its problems as printed (without unnamed images)."""
    data = text.encode("utf-8") if isinstance(text, str) else text
    (folder / file).write_bytes(data)
    records, problems = read_images(folder, folder / file)
    kept = [problem for problem in problems if "not named in it" not in problem.what]
    for problem in kept:
        str(problem).encode("utf-8")
    return records, "\n".join(f"{problem.severity} {problem}" for problem in kept)


def captions(records: list[Record]) -> dict[str, str]:
    return {record.name: record.caption for record in records}


# --- what is read -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    ["", "file_name,text\n", "Image , Caption\n", '"filename","prompt"\n', "\n\nfile_name,text\n"],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_csv(folder: Path, header: str, end: str, bom: str) -> None:
    body = (
        'img01.jpg,"cyberpunk cityscape with neon lights"\n'
        "img02.png,plain caption\n"
        "\n"
        '图03.webp,"quoted, with a ""word"", and\n\nthree lines"\n'
        'sub\\IMG04.JPEG, "a space, before the quote"'
    )
    records, said = read(folder, bom + (header + body).replace("\n", end))
    assert said == ""
    before = header.count("\n")
    assert records == [
        Record(
            str(folder / "img01.jpg"),
            "cyberpunk cityscape with neon lights",
            f"metadata.csv line {before + 1}",
        ),
        Record(str(folder / "img02.png"), "plain caption", f"metadata.csv line {before + 2}"),
        Record(
            str(folder / "图03.webp"),
            'quoted, with a "word", and\n\nthree lines',
            f"metadata.csv line {before + 4}",
        ),
        Record(
            str(folder / "sub/IMG04.JPEG"),
            "a space, before the quote",
            f"metadata.csv line {before + 7}",
        ),
    ]


def test_csv_columns_in_another_order_and_more_of_them(folder: Path) -> None:
    records, said = read(folder, "text,tags,file_name\na cat,cat,img01.jpg\n")
    assert captions(records) == {"img01.jpg": "a cat"}
    assert said == ('warning metadata.csv line 1: not used: "tags" (read: file name and caption)')


def test_a_lora_identifier_is_text(folder: Path) -> None:
    records, said = read(folder, "img01.jpg,<lora:style_v1> a cat\n")
    assert captions(records) == {"img01.jpg": "<lora:style_v1> a cat"} and said == ""


def test_jsonl(folder: Path) -> None:
    text = (
        '\ufeff{"file_name": "img01.jpg", "text": "a, \\"b\\"\\nc"}\r\n'
        "\r\n"
        '{"caption": "猫", "image": "图03.webp", "score": 1}\r\n'
    )
    records, said = read(folder, text, "metadata.jsonl")
    assert records == [
        Record(str(folder / "img01.jpg"), 'a, "b"\nc', "metadata.jsonl line 1"),
        Record(str(folder / "图03.webp"), "猫", "metadata.jsonl line 3"),
    ]
    assert said.startswith('warning metadata.jsonl: not used: "score"')


def test_sidecars(folder: Path) -> None:
    (folder / "img01.txt").write_bytes("\ufeff一只猫, neon\r\nlights\r\n".encode())
    (folder / "img02.caption").write_text("a dog", encoding="utf-8")
    (folder / "图03.TXT").write_text("a bird\n", encoding="utf-8")
    (folder / "sub/IMG04.txt").write_text(" \n", encoding="utf-8")
    (folder / "readme.txt").write_text("not a caption", encoding="utf-8")
    records, problems = read_images(folder, None)
    assert records == [
        Record(str(folder / "img01.jpg"), "一只猫, neon\nlights", "img01.txt"),
        Record(str(folder / "img02.png"), "a dog", "img02.caption"),
        Record(str(folder / "img05.bmp"), "", "img05.bmp"),
        Record(str(folder / "图03.webp"), "a bird", "图03.TXT"),
        Record(str(folder / "sub/IMG04.JPEG"), "", "sub/IMG04.txt"),
    ]
    assert problems == [
        Problem("sub/IMG04.txt", "the caption is empty", "warning", "empty-caption"),
        Problem(
            str(folder),
            "1 image (img05.bmp) without a .txt file beside them: their captions are empty",
            "warning",
            "captions-missing",
        ),
    ]
    (folder / "img01.txt").write_bytes("赛博朋克".encode("gbk"))
    records, problems = read_images(folder, None)
    assert len(records) == 4
    assert problems[0].where == "img01.txt" and "GBK" in problems[0].what


def test_which_file_is_read(folder: Path) -> None:
    (folder / "img01.txt").write_text("sidecar", encoding="utf-8")
    assert read_images(folder, None)[0][0].caption == "sidecar"
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "img01.jpg", "text": "jsonl"}', encoding="utf-8"
    )
    assert read_images(folder, None)[0][0].caption == "jsonl"
    (folder / "metadata.csv").write_text("img01.jpg,csv", encoding="utf-8")
    assert read_images(folder, None)[0][0].caption == "csv"
    elsewhere = folder.parent / "mine.jsonl"
    elsewhere.write_text('{"file_name": "img01.jpg", "text": "mine"}', encoding="utf-8")
    (record,), _ = read_images(folder, elsewhere)
    assert record == Record(str(folder / "img01.jpg"), "mine", "mine.jsonl line 1")


def test_unicode_forms_of_one_name_are_one_name(folder: Path) -> None:
    (folder / "cafe\u0301.png").write_bytes(b"")
    records, said = read(folder, "caf\u00e9.png,x")
    assert said == "" and len(records) == 1 and Path(records[0].file).exists()


# --- what is refused: each fault, its line, and what is said ------------------------------------

CSV_FAULTS: dict[str, tuple[str | bytes, str]] = {
    "an unquoted comma": (
        "img01.jpg,a cat, a dog\n",
        "error metadata.csv line 1: 3 fields found, expected 2; a caption that holds a comma needs "
        'quotes: img01.jpg,"a cat, a dog"',
    ),
    "typographic quotes": ("img01.jpg,“a cat, a dog”", "(straight quotes, not “ ”)"),
    "no caption": (
        "img02.png,x\nimg01.jpg\n",
        "line 2: 1 field found, expected 2; expected the file name, a comma, the caption: "
        'img01.jpg,"a caption"',
    ),
    "semicolons": ("img01.jpg;a cat", "separated by a comma, found a semicolon"),
    "tabs": ("img01.jpg\ta cat", "separated by a comma, found a tab"),
    "full-width comma": ("img01.jpg，一只猫", "found a full-width comma"),
    "a quote never closed": (
        'img02.png,x\nimg01.jpg,"a cat\n',
        'line 2: unbalanced quotes in "img01.jpg,"a cat"; a caption that begins with a quote ends '
        'with one, and a quote inside it is written twice: img01.jpg,"a cat"',
    ),
    "a quote never opened": ('img01.jpg,a cat"', "line 1: unbalanced quotes"),
    "inner quotes not doubled": (
        'img01.jpg,"a "big" cat"',
        'written twice: img01.jpg,"a ""big"" cat"',
    ),
    "a quote open over the next row": (
        'img01.jpg,"a cat\nimg02.png,"a dog"\n',
        "line 1: unbalanced quotes",
    ),
    "an inch mark": ('img01.jpg,a 5" disk', 'img01.jpg,"a 5"" disk"'),
    "no file name": (",a cat", "line 1: the file name is empty"),
    "a file that is not there": (
        "blue.png,x",
        'error metadata.csv line 1: "blue.png" is not there',
    ),
    "a typing mistake": ("img0l.jpg,x", 'is not there; the nearest is "img01.jpg"'),
    "a space": ("img01.jpg ,x", "expected one of .png, .jpg, .jpeg, .webp, .bmp; the nearest is"),
    "another case": ("IMG01.jpg,x", 'nearest is "img01.jpg": upper and lower case differ'),
    "another extension": ("img01.png,x", 'nearest is "img01.jpg": the extension differs'),
    "no extension": (
        "img01,x",
        "extension none, expected one of .png, .jpg, .jpeg, .webp, .bmp; "
        'the nearest is "img01.jpg": with its extension',
    ),
    "another folder": ("IMG04.JPEG,x", 'nearest is "sub/IMG04.JPEG": in another folder'),
    "an unknown kind": ("img01.gif,x", 'extension ".gif", expected one of .png'),
    "upwards": ("../img01.jpg,x", '"../img01.jpg" leaves the folder of images'),
    "upwards in the middle": ("sub\\..\\..\\img01.jpg,x", "leaves the folder"),
    "absolute": ("/tmp/img01.jpg,x", "leaves the folder"),
    "a drive": ("C:\\data\\img01.jpg,x", "leaves the folder"),
    "a server": ("\\\\server\\data\\img01.jpg,x", "leaves the folder"),
    "a name twice": (
        "img01.jpg,x\n./img01.jpg,y",
        'line 2: "./img01.jpg" was already named in metadata.csv line 1; keep one row',
    ),
    "an empty caption": ("img01.jpg,\n", 'warning metadata.csv line 1: the caption of "img01.jpg"'),
    "nothing": ("", "error metadata.csv: there is no row in it"),
    "a header only": ("file_name,text\n", "there is no row in it"),
    "UTF-16": ("img01.jpg,x".encode("utf-16"), "metadata.csv: the file seems to be UTF-16"),
    "UTF-16 without BOM": ("img01.jpg,x".encode("utf-16-le"), "seems to be UTF-16"),
    "GBK": (
        "img01.jpg,x\nimg02.png,赛博朋克城市".encode("gbk"),
        "first bad byte in line 2); it seems to be GBK",
    ),
    "Latin-1": (
        "img01.jpg,un caf\u00e9".encode("latin-1"),
        "Windows-1252, as Western European Windows writes it; save it as UTF-8",
    ),
    "Shift-JIS": ("img01.jpg,夜の街".encode("shift_jis"), "Shift-JIS, as Japanese Windows"),
    "Big5": ("img01.jpg,賽博龐克城市".encode("big5"), "Big5, as Windows in Taiwan"),
    "a control character": ("img\x1b01.jpg,x", '"img\\x1b01.jpg" is not there'),
}


@pytest.mark.parametrize("fault", CSV_FAULTS)
def test_csv_faults(folder: Path, fault: str) -> None:
    text, expected = CSV_FAULTS[fault]
    _, said = read(folder, text)
    assert expected in said
    assert said.count("\n") == 0  # one fault, one problem


def test_a_quote_that_only_a_later_row_closes(folder: Path) -> None:
    records, said = read(folder, 'img01.jpg,"a cat\nimg02.png,a dog\nimg05.bmp,b"\n')
    assert captions(records) == {"img02.png": "a dog"}
    first, second = said.splitlines()
    assert first == (
        "error metadata.csv line 1: a quote opens here and is still open in line 2, where "
        '"img02.png,a dog" seems to begin a new row'
    )
    assert second.startswith("error metadata.csv line 3: unbalanced quotes")


def test_rows_must_be_as_wide_as_the_header(folder: Path) -> None:
    _, said = read(folder, "file_name,text,x\nimg01.jpg,a,b,c\nimg02.png,a\nimg05.bmp,a,b")
    _, first, second = said.splitlines()
    assert first.startswith(
        "error metadata.csv line 2: 4 fields found, expected 3 as in the header"
    )
    assert second.startswith("error metadata.csv line 3: 2 fields found, expected 3 as in")


JSONL_FAULTS = {
    "not JSON": ("{'file_name': 1}", "line 1: not valid JSON ("),
    "a list": ('[\n{"file_name": "img01.jpg", "text": "x"}\n]', "metadata.jsonl: this is one JSON"),
    "a text": ('"img01.jpg"', "line 1: found a text; expected an object"),
    "a number": ("\n12", "line 2: found a number; expected an object"),
    "no name": ('{"text": "x"}', 'no "file_name"; found "text"'),
    "no text": ('{"file_name": "img01.jpg"}', 'no "text"; found "file_name"'),
    "an empty object": ("{}", 'no "file_name"; found no key'),
    "text null": ('{"file_name": "img01.jpg", "text": null}', '"text" is null; expected a text'),
    "text number": ('{"file_name": "img01.jpg", "caption": 3}', '"caption" is a number'),
    "text list": ('{"file_name": "img01.jpg", "text": ["a"]}', '"text" is a list'),
    "name boolean": ('{"file_name": true, "text": "x"}', '"file_name" is true'),
    "half a character": ('{"file_name": "img01.jpg", "text": "\\ud83d"}', "broken character"),
    "half a character in the name": ('{"file_name": "\\ud83d.jpg", "text": ""}', "\\ud83d"),
    "nesting": ("[" * 3 + "\n", "one JSON list"),
    "deep nesting": ('{"text":' * 100_000, "line 1: not usable as JSON"),
    "a huge number": ('{"text": ' + "1" * 5000 + "}", "line 1: not usable as JSON"),
    "not there": ('{"file_name": "img01.jpeg", "text": "x"}', "the extension differs"),
    "empty": ('{"file_name": "img01.jpg", "text": ""}', "warning metadata.jsonl line 1: the capt"),
}


@pytest.mark.parametrize("fault", JSONL_FAULTS)
def test_jsonl_faults(folder: Path, fault: str) -> None:
    text, expected = JSONL_FAULTS[fault]
    _, said = read(folder, text, "metadata.jsonl")
    assert expected in said
    assert said.count("\n") == 0


def test_all_problems_at_once_and_the_good_rows(folder: Path) -> None:
    text = 'file_name,text\nimg01.jpg,a, b\nimg02.png,"good\ntwo lines"\nimg5.bmp,x\n图03.webp,"y\n'
    records, said = read(folder, text)
    assert captions(records) == {"img02.png": "good\ntwo lines"}
    assert [line.split(":")[0] for line in said.splitlines()] == [
        "error metadata.csv line 2",
        "error metadata.csv line 5",
        "error metadata.csv line 6",
    ]


def test_images_that_are_not_named(folder: Path) -> None:
    (folder / "metadata.csv").write_text("img01.jpg,x\n", encoding="utf-8")
    _, problems = read_images(folder, None)
    what = (
        "4 images (img02.png, img05.bmp, 图03.webp and 1 more) in the folder not named in it: "
        "they are not used"
    )
    assert problems == [Problem("metadata.csv", what, "warning", "image-not-named")]


def test_metadata_path_that_is_not_there(folder: Path) -> None:
    records, (problem,) = read_images(folder, folder / "meta.csv")
    assert records == [] and problem.where == str(folder / "meta.csv")
    assert "there is no such file" in problem.what and "tools/auto_label.py" in problem.what
    (folder / "metadata.jsonl").write_text("", encoding="utf-8")
    _, (problem,) = read_images(folder, folder / "meta.csv")
    assert problem.what.endswith(f"Found instead: {folder / 'metadata.jsonl'}")
    (folder / "meta.json").write_text("[]", encoding="utf-8")
    _, (problem,) = read_images(folder, folder / "meta.json")
    assert "expected a .csv or a .jsonl" in problem.what


def test_folders_that_do_not_serve(folder: Path) -> None:
    _, (problem,) = read_images(folder / "nowhere", None)
    assert "there is no such folder" in problem.what
    _, (problem,) = read_images(folder / "img01.jpg", None)
    assert "this is a file" in problem.what
    (folder / "empty").mkdir()
    (folder / "empty" / ".hidden.png").write_bytes(b"")
    (folder / "empty" / "photo.HEIC").write_bytes(b"")
    _, problems = read_images(folder / "empty", None)
    assert [problem.severity for problem in problems] == ["warning", "error"]
    assert "1 image (photo.HEIC) of a kind that is not read" in problems[0].what
    assert "no image found; expected files in .png" in problems[1].what


def test_no_captions_at_all_is_an_error_with_the_command(folder: Path) -> None:
    (folder / "readme.txt").write_text("no caption", encoding="utf-8")
    records, (problem,) = read_images(folder, None)
    assert len(records) == len(NAMES) and problem.severity == "error"
    assert f"python tools/auto_label.py --input {folder}" in problem.what


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_links(folder: Path) -> None:
    outside = folder.parent / "secret.png"
    outside.write_bytes(b"")
    (folder / "out.png").symlink_to(outside)
    (folder / "in.png").symlink_to(folder / "img02.png")
    (folder / "lost.png").symlink_to(folder / "nothing.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "linked").symlink_to(folder.parent)
    records, said = read(folder, "in.png,a\nout.png,b\nlost.png,c\nloop.png,d\n")
    assert captions(records) == {"in.png": "a"}
    assert 'line 2: "out.png": this link leads out of the folder' in said
    assert 'line 3: "lost.png": this link leads nowhere' in said
    assert 'line 4: "loop.png": this link leads nowhere' in said
    assert f"warning {folder / 'linked'}: is a link to another folder" in said
    (folder / "metadata.csv").unlink()
    (folder / "img01.txt").write_text("x", encoding="utf-8")
    _, problems = read_images(folder, None)
    errors = [problem.where for problem in problems if problem.severity == "error"]
    assert errors == ['"loop.png"', '"lost.png"', '"out.png"']
    # the folder itself may be a link
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert not [p for p in read_images(link, None)[1] if "img01" in p.where]


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_file_names_in_another_encoding(folder: Path) -> None:
    raw = os.fsencode(folder) + b"/" + "赛博".encode("gbk") + b".png"
    Path(os.fsdecode(raw)).write_bytes(b"")
    (folder / "img01.txt").write_text("x", encoding="utf-8")
    _, problems = read_images(folder, None)
    (error,) = [problem for problem in problems if problem.severity == "error"]
    assert "not valid UTF-8" in error.what
    str(error).encode("utf-8")


def test_many_missing_files_do_not_take_long(folder: Path) -> None:
    for index in range(2000):
        (folder / f"picture_{index:05d}.png").write_bytes(b"")
    _, said = read(folder, "".join(f"picture_{index:05d}x.png,x\n" for index in range(2000)))
    assert said.count("is not there") == 2000


# --- whatever bytes: records or problems ------------------------------------------------------

PIECES = st.sampled_from(
    b'img01.jpg|img02.png|,|"|\n|\r\n|\r| |a|\\|..|/|.png|file_name|text|\xef\xbb\xbf|\xff|\0|'
    b'\xe5\x9b\xbe|\x1c|;|{|{"file_name": "img01.jpg", "text": "|"}|[|null|1|:|}'.split(b"|")
)
ANY_BYTES = st.binary(max_size=200) | st.lists(PIECES, max_size=40).map(b"".join)
anything = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@anything
@given(data=ANY_BYTES, suffix=st.sampled_from([".csv", ".jsonl"]))
@example(data=b".,x", suffix=".csv")
@example(data=b"/,x", suffix=".csv")
@example(data=b'img01.jpg,"' + b"a" * 200_000, suffix=".csv")
def test_any_bytes(folder: Path, data: bytes, suffix: str) -> None:
    file = f"metadata{suffix}"
    records, said = read(folder, data, file)
    assert records or said
    for record in records:
        assert Path(record.file).is_file() and record.where.startswith(f"{file} line ")
        record.caption.encode("utf-8")
    assert len({record.file for record in records}) == len(records)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@settings(anything, max_examples=80)
@given(first=TEXT, second=TEXT | st.just(' a "b", c\r\nd'))
def test_write_csv_is_read_back(folder: Path, first: str, second: str) -> None:
    write_csv(folder / "metadata.csv", [("img01.jpg", first), ("sub/IMG04.JPEG", second)])
    records, _ = read_images(folder, None)
    expected = [text.replace("\r\n", "\n").replace("\r", "\n") for text in (first, second)]
    assert [record.caption for record in records] == expected
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_write_csv(folder: Path) -> None:
    path = folder / "metadata.csv"
    (folder / ' odd, "name".png').write_bytes(b"")
    write_csv(path, [("img01.jpg", "a, b"), (' odd, "name".png', 'the "x"')])
    assert path.read_bytes() == (
        b'file_name,text\nimg01.jpg,"a, b"\n" odd, ""name"".png","the ""x"""\n'
    )
    records, _ = read_images(folder, None)
    assert captions(records) == {"img01.jpg": "a, b", ' odd, "name".png': 'the "x"'}
    before = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write_csv(path, [("img01.jpg", "\ud800")])
    assert path.read_bytes() == before
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


# --- further captions, kohya's folders --------------------------------------------------------


def test_captions_of_several_columns(folder: Path) -> None:
    text = "file_name,text,tags,short\nimg01.jpg,long,a b,\nimg02.png,,,\n"
    (folder / "metadata.csv").write_text(text, encoding="utf-8")
    records, problems = read_images(folder, None, ["tags", "short"])
    assert [record.captions for record in records] == [("a b",), ("",)]
    assert [problem.severity for problem in problems].count("error") == 0
    assert any("img02.png" in p.what and "empty" in p.what for p in problems)
    records, _ = read_images(folder, None, ["text", "tags"])
    assert records[0].captions == ("long", "a b")


def test_a_caption_column_that_is_not_there(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text\nimg01.jpg,a\n", encoding="utf-8")
    records, problems = read_images(folder, None, ["tags"])
    assert records == []
    assert 'no column "tags", which caption_keys needs' in str(problems[-1])
    (folder / "metadata.csv").unlink()
    row = '{"file_name": "img01.jpg", "text": "a", "tags": "b"}\n'
    (folder / "metadata.jsonl").write_text(row, encoding="utf-8")
    assert read_images(folder, None, ["tags"])[0][0].captions == ("b",)
    assert 'no "short"' in str(read_images(folder, None, ["short"])[1])


def test_caption_keys_need_a_file_of_captions(folder: Path) -> None:
    (folder / "img01.txt").write_text("a", encoding="utf-8")
    _, problems = read_images(folder, None, ["tags"])
    assert problems[-1].where == "caption_keys"


def test_kohyas_folders(tmp_path: Path) -> None:
    for name in ("10_a cat", "3_b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.png").touch()
    (tmp_path / "3_b/1.txt").write_text("own", encoding="utf-8")
    records, problems = read_images(tmp_path, None)
    found = [(Path(r.file).parent.name, r.caption, r.repeats) for r in records]
    assert found == [("10_a cat", "a cat", 10)] * 2 + [("3_b", "b", 3), ("3_b", "own", 3)]
    assert [problem.severity for problem in problems] == ["note"]
    assert '"10_a cat": 10 times, "3_b": 3 times' in problems[0].what
    (tmp_path / "above.png").touch()  # then they are folders like others
    records, _ = read_images(tmp_path, None)
    assert {record.repeats for record in records} == {1}
