"""Pictures of a base model with LoRAs beside it, as one labelled PNG."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from PIL import Image

from lora_scripts import collector, grid
from lora_scripts import config as config_file
from lora_scripts.adapters import Adapter
from lora_scripts.errors import Problem, UserError, user_error
from lora_scripts.logs import quiet_libraries
from lora_scripts.models import lora_layouts
from lora_scripts.run_files import CHECKPOINTS
from lora_scripts.schema import ImageConfig, SamplePrompt

if TYPE_CHECKING:
    from lora_scripts.models.family import DrawRequest, ImageFamily, Options

logger = logging.getLogger(__name__)

T = TypeVar("T")
Together = tuple[Adapter, ...]  # LoRAs that act together; none: the base alone


@dataclass(frozen=True)
class Sheet:
    """Which LoRAs each picture is drawn with: rows (for every prompt) of columns."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Together]]]  # a label beside the prompt, or ""


@dataclass(frozen=True)
class SampleRequest:
    """What to draw.

    Attributes:
        base: The base model; None takes the config's.
        prompts: None takes the config's `sample_prompts`, with their own settings.
        loras: They act together; with `compare` each alone; none: the config's run.
        checkpoints: "all", or steps, of the run; None draws what is finished.
        scales: The strengths at which checkpoints are drawn; None takes that of the LoRA.
        config: A config to draw as its training did.
        vae, clip_skip, prediction_type: None takes the config's, or the model's own.
        seed, steps, guidance_scale, negative_prompt: None takes the prompt's own, or the usual.
        width, height: Pixels; None takes the config's resolution, or the model's own size.
    """

    base: str | None = None
    prompts: Sequence[str] | None = None
    loras: Sequence[Adapter] = ()
    compare: bool = False
    checkpoints: str | None = None
    scales: Sequence[float] | None = None
    config: Path | None = None
    vae: str | None = None
    clip_skip: int | None = None
    prediction_type: Literal["auto", "epsilon", "v_prediction"] | None = None
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
    _check(request, config)
    sheet = _sheet(request, config)
    with collector.importing():
        quiet_libraries()
        from lora_scripts import device
        from lora_scripts.models import sd, sdxl  # noqa: F401
        from lora_scripts.tasks import build
    base = request.base or (config.base_model if config else "")
    compute = device.choose(request.device, "auto")
    family = build.load_family(build.find_base(base), compute, _options(request, config))
    drawings = _drawings(request, config, family)
    picture = compose(sheet, drawings, _drawn(sheet, drawings, family))
    request.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(request.output)
    logger.info("Written: %s, %d by %d pixels", request.output, picture.width, picture.height)
    return request.output


def _drawn(
    sheet: Sheet, drawings: Sequence[DrawRequest], family: ImageFamily
) -> dict[Together, list[Image.Image]]:
    """Every prompt with each of the sheet's sets of LoRAs, once."""
    from lora_scripts.models import lora_file

    found: dict[Together, list[Image.Image]] = {}
    for together in dict.fromkeys(cell for _, row in sheet.rows for cell in row):
        lora_file.put_on(family, [(adapter.path, adapter.scale) for adapter in together])
        found[together] = [family.draw(drawing) for drawing in drawings]
        logger.info("Drawn: %s", _label(together))
    return found


def compose(
    sheet: Sheet, drawings: Sequence[DrawRequest], found: Mapping[Together, Sequence[Image.Image]]
) -> Image.Image:
    """A labelled grid: a prompt's rows together, or a column a prompt where there are more."""
    prompts = [drawing.prompt for drawing in drawings]
    if len(sheet.rows) == 1 and len(prompts) > len(sheet.columns):
        [(_, row)] = sheet.rows
        return grid.labelled([found[cell] for cell in row], prompts, sheet.columns)
    rows, labels = [], []
    for number, prompt in enumerate(prompts):
        for label, row in sheet.rows:
            rows.append([found[cell][number] for cell in row])
            labels.append(f"{label}: {prompt}" if label else prompt)
    return grid.labelled(rows, sheet.columns, labels)


