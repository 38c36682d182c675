"""Files of captions written all or none, and the last edit of them taken back byte for byte.

Beside what is edited lies a small JSON file (its name begins with a dot, so no reader of data sees
it): each file's text before the edit, and the SHA-256 of what was written. It is on the disk before
the first file is touched. A file is therefore always as it was before, as the edit made it, or
changed by somebody else since; only in the last case nothing is taken back.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from lora_scripts import files
from lora_scripts.data.caption_files import FileEdit
from lora_scripts.data.reading import show_path
from lora_scripts.errors import Problem, UserError, WorkError, user_error

FORMAT_VERSION = 1
State = Literal["before", "after", "changed", "gone"]


@dataclass(frozen=True)
class Stored:
    """A file of the last edit: its bytes before, and the hash of those after."""

    path: Path
    before: bytes
    after_sha256: str

    def state(self) -> State:
        """Where the file stands now."""
        try:
            now = self.path.read_bytes()
        except OSError:
            return "gone"
        if _hash(now) == self.after_sha256:
            return "after"
        return "before" if now == self.before else "changed"


def store_path(path: Path) -> Path:
    """Where the last edit of a captions file, or of the caption files of a folder, is kept."""
    return (
        path / ".captions.undo.json" if path.is_dir() else path.with_name(f".{path.name}.undo.json")
    )


def write(target: Path, edits: Sequence[FileEdit]) -> None:
    """Write the edits of `target`, all of them or none.

    Raises:
        UserError: if a file is not as it was planned for. WorkError: if one cannot be written; the
            others are then as before.
    """
    changed = [edit for edit in edits if edit.after != edit.before]
    files_now = [
        Stored(edit.path, edit.before.encode("utf-8"), _hash(edit.after.encode("utf-8")))
        for edit in changed
    ]
    if moved := [one for one in files_now if one.state() != "before"]:
        what = "changed while you looked at it; type the command again"
        raise UserError([Problem(show_path(one.path), what) for one in moved])
    store = store_path(target)
    folder = store.parent
    entries = [
        {
            "name": edit.path.relative_to(folder).as_posix(),
            "before": edit.before,
            "after_sha256": stored.after_sha256,
        }
        for edit, stored in zip(changed, files_now, strict=True)
    ]
    try:
        files.write_text(store, json.dumps({"format_version": FORMAT_VERSION, "files": entries}))
    except OSError as error:
        raise WorkError(f"{show_path(store)} cannot be written ({error.strerror})") from None
    _swap({edit.path: edit.after.encode("utf-8") for edit in changed})


def take_back(path: Path) -> int:
    """Make the files of the last edit as they were before it. Returns how many that were.

    Raises:
        UserError: if nothing was edited, or a file was changed since. WorkError: if one cannot be
            written.
    """
    store = _last_store(path)
    if store is None:
        what = "there is no edit to take back: lora-scripts captions has written nothing here"
        raise user_error(show_path(path), what)
    found = load(store)
    states = {one.path: one.state() for one in found}
    what = "was {} since the edit, so nothing is taken back; the text before it is in {}"
    problems = [
        Problem(show_path(name), what.format("removed" if state == "gone" else state, store.name))
        for name, state in states.items()
        if state in ("gone", "changed")
    ]
    if problems:
        raise UserError(problems)
    edited = [one for one in found if states[one.path] == "after"]
    _swap({one.path: one.before for one in edited})
    store.unlink()
    return len(edited)


def refuse_half_written(target: Path) -> None:
    """Refuse files of which an edit that was killed has written some.

    Raises:
        UserError: saying how to go on.
    """
    store = store_path(target)
    states = [one.state() for one in load(store)] if store.is_file() else []
    if "before" in states and "after" in states:
        what = (
            f"an edit was stopped when it had written {states.count('after'):,} of "
            f"{len(states):,} files; take it back first, with --undo"
        )
        raise user_error(show_path(target), what)


def load(store: Path) -> list[Stored]:
    """The files of the last edit. Raises `UserError` if the store cannot be read."""
    try:
        found = json.loads(store.read_text(encoding="utf-8"))
        if found["format_version"] != FORMAT_VERSION:
            raise ValueError
        return [_stored(store.parent, entry) for entry in found["files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        what = "this is no edit that this version can take back; remove it to edit all the same"
        raise user_error(show_path(store), what) from None


def _stored(folder: Path, entry: Mapping[str, str]) -> Stored:
    name = PurePosixPath(entry["name"])
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(name)
    if not (folder / name).resolve().is_relative_to(folder.resolve()):  # by a link
        raise ValueError(name)
    return Stored(folder / name, entry["before"].encode("utf-8"), entry["after_sha256"])


def _last_store(path: Path) -> Path | None:
    """The newest edit of a file, or of what is in a folder."""
    targets = [path, path / "metadata.csv", path / "metadata.jsonl"] if path.is_dir() else [path]
    found = [store for store in map(store_path, targets) if store.is_file()]
    return max(found, key=lambda store: store.stat().st_mtime_ns, default=None)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- many files at once ---------------------------------------------------------------------------


def _swap(new: Mapping[Path, bytes]) -> None:
    """Give every file its new bytes; if one cannot be written, none keeps them.

    All are written beside the old ones first, where a full disk or a forbidden folder shows.
    """
    targets = [path.resolve() for path in new]  # a link stays one
    staged = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in targets]
    old: dict[Path, bytes] = {}
    whole = False
    try:
        for target, temporary, data in zip(targets, staged, new.values(), strict=True):
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            shutil.copymode(target, temporary)
        for target, temporary in zip(targets, staged, strict=True):
            old[target] = target.read_bytes()
            files.replace(temporary, target)
        whole = True
    except OSError as error:
        raise WorkError(f"{error.filename} cannot be written ({error.strerror})") from None
    finally:
        for temporary in staged:
            temporary.unlink(missing_ok=True)
        if not whole:
            for target, data in old.items():
                target.write_bytes(data)
