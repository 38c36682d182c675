"""The command that writes a finished LoRA in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_scripts.errors import user_error


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
