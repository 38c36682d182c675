"""The whole schema of a run: every key, its type, its bounds, its default and one sentence.

`load(path, overrides)` reads a YAML file and answers with a frozen, fully resolved config, or with
every problem at once (`UserError`). The command line, the JSON Schema for editors and the docs
follow from the classes below.
"""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from lora_scripts import wording, yaml_source
from lora_scripts.errors import Problem, UserError, user_error

FORMAT_VERSION = 1
COMMAND_LINE, NOWHERE = 10**9, 10**9 + 1  # sorted behind every line of a file


def _usable_path(path: str) -> str:
    """No text that is a path by accident, or that a later step would stumble over."""
    if not path.strip():
        raise ValueError("must not be empty")
    if wording.CONTROL_CHARACTER.search(path):
        raise ValueError(
            "must be a path without control characters; in double quotes a backslash is an "
            "escape: write / or use single quotes"
        )
    return path


def _in_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"must be a path; {error}") from None


PathField = Annotated[
    Path,
    Field(strict=False),
    BeforeValidator(lambda value: _usable_path(value) if isinstance(value, str) else value),
    AfterValidator(_in_home),
]
PositiveInt = Annotated[int, Field(ge=1, le=10**9)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of the config: frozen, exact types, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Dataset(Section):
    """One folder of pictures in `datasets`."""

    path: PathField = Field(description="Folder of pictures.")
    metadata_path: PathField | None = Field(
        None, description="Captions file; by default metadata.csv, metadata.jsonl or .txt sidecars."
    )
    repeats: PositiveInt = Field(1, description="How often each picture is seen in an epoch.")
    role: Literal["train", "validation"] = Field(
        "train", description="train: learned from. validation: only measured (held-out loss)."
    )


class SamplePrompt(Section):
    """One picture drawn while training, always with the same seed."""

    prompt: str = Field(description="The prompt.")
    negative_prompt: str = Field("", description="What the picture should not show.")
    guidance_scale: float = Field(7.5, ge=0, description="Classifier-free guidance; 1 is none.")
    steps: PositiveInt = Field(25, description="Denoising steps.")
    width: PositiveInt | None = Field(None, description="Pixels; by default `resolution`.")
    height: PositiveInt | None = Field(None, description="Pixels; by default `resolution`.")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Noise seed; by default the run's `seed`."
    )


def _prompt_from_text(value: Any) -> Any:
    return {"prompt": value} if isinstance(value, str) else value


PromptField = Annotated[
    SamplePrompt, BeforeValidator(_prompt_from_text, json_schema_input_type=str | SamplePrompt)
]


