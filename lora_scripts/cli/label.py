"""The command that captions a folder of images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lora_scripts.errors import EXIT_INTERRUPTED


def label(
    input: Annotated[Path, typer.Option(help="The folder of images.")],
    output: Annotated[
        Path | None,
        typer.Option(help="The captions file; default: metadata.csv (or .jsonl) in the folder."),
    ] = None,
    captioner: Annotated[
        str | None,
        typer.Option(
            help="blip, blip2, florence2, vlm or wd14; default: what --model is, or blip."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A folder, a hub id, or demo; default: the captioner's usual weights."),
    ] = None,
    prefix: Annotated[str, typer.Option(help='Before every caption: "portrait of zwx, ".')] = "",
    suffix: Annotated[str, typer.Option(help="Behind every caption.")] = "",
    trigger: Annotated[
        str | None,
        typer.Option(help="Put in front where it is missing, as trigger_word does in a config."),
    ] = None,
    blacklist: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave these out, with commas between: whole tags of wd14, words or phrases "
            "of sentences."
        ),
    ] = None,
    max_tags: Annotated[
        int | None, typer.Option(min=1, help="wd14, vlm: so many tags at most, the first ones.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="csv, jsonl, or txt (a file beside each image); default: csv."),
    ] = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Images in sub-folders, too.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, show three captions.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="New captions for images that have one, too.")
    ] = False,
    review: Annotated[
        Path | None, typer.Option(help="Write this .html page of thumbnails and captions.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images captioned at a time.")] = 8,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode; default: the cores, up to 8.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="How long a caption may get, in tokens.")
    ] = None,
    num_beams: Annotated[
        int | None, typer.Option(min=1, help="Beams of the search for the likeliest caption.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Draw captions at random; 0: the likeliest one.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Draw among the likeliest tokens only.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 42,
    prompt: Annotated[
        str | None,
        typer.Option(help="blip: how captions begin. blip2, vlm: a question. florence2: a task."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="wd14: the least score of a tag.")
    ] = None,
    character_threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="wd14: the same for names of characters.")
    ] = None,
    underscores: Annotated[
        bool, typer.Option("--underscores", help="wd14: long_hair instead of long hair.")
    ] = False,
    escape_parentheses: Annotated[
        bool, typer.Option("--escape-parentheses", help="wd14: \\( and \\), as WebUIs want them.")
    ] = False,
) -> None:
    """Caption a folder of images; the same command goes on where it was stopped."""
    from lora_scripts.label import run
    from lora_scripts.label.captioner import Settings
    from lora_scripts.label.request import LabelRequest
    from lora_scripts.label.wording import Wording

    listed = [word.strip() for words in blacklist or () for word in words.split(",")]
    request = LabelRequest(
        input=input,
        output=output,
        captioner=captioner,
        model=model,
        settings=Settings(
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            prompt=prompt,
            threshold=threshold,
            character_threshold=character_threshold,
            underscores=underscores,
            escape_parentheses=escape_parentheses,
        ),
        wording=Wording(
            prefix=prefix,
            suffix=suffix,
            trigger=trigger,
            blacklist=tuple(word for word in listed if word),
            max_tags=max_tags,
        ),
        format=format,
        recursive=recursive,
        dry_run=dry_run,
        overwrite=overwrite,
        review=review,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )
    try:
        run.run(request)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from there.", file=sys.stderr)  # noqa: T201
        raise typer.Exit(EXIT_INTERRUPTED) from None
