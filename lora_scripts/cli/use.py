"""Commands for finished LoRAs: look at them, draw and talk with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_scripts.errors import user_error


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


def inspect(
    file: Annotated[Path, typer.Argument(help="A LoRA's file, or the output folder of a run.")],
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say what a LoRA file is: family, layers, ranks, alphas, header, which programs read it."""
    from lora_scripts import inspect_lora

    inspect_lora.run(file, as_json=json)


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
