"""`lora-scripts captions`: edits all captions of a folder at once, and takes that back again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_scripts import caption_store
from lora_scripts.data import caption_files
from lora_scripts.data.caption_edits import Edits, edited
from lora_scripts.data.caption_files import Change, FileEdit
from lora_scripts.data.image_folder import TABLE_SUFFIXES
from lora_scripts.data.reading import plain, show_path, unix_lines
from lora_scripts.errors import user_error
from lora_scripts.shell import typed

logger = logging.getLogger(__name__)

SHOWN = 5  # captions before and after

Ask = Callable[[], bool]  # whether it shall be written; None where nobody can be asked


def run(path: Path, edits: Edits, *, ask: Ask | None, dry_run: bool = False) -> None:
    """Show what the edits change, ask, and write.

    Args:
        path: A `metadata.csv`, a `metadata.jsonl`, or a folder of images.
        edits: What is done to each caption, in the order of `data/caption_edits.py`.
        ask: Called when all is shown; None stops there with an error.
        dry_run: Stop there without one.

    Raises:
        UserError: if captions cannot be read, naming every row, or nobody can be asked.
        WorkError: if a file cannot be written; all are then as before.
    """
    steps = dict(edits.each())
    if not steps:
        what = (
            "say what to do: --add, --remove, --replace, --prefix, --suffix, --trigger, or --undo"
        )
        raise user_error("captions", what)
    acting: Counter[str] = Counter()

    def edit(caption: str) -> str:
        for name, step in steps.items():
            before, caption = caption, unix_lines(edited(caption, step))
            acting[name] += caption != before
        return caption

    files = caption_files.plan(path, edit)
    target = _target(path, files)
    caption_store.refuse_half_written(target)
    changes = [change for file in files for change in file.changes]
    _show(target, files, changes, {name: acting[name] for name in steps})
    if not changes:
        return
    if dry_run:
        logger.info("Nothing is written: this was a dry run.")
    elif ask is None:
        what = "nothing is written: there is no terminal to ask on. To write it, add --yes"
        raise user_error("captions", what)
    elif not ask():
        logger.info("Nothing is written.")
    else:
        caption_store.write(target, files)
        back = typed("lora-scripts", "captions", str(path), "--undo")
        logger.info("Written. To take it back: %s", back)


def undo(path: Path) -> None:
    """Take the last edit back.

    Raises:
        UserError: if there is none, or a file was changed since.
    """
    count = caption_store.take_back(path)
    what = "1 file is" if count == 1 else f"{count:,} files are"
    logger.info("%s as before the last edit.", what)


def _target(path: Path, files: Sequence[FileEdit]) -> Path:
    """What is edited: a captions file, or the caption files of a folder."""
    is_table = len(files) == 1 and files[0].path.suffix.lower() in TABLE_SUFFIXES
    return files[0].path if is_table else path


def _show(
    target: Path, files: Sequence[FileEdit], changes: Sequence[Change], acting: dict[str, int]
) -> None:
    count = sum(file.captions for file in files)
    logger.info(
        "%s: %s of %s captions change.", show_path(target), f"{len(changes):,}", f"{count:,}"
    )
    for name, often in acting.items():
        logger.info("  %s: %s", name, f"{often:,}" if often else "changes none")
    for change in changes[:SHOWN]:
        logger.info("%s\n  - %s\n  + %s", change.where, plain(change.before), plain(change.after))
    if len(changes) > SHOWN:
        logger.info("… and %s more.", f"{len(changes) - SHOWN:,}")
    if emptied := [change for change in changes if not change.after.strip()]:
        logger.warning(
            "%s: the caption becomes empty%s; lora-scripts label takes it for missing",
            emptied[0].where,
            f" (and {len(emptied) - 1:,} more)" if len(emptied) > 1 else "",
        )
