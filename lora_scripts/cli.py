"""The `lora-scripts` command: parses arguments, calls the one function that does the work.

Heavy libraries are imported inside the commands, so that `--help` answers at once.
Exit codes: 0 done, 1 the work failed, 2 the input is wrong, 75 interrupted and resumable.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

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


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="The YAML file that describes the LoRA.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys to change, e.g. lora_rank=32."),
    ] = None,
) -> None:
    """Train a LoRA."""
    from lora_scripts import pipeline

    try:
        code = pipeline.run(config, overrides or ())
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from the last checkpoint.", file=sys.stderr)  # noqa: T201
        code = pipeline.EXIT_INTERRUPTED
    raise typer.Exit(code)


@app.command()
def sample(
    base: Annotated[str, typer.Option(help="Base model: hub id, folder or .safetensors file.")],
    prompt: Annotated[list[str], typer.Option(help="What to draw; may be given several times.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(help="PATH or PATH:SCALE; several times: one column each beside the base."),
    ] = None,
    output: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("sample.png"),
    negative_prompt: Annotated[str, typer.Option(help="What not to show.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Noise seed; the same for every cell.")] = 42,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance_scale: Annotated[float, typer.Option(min=0, help="Guidance; 1 is none.")] = 7.5,
    width: Annotated[int | None, typer.Option(min=8, help="Pixels; default: the model's.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Pixels; default: the model's.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Draw prompts with a base model and with LoRAs beside it, as one labelled picture."""
    from lora_scripts import adapters
    from lora_scripts import sample as sampling

    request = sampling.SampleRequest(
        base=base,
        prompts=prompt,
        loras=[adapters.parse(text) for text in lora or ()],
        output=output,
        negative_prompt=negative_prompt,
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        width=width,
        height=height,
        device=device,
    )
    sampling.run(request)


@app.command()
def check(
    config: Annotated[Path, typer.Option(help="The YAML file to look at.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys to change, e.g. max_seq_length=512."),
    ] = None,
    row: Annotated[int, typer.Option(min=1, help="Which row of the data to show.")] = 1,
) -> None:
    """Check a config and its data without training; show one example as the model will see it."""
    from lora_scripts import check as checking

    checking.run(config, overrides or (), row)


@app.command()
def chat(
    base: Annotated[
        str | None, typer.Option(help="Hub id, folder or .gguf file; default: what the LoRA names.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="PATH or PATH:SCALE; several act together.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Say this instead of asking; may be given several times."),
    ] = None,
    system_prompt: Annotated[
        str | None,
        typer.Option(help='The system message; default: what the LoRA was trained with. "": none.'),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Cut answers off there.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 42,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Talk to a language model with LoRAs on it."""
    from lora_scripts import adapters
    from lora_scripts import chat as chatting

    chatting.run(
        chatting.ChatRequest(
            base=base,
            loras=[adapters.parse(text) for text in lora or ()],
            prompts=prompt or (),
            system_prompt=system_prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            device=device,
        )
    )


@app.command()
def export(
    lora: Annotated[
        list[str], typer.Option(help="PATH or PATH:SCALE of a finished text LoRA; --merge: more.")
    ],
    merge: Annotated[
        bool, typer.Option("--merge", help="A transformers folder with the LoRA added in.")
    ] = False,
    base: Annotated[
        bool, typer.Option("--base", help="The converted base of a .gguf or ChatGLM run.")
    ] = False,
    format: Annotated[
        str | None, typer.Option(help="gguf (llama.cpp, Ollama) or chatglm (original names).")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base model; default: what the LoRA names.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to; default: in the LoRA's folder.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Write a finished text LoRA in another form."""
    from lora_scripts import adapters, convert
    from lora_scripts.errors import user_error

    if format not in (None, "gguf", "chatglm"):
        raise user_error(f"--format {format}", "must be gguf or chatglm")
    chosen: dict[convert.Form, bool] = {
        "merged": merge,
        "base": base,
        "gguf": format == "gguf",
        "chatglm": format == "chatglm",
    }
    wanted = [form for form, is_wanted in chosen.items() if is_wanted]
    if len(wanted) != 1:
        raise user_error("export", "give one of --merge, --base, --format gguf, --format chatglm")
    convert.run(
        convert.ConvertRequest(
            form=wanted[0],
            loras=[adapters.parse(text) for text in lora],
            base=base_model,
            output=output,
            device=device,
        )
    )


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
