"""The schema of a run: every key, its type, its bounds, its default and one sentence.

Keys that both kinds of task have stand once, in `CommonConfig`; where a default differs, the task's
class states its own. The command line, the JSON Schema for editors and the docs follow from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from lora_scripts import wording

FORMAT_VERSION = 1


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
Role = Literal["train", "validation"]
ROLE = "train: learned from. validation: only measured (held-out loss)."


class Section(BaseModel):
    """A part of the config: frozen, exact types, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# --- parts of a config ----------------------------------------------------------------------------


class ImageDataset(Section):
    """One folder of pictures in `datasets`."""

    path: PathField = Field(description="Folder of pictures.")
    metadata_path: PathField | None = Field(
        None, description="Captions file; by default metadata.csv, metadata.jsonl or .txt sidecars."
    )
    repeats: PositiveInt = Field(1, description="How often each picture is seen in an epoch.")
    role: Role = Field("train", description=ROLE)


class TextDataset(Section):
    """One file or folder of texts in `datasets`."""

    path: PathField = Field(description="A data file, or a folder of them.")
    metadata_path: PathField | None = Field(
        None, description="The data file of a folder; by default metadata.csv, or all data files."
    )
    weight: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="How often each row is seen in an epoch: 2 twice, 0.5 every second epoch.",
    )
    role: Role = Field("train", description=ROLE)


Dataset = ImageDataset | TextDataset


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


class TextPrompt(Section):
    """One answer written while training."""

    prompt: str = Field(min_length=1, description="What the user says.")
    system_prompt: str | None = Field(
        None, description="The system message; by default the run's `system_prompt`."
    )
    max_new_tokens: PositiveInt = Field(128, description="The answer is cut off at this length.")
    temperature: float = Field(
        0.0, ge=0, le=10, description="0 takes the likeliest token, 1 draws as the model says."
    )
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Seed of the draw; by default the run's `seed`."
    )


def _measured(datasets: Sequence[Dataset]) -> bool:
    return any(dataset.role == "validation" for dataset in datasets)


def _prompt_from_text(value: Any) -> Any:
    return {"prompt": value} if isinstance(value, str) else value


ImagePromptField = Annotated[
    SamplePrompt, BeforeValidator(_prompt_from_text, json_schema_input_type=str | SamplePrompt)
]
TextPromptField = Annotated[
    TextPrompt, BeforeValidator(_prompt_from_text, json_schema_input_type=str | TextPrompt)
]


# --- the whole ------------------------------------------------------------------------------------