class ImageConfig(Section):
    """A LoRA for a text-to-image model (`task_type: image-generation`)."""

    format_version: Literal[1] = Field(1, description="Version of this file format.")
    task_type: Literal["image-generation"] = Field(
        "image-generation", description="What is trained."
    )

    # --- what goes in
    base_model: Annotated[str, AfterValidator(_usable_path)] = Field(
        min_length=1,
        description="Hub id, diffusers folder, or .safetensors file in the original SD1.x layout.",
    )
    train_data_dir: PathField | None = Field(
        None, description="Folder of pictures; short for one entry in `datasets`."
    )
    metadata_path: PathField | None = Field(
        None, description="Captions file; default `<train_data_dir>/metadata.csv`."
    )
    datasets: list[Dataset] = Field(
        default_factory=list, description="Several folders, in place of `train_data_dir`."
    )
    repeats: PositiveInt = Field(
        1, description="How often each picture of `train_data_dir` is seen in an epoch."
    )
    validation_split: float = Field(
        0.0, ge=0, le=0.5, description="Share of the pictures held out to measure the loss."
    )

    # --- pictures and captions
    resolution: int = Field(512, ge=64, le=8192, description="Side of a square picture, in pixels.")
    bucket_step: int = Field(
        64,
        ge=8,
        le=8192,
        multiple_of=8,
        description="Sides of the aspect-ratio buckets are multiples of it.",
    )
    aspect_ratio_buckets: bool = Field(
        True, description="Keep each picture's shape; false crops every one to a square."
    )
    random_flip: bool = Field(False, description="Mirror half of the views left to right.")
    trigger_word: str | None = Field(
        None, min_length=1, description="Put before each caption that does not contain it."
    )
    caption_prefix: str = Field("", description="Put before each caption, exactly as typed.")
    caption_suffix: str = Field("", description="Put after each caption, exactly as typed.")
    caption_dropout: Fraction = Field(
        0.0, description="Share of the views shown with an empty caption."
    )
    cache_dir: PathField = Field(
        Path("cache"), description="Encoded pictures and captions, reused by later runs."
    )

    # --- the LoRA
    lora_rank: int = Field(16, ge=1, le=1024, description="Rank of the update matrices.")
    lora_alpha: float = Field(
        default_factory=lambda data: float(data["lora_rank"]),
        gt=0,
        description="Scale of the update is lora_alpha / lora_rank; default: lora_rank.",
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the LoRA.")

    # --- training
    epochs: PositiveInt = Field(10, description="Passes over the data.")
    max_train_steps: PositiveInt | None = Field(None, description="A cap on the epochs.")
    batch_size: PositiveInt = Field(1, description="Pictures per device and micro-batch.")
    gradient_accumulation_steps: PositiveInt = Field(
        1, description="Micro-batches per optimizer step."
    )
    optimizer: Literal["adamw"] = Field("adamw", description="The optimizer.")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="Peak learning rate.")
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Course of the learning rate after the warm-up."
    )
    lr_warmup_steps: int = Field(0, ge=0, le=10**9, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are clipped to this norm; 0 switches clipping off."
    )
    min_snr_gamma: float | None = Field(
        None, gt=0, description="Min-SNR loss weighting (5 is usual); null weighs all steps alike."
    )
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = Field(
        "auto", description="Precision of the frozen model and of the arithmetic."
    )
    gradient_checkpointing: bool = Field(
        False, description="Less memory for more time: activations are computed twice."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes CUDA where there is one."
    )
    seed: int = Field(42, ge=0, lt=2**63, description="Every random choice follows from it.")

    # --- what is seen meanwhile
    eval_steps: PositiveInt = Field(100, description="Steps between two measurements of the loss.")
    histogram_steps: PositiveInt = Field(
        100, description="Steps between two gradient histograms in TensorBoard."
    )
    sample_steps: PositiveInt = Field(
        250, description="Steps between two rounds of sample pictures."
    )
    sample_prompts: list[PromptField] = Field(
        default_factory=list,
        description="Prompts drawn while training: texts, or maps with options.",
    )

    # --- what comes out
    output_dir: PathField = Field(description="Folder of this run.")
    output_name: str = Field(
        default_factory=lambda data: data["output_dir"].resolve().name,
        min_length=1,
        max_length=100,
        validate_default=True,
        pattern=r'^[^\\/:*?"<>|\x00-\x1f]+$',
        description="Name typed in a prompt, `<lora:NAME:0.8>`; default: the output folder's name.",
    )
    save_steps: PositiveInt | None = Field(
        500, description="Steps between two checkpoints; null saves at the end only."
    )
    save_every_epochs: PositiveInt | None = Field(
        None, description="Epochs between two checkpoints."
    )
    save_total_limit: PositiveInt | None = Field(
        None, description="Checkpoints to keep; older ones are removed. null keeps all."
    )
    save_dtype: Literal["fp32", "fp16", "bf16"] = Field(
        "fp16", description="Precision of the LoRA files."
    )
    resume: str = Field(
        "auto",
        min_length=1,
        description="auto: go on where the folder stands; never: start anew; or a checkpoint.",
    )

    @model_validator(mode="after")
    def _keys_fit_together(self) -> ImageConfig:
        misfits = [f"{key}: {what}" for key, what in _misfits(self.model_dump())]
        if misfits:
            raise ValueError("\n".join(misfits))
        return self

    def all_datasets(self) -> list[Dataset]:
        """The data as a list, `train_data_dir` written out."""
        if self.train_data_dir is None:
            return self.datasets
        return [
            Dataset(
                path=self.train_data_dir,
                metadata_path=self.metadata_path,
                repeats=self.repeats,
                role="train",
            )
        ]