# --- what is drawn --------------------------------------------------------------------------------


def _config_of(request: SampleRequest) -> ImageConfig | None:
    if request.config is None:
        return None
    config = config_file.load(request.config)
    if not isinstance(config, ImageConfig):
        raise user_error(str(request.config), "is a config for texts; use `lora-scripts chat`")
    return config


def _sheet(request: SampleRequest, config: ImageConfig | None) -> Sheet:
    """The base first, then the LoRAs together, each alone, or checkpoints × scales."""
    if request.checkpoints is not None:
        return _of_checkpoints(request, config)
    loras = list(request.loras)
    if not loras and config is not None:
        lora_layouts.locate(config.output_dir)  # the run must be finished
        loras = [Adapter(config.output_dir, 1.0)]
    together: list[Together] = [(lora,) for lora in loras] if request.compare else [tuple(loras)]
    return _one_row([(), *together] if loras else [()])


def _one_row(cells: Sequence[Together]) -> Sheet:
    return Sheet([_label(cell) for cell in cells], [("", cells)])


def _label(together: Together) -> str:
    return " + ".join(adapter.label for adapter in together) or "base"


def _of_checkpoints(request: SampleRequest, config: ImageConfig | None) -> Sheet:
    """The ready file of each checkpoint asked for, at each scale: a row a checkpoint.

    With one scale the checkpoints stand side by side.
    """
    from lora_scripts.training import checkpoint

    runs = list(request.loras) or ([Adapter(config.output_dir, 1.0)] if config else [])
    if len(runs) != 1:
        raise user_error("--checkpoints", "name one run: --config FILE or --lora OUTPUT_DIR")
    [run] = runs
    there = {int(path.name.removeprefix("step-")): path
             for path in checkpoint.listed(run.path / CHECKPOINTS)}  # fmt: skip
    if not there:
        raise user_error("--checkpoints", f"there are none in {run.path / CHECKPOINTS}")
    steps = list(there) if request.checkpoints == "all" else _numbers(request.checkpoints or "")
    missing = [step for step in steps if step not in there]
    if missing:
        known = ", ".join(map(str, there))
        raise user_error("--checkpoints", f"found {missing[0]}; there are {known}")
    files = [_ready_file(there[step]) for step in steps]
    scales = request.scales or [run.scale]
    if len(scales) == 1:
        return _one_row([(), *((Adapter(file, scales[0]),) for file in files)])
    rows = [(file.stem, [(), *((Adapter(file, scale),) for scale in scales)]) for file in files]
    return Sheet(["base", *(f"{scale:g}" for scale in scales)], rows)


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
    if request.prediction_type is not None:
        options = replace(options, prediction_type=request.prediction_type)
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


def _check(request: SampleRequest, config: ImageConfig | None) -> None:
    problems = []
    if request.base is None and config is None:
        problems.append(Problem("--base", "name the base model, or a --config that does"))
    if not _prompts(request, config):
        what = "give one" if config is None else "give one; the config has no sample_prompts"
        problems.append(Problem("--prompt", what))
    if request.scales is not None and request.checkpoints is None:
        what = "is for --checkpoints; of a --lora write PATH:SCALE"
        problems.append(Problem("--scales", what))
    if request.compare and request.checkpoints is not None:
        problems.append(Problem("--compare", "does nothing beside --checkpoints"))
    for path in dict.fromkeys(lora.path for lora in request.loras):
        if not path.is_dir() and path.suffix.lower() != ".safetensors":
            what = "must be a .safetensors file or the output folder of a run"
            problems.append(Problem(f"--lora {path}", what))
        elif request.checkpoints is None:
            problems += _missing(path)
    if request.output.suffix.lower() != ".png":
        problems.append(Problem(f"--output {request.output}", "must end in .png"))
    if problems:
        raise UserError(problems)


def _missing(path: Path) -> list[Problem]:
    """The problem with a LoRA that is not there."""
    try:
        lora_layouts.locate(path)
    except UserError as error:
        return [Problem(f"--lora {each.where}", each.what) for each in error.problems]
    return []
