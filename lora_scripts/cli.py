"""The `lora-scripts` command: parses arguments, calls the one function that does the work.

Heavy libraries are imported inside the commands, so that `--help` answers at once.
Exit codes: 0 done, 1 the work failed, 2 the input is wrong, 75 interrupted and resumable.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_scripts.errors import UserError, WorkError, user_error

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
    base: Annotated[
        str | None, typer.Option(help="Hub id, folder or .safetensors file; default: the config's.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What to draw, several times; default: the config's sample_prompts."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="PATH or PATH:SCALE; several act together. Default: the config's run."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Each --lora alone, in a column of its own.")
    ] = False,
    checkpoints: Annotated[
        str | None, typer.Option(help="all, or steps (100,200): a run's checkpoints, side by side.")
    ] = None,
    scales: Annotated[
        str | None, typer.Option(help="Strengths of the checkpoints: 0.5,0.8,1")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Draw as the training with this YAML file does.")
    ] = None,
    vae: Annotated[str | None, typer.Option(help="Another VAE than the base's.")] = None,
    clip_skip: Annotated[
        int | None, typer.Option(min=1, max=24, help="Text encoder layer from the end.")
    ] = None,
    prediction_type: Annotated[
        Literal["auto", "epsilon", "v_prediction"] | None,
        typer.Option(help="What the base predicts; default: the config's, or as the base says."),
    ] = None,
    output: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("sample.png"),
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Noise seed, the same for every cell; default: 42.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; default: 25.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="Guidance, 1 is none; default: 7.5.")
    ] = None,
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
        compare=compare,
        checkpoints=checkpoints,
        scales=None if scales is None else _scales(scales),
        config=config,
        vae=vae,
        clip_skip=clip_skip,
        prediction_type=prediction_type,
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


def _scales(text: str) -> list[float]:
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        raise user_error(f"--scales {text}", "must be numbers: 0.5,0.8,1") from None
    if not all(map(math.isfinite, scales)):
        raise user_error(f"--scales {text}", "must be finite numbers")
    return scales


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A LoRA's file, or the output folder of a run.")],
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say what a LoRA file is: family, layers, ranks, alphas, header, which programs read it."""
    from lora_scripts import inspect_lora

    inspect_lora.run(file, as_json=json)


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
        list[str], typer.Option(help="PATH or PATH:SCALE of a LoRA; several with --merge.")
    ],
    merge: Annotated[
        bool, typer.Option("--merge", help="The base with the LoRAs in it, as a folder.")
    ] = False,
    single_file: Annotated[
        bool, typer.Option("--single-file", help="Images: merged, as one checkpoint for WebUIs.")
    ] = False,
    base: Annotated[
        bool, typer.Option("--base", help="Texts: the converted base of a .gguf or ChatGLM run.")
    ] = False,
    format: Annotated[
        str | None,
        typer.Option(help="Images: diffusers, webui. Texts: gguf (llama.cpp, Ollama), chatglm."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Images: resize to this rank, the error is shown.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base model; default: what the LoRA names.")
    ] = None,
    prediction_type: Annotated[
        Literal["auto", "epsilon", "v_prediction"],
        typer.Option(help="Images: what the base predicts; auto: as it says, else tried out."),
    ] = "auto",
    output: Annotated[Path | None, typer.Option(help="Where to; default: beside the LoRA.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Write a finished LoRA in another form."""
    from lora_scripts import adapters, convert, convert_image

    loras = [adapters.parse(text) for text in lora]
    form = _form(format, rank, merge=merge, single_file=single_file, base=base)
    where = f"--lora {loras[0].path}"
    if adapters.is_for_images(loras[0].path):
        of_images = next((each for each in convert_image.FORMS if each == form), None)
        if of_images is None:
            raise user_error(where, f"is for images; {form} is a form of LoRAs for texts")
        convert_image.run(
            convert_image.ConvertRequest(
                form=of_images,
                loras=loras,
                base=base_model,
                rank=rank,
                output=output,
                device=device,
                prediction_type=prediction_type,
            )
        )
        return
    of_texts = next((each for each in convert.FORMS if each == form), None)
    if of_texts is None or rank is not None:
        what = "is no LoRA for images, which --format diffusers|webui, --rank, --single-file need"
        raise user_error(where, what)
    convert.run(
        convert.ConvertRequest(
            form=of_texts, loras=loras, base=base_model, output=output, device=device
        )
    )


def _form(
    format: str | None, rank: int | None, *, merge: bool, single_file: bool, base: bool
) -> str:
    """What `export` shall write, of all the forms that there are."""
    names = ("diffusers", "webui", "gguf", "chatglm")
    if format is not None and format not in names:
        raise user_error(f"--format {format}", f"must be one of {', '.join(names)}")
    merged = "single-file" if single_file else "merged" if merge else None
    wanted = [form for form in (merged, "base" if base else None, format) if form is not None]
    if not wanted and rank is not None:
        return "webui"
    if len(wanted) != 1:
        what = "give one of --merge, --single-file, --base, --format NAME, --rank N"
        raise user_error("export", what)
    return wanted[0]


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