def _misfits(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys that are right each alone and wrong together; keys not in `values` are not judged."""
    if {"train_data_dir", "datasets"} <= values.keys():
        folder, datasets = values["train_data_dir"], values["datasets"]
        roles = {data.get("role", "train") for data in datasets}
        if folder is None and not datasets:
            yield "train_data_dir", "missing; name the folder of your pictures"
        if folder is not None and datasets:
            yield "datasets", "stands beside train_data_dir; give one of the two"
        if datasets and values.get("metadata_path") is not None:
            yield "metadata_path", "belongs to train_data_dir; name it in the datasets"
        if datasets and values.get("repeats", 1) != 1:
            yield "repeats", "belongs to train_data_dir; name it in the datasets"
        if datasets and "train" not in roles:
            yield "datasets", "none of them has the role train"
        if values.get("validation_split") and "validation" in roles:
            yield "validation_split", "a dataset has the role validation already"
    if {"resolution", "bucket_step"} <= values.keys():
        resolution, step = values["resolution"], values["bucket_step"]
        if resolution % step:
            yield "resolution", f"found {resolution}, must be a multiple of bucket_step ({step})"


Config = ImageConfig  # a union discriminated by task_type once there is more than one task


@dataclass(frozen=True)
class Draft:
    """What a config file says: the config if it is valid, else everything that is wrong with it."""

    config: Config | None
    problems: list[Problem]
    values: dict[str, Any] = field(repr=False)  # the keys that passed, as written
    source: Source

    def checked(self) -> Config:
        """The config.

        Raises:
            UserError: with all problems found, each with file, line and key.
        """
        if self.config is None or self.problems:
            raise UserError(self.problems)
        return self.config


@dataclass(frozen=True)
class Source:
    """Where each key was written."""

    name: str
    lines: dict[yaml_source.Location, int]
    overridden: frozenset[str]

    def where(self, *location: str | int) -> str:
        """The place of a key, for an error message: `my.yaml line 7: lora_rank`."""
        key = ".".join(str(part) for part in location)
        if location and location[0] in self.overridden:
            return f"command line: {key}"
        for length in range(len(location), 0, -1):
            if location[:length] in self.lines:
                return f"{self.name} line {self.lines[location[:length]]}: {key}"
        return f"{self.name}: {key}"

    def locate(self, problem: Problem) -> Problem:
        """A problem that names a key, found later in the run, with the key's place in the file."""
        if problem.where not in ImageConfig.model_fields:
            return problem
        return replace(problem, where=self.where(problem.where))

    def line(self, location: Sequence[str | int]) -> int:
        """The line of the innermost part of `location` that was written, to sort by."""
        if location and location[0] in self.overridden:
            return COMMAND_LINE
        for length in range(len(location), 0, -1):
            if tuple(location[:length]) in self.lines:
                return self.lines[tuple(location[:length])]
        return NOWHERE


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override, check: the config of a run.

    Raises:
        UserError: with all problems found, each with file, line and key.
    """
    return read(path, overrides).checked()


def read(path: Path, overrides: Sequence[str] = ()) -> Draft:
    """Read `path`, apply `key=value` overrides (read by the same rules), check everything.

    Raises:
        UserError: if the file is not there or is no YAML mapping; all else is in the draft.
    """
    document = yaml_source.parse(_read_text(path), str(path))
    problems = list(document.problems)
    overridden = set()
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        if not equals or not key:
            problem = Problem(f"command line: {override}", "must have the form key=value")
            problems.append((COMMAND_LINE, problem))
            continue
        overridden.add(key)
        try:
            document.values[key] = yaml_source.parse_value(text, f"command line: {key}")
        except UserError as error:
            problems += [(COMMAND_LINE, problem) for problem in error.problems]
    source = Source(str(path), document.lines, frozenset(overridden))
    config, values, findings = _check(document.values, source)
    spoilt = {line for line, _ in problems}  # by a tag, say: not to be told twice
    problems += [finding for finding in findings if finding[0] not in spoilt - {COMMAND_LINE}]
    problems.sort(key=lambda placed: placed[0])
    return Draft(config, [problem for _, problem in problems], values, source)


def _check(
    values: dict[str, Any], source: Source
) -> tuple[Config | None, dict[str, Any], list[tuple[int, Problem]]]:
    """The config if `values` are valid; the values that are; what is wrong, each with its line."""
    try:
        return ImageConfig.model_validate(values), values, []
    except ValidationError as error:
        findings = error.errors()
    wrong = {finding["loc"][0] for finding in findings if finding["loc"]}
    passed = {key: value for key, value in values.items() if key not in wrong}
    meant = {_nearest_key(finding["loc"]) for finding in findings} - {None}
    problems = []
    for finding in findings:
        location = finding["loc"]
        if finding["type"] == "missing" and location in meant:
            continue  # a mistyped key beside it says so already
        if location:  # else: misfits, which are looked for below in any case
            problems += [(source.line(location), found) for found in _explain(finding, source)]
    defaults = {key: value for key, value in _defaults().items() if key not in wrong}
    for key, what in _misfits({**defaults, **passed}):
        if (key,) not in meant:
            problems.append((source.line((key,)), Problem(source.where(key), what)))
    return None, passed, problems


def _defaults() -> dict[str, Any]:
    """What a key is when it is left out; without the keys that follow from others."""
    return {
        name: field.get_default(call_default_factory=True)
        for name, field in ImageConfig.model_fields.items()
        if not field.is_required() and not field.default_factory_takes_validated_data
    }


def dump(config: Config) -> str:
    """The config with every key as resolved, as YAML that `load` reads back to an equal config."""
    from ruamel.yaml import YAML

    stream = io.StringIO()
    writer = YAML(typ="rt")
    writer.width = 1000
    writer.allow_unicode = True
    writer.dump(_quoted(json.loads(config.model_dump_json())), stream)
    return stream.getvalue()


def _quoted(value: Any) -> Any:
    """Every text in double quotes: `no`, `.5e3` or a line end stay what they are."""
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    match value:
        case dict():
            return {key: _quoted(item) for key, item in value.items()}
        case list():
            return [_quoted(item) for item in value]
        case str():
            return DoubleQuotedScalarString(value)
        case _:
            return value


def schema() -> dict[str, Any]:
    """The JSON Schema that editors use to complete and check a config while it is typed."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **ImageConfig.model_json_schema(mode="validation"),
        "title": "lora-scripts config",
    }


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise user_error(str(path), _missing_file(path)) from None
    except UnicodeDecodeError:
        raise user_error(str(path), "not written in UTF-8; save it with that encoding") from None
    except OSError as error:
        raise user_error(str(path), f"cannot be read: {error.strerror}") from None


