"""Commands that prepare a training: a new project, captions edited all at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lora_scripts.errors import user_error

if TYPE_CHECKING:
    from lora_scripts.data.caption_edits import Edits


def new(
    name: Annotated[str, typer.Argument(help="The name of the LoRA: configs/NAME.yaml.")],
    data: Annotated[Path, typer.Option(help="The folder of its pictures (or its texts).")],
    base: Annotated[
        str | None, typer.Option(help="The base model: hub id, folder or file.")
    ] = None,
    task: Annotated[
        Literal["image-generation", "text-generation"], typer.Option(help="What is trained.")
    ] = "image-generation",
) -> None:
    """Begin a LoRA: the folder for its data, its captions file, a config of five lines."""
    from lora_scripts import new_project

    new_project.run(name, data, base, task)


def captions(
    file: Annotated[Path, typer.Argument(help="metadata.csv, metadata.jsonl, or the folder.")],
    remove: Annotated[
        list[str] | None, typer.Option(metavar="TAG", help="1. Drop this tag.")
    ] = None,
    replace: Annotated[
        list[str] | None,
        typer.Option(metavar="OLD=NEW", help="2. Write NEW for the whole word or tag OLD."),
    ] = None,
    add: Annotated[
        list[str] | None, typer.Option(metavar="TAG", help="3. Put at the end unless it is there.")
    ] = None,
    suffix: Annotated[str, typer.Option(help="4. Put behind, unless it is there.")] = "",
    prefix: Annotated[str, typer.Option(help="5. Put in front, unless it is there.")] = "",
    trigger: Annotated[
        str | None, typer.Option(help="6. Put in front, with a comma, where it is missing.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show it, write nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Write it without asking.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take the last edit back.")] = False,
) -> None:
    """Edit all captions at once, in the order of the numbers; shows the changes first."""
    from lora_scripts import edit_captions

    edits = _edits(remove or (), replace or (), add or (), suffix, prefix, trigger)
    if undo:
        if next(edits.each(), None) is not None or dry_run:
            raise user_error("--undo", "takes the last edit back; it goes with no other option")
        edit_captions.undo(file)
        return
    ask = (lambda: True) if yes else _ask if sys.stdin.isatty() else None
    edit_captions.run(file, edits, ask=ask, dry_run=dry_run)


def _ask() -> bool:
    return typer.confirm("Write this?")


def _edits(
    remove: Sequence[str],
    replace: Sequence[str],
    add: Sequence[str],
    suffix: str,
    prefix: str,
    trigger: str | None,
) -> Edits:
    from lora_scripts.data.caption_edits import Edits

    return Edits(
        remove=_tags("--remove", remove),
        replace=[_pair(text) for text in replace],
        add=_tags("--add", add),
        suffix=suffix,
        prefix=prefix,
        trigger=None if trigger is None else _tags("--trigger", [trigger])[0],
    )


def _tags(option: str, typed: Sequence[str]) -> list[str]:
    from lora_scripts.data.caption_edits import tags_of

    for text in typed:
        if not tags_of(text):
            raise user_error(f'{option} "{text}"', "expected a word or a tag")
    return [tag for text in typed for tag in tags_of(text)]


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals or not old.strip() or not new.strip():
        what = "expected OLD=NEW, as in car=lorry; to drop a whole tag there is --remove"
        raise user_error(f'--replace "{text}"', what)
    return old, new