class CommonConfig(Section):
    """The keys that every task has."""

    format_version: Literal[1] = Field(1, description="Version of this file format.")
    task_type: Literal["image-generation", "text-generation"] = Field(
        "image-generation", description="What is trained."
    )

    # --- what goes in
    base_model: Annotated[str, AfterValidator(_usable_path)] = Field(
        min_length=1, description="Hub id, folder or file of the model to adapt."
    )
    train_data_dir: PathField | None = Field(
        None, description="The data; short for one entry in `datasets`."
    )
    metadata_path: PathField | None = Field(
        None, description="Captions or data file; default `<train_data_dir>/metadata.csv`."
    )
    datasets: Sequence[Dataset] = Field(
        default_factory=list, description="Several places, instead of `train_data_dir`."
    )
    validation_split: float = Field(
        0.0, ge=0, le=0.5, description="Share of the data held out to measure the loss."
    )
    cache_dir: PathField = Field(Path("cache"), description="Encoded data, reused by later runs.")

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
    batch_size: PositiveInt = Field(1, description="Pictures or rows per device and micro-batch.")
    gradient_accumulation_steps: PositiveInt = Field(
        1, description="Micro-batches per optimizer step."
    )
    optimizer: Literal["adamw"] = Field("adamw", description="The optimizer.")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="Peak learning rate.")
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Course of the learning rate after the warm-up."
    )
    lr_warmup_steps: int | None = Field(
        0, ge=0, le=10**9, description="Steps of linear warm-up; null: 4% of the run, at least 5."
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are clipped to this norm; 0 switches clipping off."
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
    early_stopping_patience: PositiveInt | None = Field(
        None,
        description="End after so many measurements without a lower held-out loss, take the best.",
    )
    histogram_steps: PositiveInt = Field(
        100, description="Steps between two gradient histograms in TensorBoard."
    )
    sample_steps: PositiveInt = Field(250, description="Steps between two rounds of samples.")

    # --- what comes out
    output_dir: PathField = Field(description="Folder of this run.")
    output_name: str = Field(
        default_factory=lambda data: data["output_dir"].resolve().name,
        min_length=1,
        max_length=100,
        validate_default=True,
        pattern=r'^[^\\/:*?"<>|\x00-\x1f]+$',
        description="Name of the LoRA; default: the output folder's name.",
    )
    save_steps: PositiveInt | None = Field(
        500, description="Steps between two checkpoints; null saves at the end only."
    )
    save_every_epochs: PositiveInt | None = Field(
        None, description="Epochs between two checkpoints."
    )
    save_total_limit: PositiveInt | None = Field(
        None,
        description="Checkpoints to keep; older ones are removed, the best never. null keeps all.",
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
    def _keys_fit_together(self) -> Self:
        misfits = [f"{key}: {what}" for key, what in misfits_of(self.model_dump())]
        if misfits:
            raise ValueError("\n".join(misfits))
        return self


class ImageConfig(CommonConfig):
    """A LoRA for a text-to-image model (`task_type: image-generation`)."""

    task_type: Literal["image-generation"] = Field(
        "image-generation", description="What is trained."
    )
    base_model: Annotated[str, AfterValidator(_usable_path)] = Field(
        min_length=1,
        description="Hub id, diffusers folder, or .safetensors file in the original SD1.x layout.",
    )
    datasets: Sequence[ImageDataset] = Field(
        default_factory=list, description="Several folders, in place of `train_data_dir`."
    )
    repeats: PositiveInt = Field(
        1, description="How often each picture of `train_data_dir` is seen in an epoch."
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
    min_snr_gamma: float | None = Field(
        None, gt=0, description="Min-SNR loss weighting (5 is usual); null weighs all steps alike."
    )
    sample_prompts: list[ImagePromptField] = Field(
        default_factory=list,
        description="Prompts drawn while training: texts, or maps with options.",
    )

    def all_datasets(self) -> Sequence[ImageDataset]:
        """The data as a list, `train_data_dir` written out."""
        if self.train_data_dir is None:
            return self.datasets
        return [
            ImageDataset(
                path=self.train_data_dir,
                metadata_path=self.metadata_path,
                repeats=self.repeats,
                role="train",
            )
        ]


class TextConfig(CommonConfig):
    """A LoRA for a language model (`task_type: text-generation`)."""

    task_type: Literal["text-generation"] = Field(description="What is trained.")
    base_model: Annotated[str, AfterValidator(_usable_path)] = Field(
        min_length=1, description="Hub id, transformers folder, or .gguf file."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. false: never."
    )
    quantization: Literal["nf4", "int8"] | None = Field(
        None, description="Hold the frozen model in 4 or 8 bits (bitsandbytes, NVIDIA cards only)."
    )
    datasets: Sequence[TextDataset] = Field(
        default_factory=list, description="Several files or folders, in place of `train_data_dir`."
    )
    validation_split: float = Field(
        default_factory=lambda data: 0.0 if _measured(data["datasets"]) else 0.05,
        ge=0,
        le=0.5,
        description="Share of the data held out to measure; 0 beside a dataset for validation.",
    )

    # --- texts
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="chatml, plain, a .jinja file or the template itself; null: the model's own.",
    )
    system_prompt: str | None = Field(
        None, min_length=1, description="Put before each conversation that has no system message."
    )
    train_on: Literal["responses", "all", "last"] = Field(
        "responses",
        description="What is learned: the assistant's turns, everything, or the last turn alone.",
    )
    max_seq_length: int = Field(
        1024, ge=8, le=10**6, description="Tokens of the longest row; longer ones are cut."
    )
    stride: int = Field(
        0,
        ge=0,
        le=10**6,
        description="Raw text: tokens that a window repeats, unlearned, before it.",
    )
    packing: bool = Field(
        True, description="Lay the rows of a batch end to end, each seeing only itself; no padding."
    )

    # --- the LoRA and the training
    target_modules: list[str] | None = Field(
        None,
        min_length=1,
        description="Adapted layers, e.g. [q_proj, v_proj]; null: all linear ones in the blocks.",
    )
    lora_alpha: float = Field(
        default_factory=lambda data: 2.0 * data["lora_rank"],
        gt=0,
        description="Scale of the update is lora_alpha / lora_rank; default: twice lora_rank.",
    )
    epochs: PositiveInt = Field(3, description="Passes over the data.")
    batch_size: PositiveInt = Field(4, description="Pictures or rows per device and micro-batch.")
    gradient_accumulation_steps: PositiveInt = Field(
        4, description="Micro-batches per optimizer step."
    )
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate.")
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Course of the learning rate after the warm-up."
    )
    lr_warmup_steps: int | None = Field(
        None,
        ge=0,
        le=10**9,
        description="Steps of linear warm-up; null: 4% of the run, at least 5.",
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    eval_steps: PositiveInt = Field(50, description="Steps between two measurements of the loss.")
    sample_steps: PositiveInt = Field(50, description="Steps between two rounds of samples.")
    sample_prompts: list[TextPromptField] = Field(
        default_factory=list,
        description="Prompts answered while training: texts, or maps with options.",
    )
    save_steps: PositiveInt | None = Field(
        100, description="Steps between two checkpoints; null saves at the end only."
    )

    def all_datasets(self) -> Sequence[TextDataset]:
        """The data as a list, `train_data_dir` written out."""
        if self.train_data_dir is None:
            return self.datasets
        data = TextDataset(
            path=self.train_data_dir, metadata_path=self.metadata_path, weight=1.0, role="train"
        )
        return [data]


Config = ImageConfig | TextConfig
SCHEMAS: dict[str, type[ImageConfig] | type[TextConfig]] = {
    "image-generation": ImageConfig,
    "text-generation": TextConfig,
}


def misfits_of(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys that are right each alone and wrong together; keys not in `values` are not judged."""
    if {"train_data_dir", "datasets"} <= values.keys():
        folder, datasets = values["train_data_dir"], values["datasets"]
        roles = {data.get("role", "train") for data in datasets}
        if folder is None and not datasets:
            is_text = values.get("task_type") == "text-generation"
            what = "file or folder of your data" if is_text else "folder of your pictures"
            yield "train_data_dir", f"missing; name the {what}"
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
        measured = values.get("validation_split") or "validation" in roles
        if values.get("early_stopping_patience") and not measured:
            yield "early_stopping_patience", "needs held-out data: set validation_split"
    if {"resolution", "bucket_step"} <= values.keys():
        resolution, step = values["resolution"], values["bucket_step"]
        if resolution % step:
            yield "resolution", f"found {resolution}, must be a multiple of bucket_step ({step})"
    if {"stride", "max_seq_length"} <= values.keys():
        stride, length = values["stride"], values["max_seq_length"]
        if stride >= length:
            yield "stride", f"found {stride}, must be less than max_seq_length ({length})"
    base_model = values.get("base_model")
    gguf = isinstance(base_model, str) and base_model.lower().endswith(".gguf")
    if gguf and values.get("quantization"):
        yield "quantization", "not on a .gguf file, which is dequantised; name the original model"