def _missing_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"no such file; there is no folder {path.parent} either"
    others = sorted(other.name for other in path.parent.glob("*.y*ml"))
    near = difflib.get_close_matches(path.name, others, n=1)
    if near:
        return f"no such file; did you mean {path.parent / near[0]}?"
    return "no such file" + (f"; there are: {', '.join(others[:8])}" if others else "")


def _explain(details: Any, source: Source) -> list[Problem]:
    """One of pydantic's findings in our words: where, what was found, what is allowed."""
    location: tuple[str | int, ...] = details["loc"]
    where = source.where(*location)
    match details["type"]:
        case "default_factory_not_called":  # follows from another finding
            return []
        case "extra_forbidden":
            return [Problem(where, _unknown_key(location))]
        case "missing":
            return [Problem(where, f"missing; {_field_of(location)}")]
        case _:
            what = f"found {wording.shown(details['input'])}, {wording.allowed(details)}"
            return [Problem(where, what)]


def _section_at(location: Sequence[str | int]) -> type[Section]:
    match [part for part in location if isinstance(part, str)]:
        case ["datasets", *_]:
            return Dataset
        case ["sample_prompts", *_]:
            return SamplePrompt
        case _:
            return ImageConfig


def _field_of(location: Sequence[str | int]) -> str:
    return _section_at(location).model_fields[str(location[-1])].description or ""


def _unknown_key(location: Sequence[str | int]) -> str:
    near = _nearest_key(location)
    if near is not None:
        return f"unknown key; did you mean {near[-1]}?"
    return "unknown key; configs/schema.json lists every key"


def _nearest_key(location: Sequence[str | int]) -> tuple[str | int, ...] | None:
    """The key that was probably meant, if `location` is no key."""
    if not location or not isinstance(location[-1], str):
        return None
    known = list(_section_at(location[:-1]).model_fields)
    if location[-1] in known:
        return None
    near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    return (*location[:-1], near[0]) if near else None
