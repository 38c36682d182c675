"""Pictures of a base model with LoRAs beside it, as one labelled PNG."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from PIL import Image

from lora_scripts import config as config_file
from lora_scripts import grid
from lora_scripts.adapters import Adapter
from lora_scripts.errors import Problem, UserError, user_error
from lora_scripts.run_files import CHECKPOINTS, DIFFUSERS_NAME
from lora_scripts.schema import ImageConfig, SamplePrompt

if TYPE_CHECKING:
    from lora_scripts.models.family import DrawRequest, ImageFamily, Options

logger = logging.getLogger(__name__)

T = TypeVar("T")
Column = tuple[Adapter, ...]  # LoRAs that act together; none: the base alone


@dataclass(frozen=True)
class SampleRequest:
    """What to draw.

    Attributes:
        base: The base model; None takes the config's.
        prompts: None takes the config's `sample_prompts`, with their own settings.
        loras: They act together; with `compare` each alone; none: the config's run.
        checkpoints: "all", or steps, of the run; None draws what is finished.
        scales: The strengths at which checkpoints are drawn.
        config: A config to draw as its training did.
        seed, steps, guidance_scale, negative_prompt: None takes the prompt's own, or the usual.
        width, height: Pixels; None takes the config's resolution, or the model's own size.
    """

    base: str | None = None
    prompts: Sequence[str] | None = None
    loras: Sequence[Adapter] = ()
    compare: bool = False
    checkpoints: str | None = None
    scales: Sequence[float] = (1.0,)
    config: Path | None = None
    vae: str | None = None
    clip_skip: int | None = None
    output: Path = Path("sample.png")
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    device: str = "auto"


def run(request: SampleRequest) -> Path:
    """Draw every prompt with the base, then with the LoRAs beside it. Returns the PNG's path.

    Raises:
        UserError: if a file is not there or does not fit the base.
    """
    config = _config_of(request)
    columns = _columns(request, config)
    _check(request, config, columns)
    from lora_scripts import device
    from lora_scripts.logs import quiet_libraries
    from lora_scripts.models import lora_file
    from lora_scripts.tasks import build

    quiet_libraries()
    base = request.base or (config.base_model if config else "")
    compute = device.choose(request.device, "auto")
    family = build.load_family(build.find_base(base), compute, _options(request, config))
    drawings = _drawings(request, config, family)
    found: dict[str, list[Image.Image]] = {}
    for column in columns:
        lora_file.put_on(family, [(adapter.path, adapter.scale) for adapter in column])
        label = " + ".join(adapter.label for adapter in column) or "base"
        found[label] = [family.draw(drawing) for drawing in drawings]
        logger.info("Drawn: %s", label)
    picture = compose(found, [drawing.prompt for drawing in drawings])
    request.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(request.output)
    logger.info("Written: %s (%d prompts, %d columns)", request.output, len(drawings), len(columns))
    return request.output


def compose(columns: Mapping[str, list[Image.Image]], prompts: Sequence[str]) -> Image.Image:
    """A labelled grid: a row a prompt, or a column a prompt where there are more of these."""
    if len(prompts) > len(columns):
        return grid.labelled(list(columns.values()), list(prompts), list(columns))
    rows = [[column[i] for column in columns.values()] for i in range(len(prompts))]
    return grid.labelled(rows, list(columns), list(prompts))


# --- what is drawn --------------------------------------------------------------------------------


def _config_of(request: SampleRequest) -> ImageConfig | None:
    if request.config is None:
        return None
    config = config_file.load(request.config)
    if not isinstance(config, ImageConfig):
        raise user_error(str(request.config), "is a config for texts; use `lora-scripts chat`")
    return config


def _columns(request: SampleRequest, config: ImageConfig | None) -> list[Column]:
    """The base first, then the LoRAs together, each alone, or checkpoints × scales."""
    base: Column = ()
    if request.checkpoints is not None:
        return [base, *_of_checkpoints(request, config)]
    loras = list(request.loras)
    if not loras and config is not None:
        loras = [Adapter(config.output_dir, 1.0)]
    if not loras:
        return [base]
    return [base, *((lora,) for lora in loras)] if request.compare else [base, tuple(loras)]


def _of_checkpoints(request: SampleRequest, config: ImageConfig | None) -> list[Column]:
    """The ready file of each checkpoint asked for, at each scale."""
    from lora_scripts.training import checkpoint

    runs = [lora.path for lora in request.loras] or ([config.output_dir] if config else [])
    if len(runs) != 1:
        raise user_error("--checkpoints", "name one run: --config FILE or --lora OUTPUT_DIR")
    there = {int(path.name.removeprefix("step-")): path
             for path in checkpoint.listed(runs[0] / CHECKPOINTS)}  # fmt: skip
    if not there:
        raise user_error("--checkpoints", f"there are none in {runs[0] / CHECKPOINTS}")
    steps = list(there) if request.checkpoints == "all" else _numbers(request.checkpoints or "")
    missing = [step for step in steps if step not in there]
    if missing:
        known = ", ".join(map(str, there))
        raise user_error("--checkpoints", f"found {missing[0]}; there are {known}")
    files = [_ready_file(there[step]) for step in steps]
    return [(Adapter(file, scale),) for file, scale in itertools.product(files, request.scales)]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        what = f"found {text}; must be all, or steps: 100,200"
        raise user_error("--checkpoints", what) from None


def _ready_file(folder: Path) -> Path:
    files = [path for path in folder.glob("*.safetensors") if path.name != "training.safetensors"]
    if len(files) != 1:
        raise user_error(str(folder), "this checkpoint has no ready LoRA file")
    return files[0]


def _options(request: SampleRequest, config: ImageConfig | None) -> Options:
    from lora_scripts.models.family import Options
    from lora_scripts.tasks import build

    options = build.options_of(config) if config else Options(max_caption_tokens=225)
    if request.vae is not None:
        options = replace(options, vae=request.vae)
    if request.clip_skip is not None:
        options = replace(options, clip_skip=request.clip_skip)
    return options


def _drawings(
    request: SampleRequest, config: ImageConfig | None, family: ImageFamily
) -> list[DrawRequest]:
    """The pictures to draw. What is given on the command line comes before the config's."""
    from lora_scripts.models.family import DrawRequest

    size = config.resolution if config else family.native_size
    seed = config.seed if config else 42
    drawings = [
        DrawRequest(
            prompt=prompt.prompt,
            negative_prompt=_first(request.negative_prompt, prompt.negative_prompt),
            guidance_scale=_first(request.guidance_scale, prompt.guidance_scale),
            steps=_first(request.steps, prompt.steps),
            width=_first(request.width, prompt.width, size),
            height=_first(request.height, prompt.height, size),
            seed=_first(request.seed, prompt.seed, seed),
        )
        for prompt in _prompts(request, config)
    ]
    problems = [
        Problem(f"{side} {value}", f"must be a multiple of {family.pixel_multiple} for this model")
        for drawing in drawings
        for side, value in (("--width", drawing.width), ("--height", drawing.height))
        if value % family.pixel_multiple
    ]
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    return drawings


