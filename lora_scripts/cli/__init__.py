"""The `lora-scripts` command: parses arguments, calls the one function that does the work.

Heavy libraries are imported inside the commands, so that `--help` answers at once.
Exit codes: 0 done, 1 the work failed or the data have errors, 2 what was typed or a config is
wrong, 75 interrupted and resumable.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from lora_scripts.cli import captions, doctor, export, label, run, use
from lora_scripts.errors import UserError, WorkError, few

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
    captions.new,
    label.label,
    captions.captions,
    doctor.doctor,
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
        _print(error)
        sys.exit(error.exit_code)
    except WorkError as error:
        print(f"Failed: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


def _print(error: UserError) -> None:
    """All errors; then the warnings that were found beside them."""
    errors = [problem for problem in error.problems if problem.severity == "error"]
    others = [problem for problem in error.problems if problem.severity == "warning"]
    for name, problems in (("problem", errors), ("warning", others)):
        if problems:
            count = f"{len(problems)} {name}{'s' if len(problems) != 1 else ''}:"
            print(count, file=sys.stderr)  # noqa: T201
        for _, text in few(problems):
            print(f"  {text}", file=sys.stderr)  # noqa: T201
