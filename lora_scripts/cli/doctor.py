"""The command that looks at the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    config: Annotated[
        Path | None, typer.Option(help="A YAML file: its run is looked at, too.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys to change, e.g. output_dir=other."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="All of it for machines.")] = False,
) -> None:
    """Look at this machine, and at a config's run on it: found, needed, what to type.

    Exit code 1 if something is wrong with the machine or the data, 2 with the config, else 0.
    """
    from lora_scripts import doctor as examining
    from lora_scripts.errors import user_error

    if config is None and overrides:
        raise user_error(" ".join(overrides), "changes a config; name it by --config")
    raise typer.Exit(examining.run(config, overrides or (), as_json=json))
