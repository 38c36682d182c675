"""One run at a time in a folder, between real processes; what a killed one leaves is just taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lora_scripts import run_lock
from lora_scripts.errors import UserError

HOLD = """
import sys
from pathlib import Path
from lora_scripts.run_lock import in_use
with in_use(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
# A network drive without locks: what the system's call answers there.
NO_LOCKS = """
import errno, fcntl
def refuse(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = refuse
"""


@contextmanager
def held(folder: Path, before: str = "") -> Iterator[subprocess.Popen[str]]:
    """Another process holds the folder within this context."""
    command = [sys.executable, "-c", before + HOLD, str(folder)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_run_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "输出"
    with held(folder) as process:
        with pytest.raises(UserError) as caught, run_lock.in_use(folder):
            pass
        said = str(caught.value)
        assert said.startswith(f"{folder}: another run (process {process.pid} on ")
        assert ", started 20" in said and "lora-scripts" in said
        assert said.endswith("is writing here now: wait, stop it, or name another output_dir")
        assert f"process {process.pid} on " in str(run_lock.taken_by(folder))
        assert json.loads((folder / run_lock.HOLDER).read_text("utf-8"))["pid"] == process.pid
    with run_lock.in_use(folder):
        pass


def test_two_folders_at_once(tmp_path: Path) -> None:
    with held(tmp_path / "a"), run_lock.in_use(tmp_path / "b"):
        pass


def test_what_a_killed_run_leaves_is_taken_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with held(tmp_path) as process:
        pass
    assert (tmp_path / run_lock.HOLDER).is_file()
    assert run_lock.taken_by(tmp_path) is None
    caplog.set_level("INFO", "lora_scripts")
    with run_lock.in_use(tmp_path):
        assert f"An earlier run here was cut off (process {process.pid} on " in caplog.text
        assert f"process {os.getpid()} on " in str(run_lock._read(tmp_path / run_lock.HOLDER))
    assert not (tmp_path / run_lock.HOLDER).exists()


@pytest.mark.parametrize(
    "left", ["its number is this process's now", "no JSON", "[]", '{"pid": 1}']
)
def test_a_note_never_keeps_anybody_out(tmp_path: Path, left: str) -> None:
    with held(tmp_path):
        pass
    note = tmp_path / run_lock.HOLDER
    if left.startswith("its number"):
        values = json.loads(note.read_text("utf-8"))
        left = json.dumps({**values, "pid": os.getpid()})
    note.write_text(left, encoding="utf-8")
    with run_lock.in_use(tmp_path):
        pass


def test_nothing_is_left_of_a_run_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_lock.in_use(tmp_path):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir() if path.name != run_lock.LOCK] == []
    assert run_lock.taken_by(tmp_path / "nowhere") is None


@pytest.mark.skipif(os.name == "nt", reason="Windows' drives have locks")
def test_a_drive_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import errno
    import fcntl

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with held(tmp_path, NO_LOCKS) as process:
        with pytest.raises(UserError) as caught, run_lock.in_use(tmp_path):
            pass
        said = str(caught.value)
        assert f"another run (process {process.pid} on " in said
        assert said.endswith(f"if there is none, remove {tmp_path / run_lock.SOFT_LOCK}")
    with run_lock.in_use(tmp_path):  # that process is gone
        assert "knows no locks (a network drive?)" in caplog.text
    assert not (tmp_path / run_lock.SOFT_LOCK).exists()


@pytest.mark.skipif(os.name == "nt", reason="rights are others there")
@pytest.mark.skipif(os.name != "nt" and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError), run_lock.in_use(tmp_path):
        pass
