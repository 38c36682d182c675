"""The `lora-scripts` command: parses arguments, calls the one function that does the work.

Heavy libraries are imported inside the commands, so that `--help` answers at once.
Exit codes: 0 done, 1 the work failed, 2 the input is wrong, 75 interrupted and resumable.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from lora_scripts.cli import export, run, use
from lora_scripts.errors import UserError, WorkError

app = typer.Typer(
    name="lora-scripts",
    help="One YAML file describes a LoRA, one command makes it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _every_command() -> None:
    from lora_scripts.logs import set_up_console

    set_up_console()


for _command in (
    run.check,
    run.train,
    use.sample,
    use.chat,
    use.inspect,
    export.export,
):
    app.command()(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="lora-scripts")
    except UserError as error:
        count = len(error.problems)
        print("1 problem:" if count == 1 else f"{count} problems:", file=sys.stderr)  # noqa: T201
        for problem in error.problems:
            print(f"  {problem}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
    except WorkError as error:
        print(f"Failed: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