def _prompts(request: SampleRequest, config: ImageConfig | None) -> Sequence[SamplePrompt]:
    if request.prompts:
        return [SamplePrompt.model_validate({"prompt": text}) for text in request.prompts]
    return config.sample_prompts if config else []


def _first(*values: T | None) -> T:
    """The first value that is given."""
    return next(value for value in values if value is not None)


# --- checks ---------------------------------------------------------------------------------------


def _check(request: SampleRequest, config: ImageConfig | None, columns: Sequence[Column]) -> None:
    problems = []
    if request.base is None and config is None:
        problems.append(Problem("--base", "name the base model, or a --config that does"))
    if not _prompts(request, config):
        what = "give one" if config is None else "give one; the config has no sample_prompts"
        problems.append(Problem("--prompt", what))
    for path in dict.fromkeys(adapter.path for column in columns for adapter in column):
        file = path / DIFFUSERS_NAME if path.is_dir() else path
        if file.suffix.lower() != ".safetensors":
            what = "must be a .safetensors file or the output folder of a run"
            problems.append(Problem(f"--lora {path}", what))
        elif not file.is_file():
            problems.append(Problem(f"--lora {path}", f"there is no file {file}"))
    if request.output.suffix.lower() != ".png":
        problems.append(Problem(f"--output {request.output}", "must end in .png"))
    if problems:
        raise UserError(problems)
