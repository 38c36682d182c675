"""`lora-scripts captions`: shows, asks, writes all or nothing, and takes it back byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_scripts import caption_store, edit_captions, files
from lora_scripts.data.caption_edits import Edits
from lora_scripts.errors import UserError, WorkError
from tests import console

ROOT = Path(__file__).parent.parent
TABLE = '\ufefffile_name,text,id\r\n1.png,a red car,7\r\n2.png,"一只猫，\r\nblurry",8\r\n'.encode()
RED = Edits(replace=[("red", "blue")])


def yes() -> bool:
    return True


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "图 片" / "metadata.csv"
    path.parent.mkdir()
    path.write_bytes(TABLE)
    return path


@pytest.fixture
def sidecars(tmp_path: Path) -> dict[Path, bytes]:
    """Captions beside pictures, one in a sub-folder; each file and what it holds."""
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    found = {}
    for number in range(4):
        name = f"more/{number}" if number == 3 else str(number)
        (tmp_path / "pictures" / f"{name}.png").touch()
        path = tmp_path / "pictures" / f"{name}.txt"
        path.write_bytes(f"a red car, number {number}\r\n".encode())
        found[path] = path.read_bytes()
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def command(*arguments: str, code: int = 0) -> str:
    found, said = console.command("captions", *arguments)
    assert found == code, said
    return said


def test_written_and_taken_back(table: Path) -> None:
    command(str(table), "--add", "zwx, night", "--remove", "blurry", "--yes")
    assert (
        table.read_bytes()
        == (
            '\ufefffile_name,text,id\r\n1.png,"a red car, zwx, night",7\r\n'
            '2.png,"一只猫，\r\nblurry, zwx, night",8\r\n'
        ).encode()
    )  # a full-width comma parts no tags
    command(str(table.parent), "--undo")
    assert table.read_bytes() == TABLE
    assert names(table.parent) == ["metadata.csv"]
    assert "there is no edit to take back" in command(str(table), "--undo", code=2)


def test_the_changes_are_shown_first(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    def no() -> bool:
        assert "1 of 2 captions change" in caplog.text
        return False

    with caplog.at_level("INFO", logger="lora_scripts"):
        edit_captions.run(table, Edits(replace=[("red", "blue")], remove=["dog"]), ask=no)
    assert caplog.messages == [
        f"{table}: 1 of 2 captions change.",
        "  --remove dog: changes none",
        "  --replace red=blue: 1",
        "metadata.csv line 2\n  - a red car\n  + a blue car",
        "Nothing is written.",
    ]
    assert table.read_bytes() == TABLE and names(table.parent) == ["metadata.csv"]


def test_a_few_are_shown_and_the_rest_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metadata.csv"
    path.write_text("".join(f"{n}.png,red\n" for n in range(9)), encoding="utf-8")
    with caplog.at_level("INFO", logger="lora_scripts"):
        edit_captions.run(path, Edits(remove=["red"]), ask=None, dry_run=True)
    assert sum("\n  - red" in message for message in caplog.messages) == 5
    assert "… and 4 more." in caplog.messages
    assert "metadata.csv line 1: the caption becomes empty (and 8 more); " in caplog.text
    assert caplog.messages[-1] == "Nothing is written: this was a dry run."


def test_nobody_to_ask(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (ROOT / "README.md").open(encoding="utf-8") as no_terminal:
        monkeypatch.setattr(sys, "stdin", no_terminal)
        said = command(str(table), "--trigger", "zwx", code=2)
    assert "+ zwx, a red car" in said
    assert "nothing is written: there is no terminal to ask on. To write it, add --yes" in said
    assert table.read_bytes() == TABLE


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("typed", "is_written"), [(b"y\n", True), (b"n\n", False)])
def test_on_a_terminal_it_asks(table: Path, typed: bytes, is_written: bool) -> None:
    import pty

    ours, its = pty.openpty()
    os.write(ours, typed)
    done = subprocess.run(
        [sys.executable, "-m", "lora_scripts", "captions", str(table), "--trigger", "zwx"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "gbk"},
        stdin=its, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    os.close(its)
    os.close(ours)
    said = (done.stdout + done.stderr).decode("gbk")
    assert "+ zwx, a red car" in said and "Write this?" in said and "Traceback" not in said
    assert (b"zwx" in table.read_bytes()) == is_written


def test_nothing_to_do(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lora_scripts"):
        edit_captions.run(table, Edits(remove=["dog"]), ask=None)
    assert "0 of 2 captions change" in caplog.text and "--remove dog: changes none" in caplog.text
    assert "say what to do: --add" in command(str(table), code=2)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--replace", "red"], '--replace "red": expected OLD=NEW'),
        (["--replace", "=red"], '--replace "=red": expected OLD=NEW'),
        (["--replace", "red= "], '--replace "red= ": expected OLD=NEW'),
        (["--add", " , "], '--add " , ": expected a word or a tag'),
        (["--trigger", ""], '--trigger "": expected a word or a tag'),
        (["--undo", "--add", "x"], "--undo: takes the last edit back"),
    ],
)
def test_options_that_say_nothing(options: list[str], what: str, table: Path) -> None:
    assert what in command(str(table), *options, "--yes", code=2)
    assert table.read_bytes() == TABLE


# --- many files -----------------------------------------------------------------------------------


def test_captions_beside_pictures(sidecars: dict[Path, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    edit_captions.run(folder, RED, ask=yes)
    for number, path in enumerate(sidecars):
        assert path.read_bytes() == f"a blue car, number {number}\r\n".encode()
    edit_captions.undo(folder)
    assert {path: path.read_bytes() for path in sidecars} == sidecars
    assert len(names(folder)) == 7  # three pictures and captions, a folder


def test_only_the_last_edit_is_taken_back(table: Path) -> None:
    edit_captions.run(table, RED, ask=yes)
    between = table.read_bytes()
    edit_captions.run(table, Edits(add=["zwx"]), ask=yes)
    edit_captions.undo(table)
    assert table.read_bytes() == between


def test_what_somebody_changed_since_is_not_taken_back(
    sidecars: dict[Path, bytes], tmp_path: Path
) -> None:
    folder, (first, second, *_) = tmp_path / "pictures", sidecars
    edit_captions.run(folder, RED, ask=yes)
    first.write_text("mine", encoding="utf-8")
    second.unlink()
    with pytest.raises(UserError) as caught:
        edit_captions.undo(folder)
    one, two = caught.value.problems
    assert one.where == str(first) and "was changed since the edit, so nothing is" in one.what
    assert two.where == str(second) and "was removed since the edit" in two.what
    assert first.read_text(encoding="utf-8") == "mine"


def test_a_disk_that_fails_in_the_middle_changes_nothing(
    sidecars: dict[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced: list[Path] = []
    real = files.replace

    def failing(source: Path, target: Path) -> None:
        if target.suffix == ".txt":
            replaced.append(target)
            if len(replaced) == 3:
                raise PermissionError(13, "Permission denied", str(target))
        real(source, target)

    monkeypatch.setattr(files, "replace", failing)
    with pytest.raises(WorkError, match=r"2\.txt cannot be written"):
        edit_captions.run(tmp_path / "pictures", RED, ask=yes)
    assert len(replaced) == 3
    assert {path: path.read_bytes() for path in sidecars} == sidecars
    assert not [name for name in names(tmp_path / "pictures") if name.endswith(".tmp")]


def test_an_edit_that_was_killed_is_taken_back_first(
    sidecars: dict[Path, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    edit_captions.run(folder, RED, ask=yes)
    for path in list(sidecars)[2:]:
        path.write_bytes(sidecars[path])  # as a kill after two files leaves it
    with pytest.raises(UserError, match="stopped when it had written 2 of 4 files"):
        edit_captions.run(folder, Edits(add=["zwx"]), ask=yes)
    edit_captions.undo(folder)
    assert {path: path.read_bytes() for path in sidecars} == sidecars


def test_changed_while_it_was_looked_at(table: Path) -> None:
    def slowly() -> bool:
        table.write_bytes(TABLE + b"3.png,mine,9\r\n")
        return True

    with pytest.raises(UserError, match="changed while you looked at it"):
        edit_captions.run(table, RED, ask=slowly)
    assert table.read_bytes().endswith(b"mine,9\r\n")


def test_a_store_from_elsewhere_reaches_no_other_folder(table: Path, tmp_path: Path) -> None:
    outside = tmp_path / "mine.txt"
    outside.write_text("mine", encoding="utf-8")
    edit_captions.run(table, RED, ask=yes)
    store = caption_store.store_path(table)
    text = store.read_text(encoding="utf-8")
    store.write_text(text.replace("metadata.csv", "../mine.txt"), encoding="utf-8")
    with pytest.raises(UserError, match="no edit that this version can take back"):
        edit_captions.undo(table)
    store.write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="no edit that this version can take back"):
        edit_captions.undo(table)


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_link_stays_a_link_and_rights_stay(table: Path, tmp_path: Path) -> None:
    table.chmod(0o640)
    link = tmp_path / "metadata.csv"
    link.symlink_to(table)
    edit_captions.run(link, RED, ask=yes)
    assert link.is_symlink() and b"blue" in table.read_bytes()
    assert table.stat().st_mode & 0o777 == 0o640
    edit_captions.undo(link)
    assert table.read_bytes() == TABLE
