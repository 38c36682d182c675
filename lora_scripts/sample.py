"""Pictures of a base model with LoRAs beside it, as one labelled PNG."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_scripts import grid
from lora_scripts.adapters import Adapter
from lora_scripts.errors import Problem, UserError, user_error
from lora_scripts.run_files import DIFFUSERS_NAME

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleRequest:
    """What to draw. Sizes in pixels; None takes the model's own size."""

    base: str
    prompts: Sequence[str]
    loras: Sequence[Adapter]
    output: Path
    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float
    width: int | None
    height: int | None
    device: str


def run(request: SampleRequest) -> Path:
    """Draw every prompt with the base, then with each LoRA at its scale. Returns the PNG's path.

    Raises:
        UserError: if a file is not there or does not fit the base.
    """
    _check(request)
    from lora_scripts import device
    from lora_scripts.logs import quiet_libraries
    from lora_scripts.models.family import DrawRequest
    from lora_scripts.tasks import build

    quiet_libraries()
    found = build.find_base(request.base)
    compute = device.choose(request.device, "auto")
    family = build.load_family(found, compute)
    _check_sizes(request, family.pixel_multiple)
    size = family.native_size
    requests = [
        DrawRequest(
            prompt=prompt,
            negative_prompt=request.negative_prompt,
            guidance_scale=request.guidance_scale,
            steps=request.steps,
            width=request.width or size,
            height=request.height or size,
            seed=request.seed,
        )
        for prompt in request.prompts
    ]
    columns = {"base": [family.draw(drawing) for drawing in requests]}
    loaded = list(dict.fromkeys(lora.path for lora in request.loras))
    for lora in request.loras:
        strengths = [(path, lora.scale if path == lora.path else 0.0) for path in loaded]
        family.load_loras(strengths)
        columns[f"{lora.path.stem or lora.path.name} : {lora.scale:g}"] = [
            family.draw(drawing) for drawing in requests
        ]
    picture = compose(columns, request.prompts)
    request.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(request.output)
    logger.info("Written: %s (%d prompts, %d columns)", request.output, len(requests), len(columns))
    return request.output


def compose(columns: dict[str, list[Image.Image]], prompts: Sequence[str]) -> Image.Image:
    """A labelled grid: a row a prompt, or a column a prompt where there are more of these."""
    if len(prompts) > len(columns):
        return grid.labelled(list(columns.values()), list(prompts), list(columns))
    rows = [[column[i] for column in columns.values()] for i in range(len(prompts))]
    return grid.labelled(rows, list(columns), list(prompts))


def _check(request: SampleRequest) -> None:
    problems = []
    for lora in request.loras:
        path = lora.path / DIFFUSERS_NAME if lora.path.is_dir() else lora.path
        if path.suffix.lower() != ".safetensors":
            what = "must be a .safetensors file or the output folder of a run"
            problems.append(Problem(f"--lora {lora.path}", what))
        elif not path.is_file():
            problems.append(Problem(f"--lora {lora.path}", f"there is no file {path}"))
    if request.output.suffix.lower() != ".png":
        problems.append(Problem(f"--output {request.output}", "must end in .png"))
    if problems:
        raise UserError(problems)


def _check_sizes(request: SampleRequest, multiple: int) -> None:
    for name, value in (("--width", request.width), ("--height", request.height)):
        if value is not None and value % multiple:
            raise user_error(f"{name} {value}", f"must be a multiple of {multiple} for this model")
