"""The walk through a folder of training data, names in it, and links that lead out of it.

Names of files are texts, not `Path`s, wherever there is one for each picture: Python keeps each
part of each `Path` in a table of its own, which does not shrink again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lora_scripts.data.reading import Refused, show_path
from lora_scripts.errors import Problem

_UNLISTED = "unreadable-folder"


def walk_files(folder: Path, things: str, problems: list[Problem]) -> Iterator[str]:
    """The files of a folder and its sub-folders, in the order of names.

    Names that begin with a dot are passed over, links to folders are not followed.

    Args:
        folder: Where to look.
        things: What the user keeps there, as "images".
        problems: Takes a problem for each link to a folder, and each folder that cannot be listed.

    Yields:
        Names relative to `folder`, with forward slashes.
    """

    def note_unlisted(error: OSError) -> None:
        what = f"this folder cannot be listed ({error.strerror})"
        problems.append(Problem(show_path(Path(error.filename)), what, "error", _UNLISTED))

    for place, directories, files in os.walk(folder, onerror=note_unlisted):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in directories:
            if (link := Path(place, name)).is_symlink():
                what = f"is a link to another folder, which is not followed; copy its {things} in"
                problems.append(Problem(show_path(link), what, "warning", "linked-folder"))
        home = Path(place).relative_to(folder)
        inside = "" if home == Path() else f"{home.as_posix()}/"
        for name in sorted(name for name in files if not name.startswith(".")):
            yield inside + name


def joined(folder: Path, name: str) -> str:
    """The file that has this name (with forward slashes) in a folder, as `str(folder / name)`."""
    home = "" if folder == Path() else str(folder)
    return os.path.join(home, *name.split("/"))


def suffix_of(name: str) -> str:
    """As `PurePosixPath(name).suffix`."""
    base = name.rpartition("/")[2]
    dot = base.rfind(".")
    return base[dot:] if 0 < dot < len(base) - 1 else ""


def stem_of(name: str) -> str:
    """A file's name without its suffix, its folders kept."""
    return name.removesuffix(suffix_of(name))


def link_problem(folder: Path, path: Path, *, thing: str, home: str) -> str | None:
    """Why a link cannot be used, or None if it leads to a place inside `folder`.

    Args:
        folder: What the link may not lead out of.
        path: The link. A path without a link in it has no problem if it is there.
        thing: What the path should be, as "image".
        home: What the user knows the folder as, as "the folder of images".
    """
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: how Python before 3.13 reports a loop
        return f"this link leads nowhere; put the {thing} itself in the folder"
    if not target.is_relative_to(folder.resolve()):
        return f"this link leads out of {home}; put the {thing} itself in the folder"
    return None


def leads_out(folder: Path, name: str, thing: str, things: str) -> str | None:
    """Why a file found in a folder cannot be used: it is a link out of it. None if it can.

    Args:
        folder: What the link may not lead out of.
        name: The file's name in it.
        thing: What the file should be, as "caption file".
        things: What the user keeps in the folder, as "images".
    """
    if not os.path.islink(joined(folder, name)):
        return None
    return link_problem(folder, folder / name, thing=thing, home=f"the folder of {things}")


def refuse_link(folder: Path, path: Path, things: str) -> None:
    """Raise `Refused` if the file that says what is in a folder is a link out of it."""
    why = leads_out(folder, path.name, "file", things)
    if why is not None:
        raise Refused(f"{path.name}: {why}", "link")
