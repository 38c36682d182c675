"""Commands that look at a config and train it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from lora_scripts.errors import EXIT_INTERRUPTED


def train(
    config: Annotated[Path, typer.Option(help="The YAML file that describes the LoRA.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys to change, e.g. lora_rank=32."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="One step and one export elsewhere; how long it will take."),
    ] = False,
) -> None:
    """Train a LoRA."""
    from lora_scripts import pipeline

    try:
        with _stoppable():
            code = pipeline.run(config, overrides or (), dry=dry_run)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from the last checkpoint.", file=sys.stderr)  # noqa: T201
        code = EXIT_INTERRUPTED
    raise typer.Exit(code)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Within this context SIGTERM ends the work as Ctrl-C does, wherever it is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check(
    config: Annotated[Path, typer.Option(help="The YAML file to look at.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys to change, e.g. max_seq_length=512."),
    ] = None,
    row: Annotated[int, typer.Option(min=1, help="Which row of the data to show.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="All of it for machines.")] = False,
    contact_sheet: Annotated[
        Path | None, typer.Option(help="Write the pictures with their captions as this PNG.")
    ] = None,
) -> None:
    """Check a config and its data without training; show one example as the model will see it.

    Exit code 1 if the data have errors, 2 if the config has, else 0.
    """
    from lora_scripts import check as checking

    code = checking.run(config, overrides or (), row, as_json=json, contact_sheet=contact_sheet)
    raise typer.Exit(code)
