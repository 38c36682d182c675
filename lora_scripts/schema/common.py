"""The keys that both kinds of task have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from lora_scripts.schema.fields import (
    BatchField,
    ModelField,
    PathField,
    PositiveInt,
    Section,
    usable_name,
)
from lora_scripts.schema.image_parts import ImageDataset
from lora_scripts.schema.misfits import misfits_of
from lora_scripts.schema.text_parts import TextDataset

Dataset = ImageDataset | TextDataset
BATCH = "Samples at once; auto: as many as fit, gradient_accumulation_steps being those of a step."
PRODIGY_RATE = 1.0  # Prodigy finds the rate itself; what is given only scales it


class CommonConfig(Section):
    """The keys that every task has."""

    format_version: Literal[1] = Field(1, description="Version of this file format.")
    task_type: Literal["image-generation", "text-generation"] = Field(
        "image-generation", description="What is trained."
    )

    # --- what goes in
    base_model: ModelField = Field(
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
    strict_data: bool = Field(False, description="Warnings about the data stop the run, too.")
    cache_dir: PathField = Field(Path("cache"), description="Encoded data, reused by later runs.")

    # --- the LoRA
    lora_type: Literal["lora", "dora", "rslora"] = Field(
        "lora", description="dora: learns magnitudes, too. rslora: scaled by 1/√rank, not 1/rank."
    )
    lora_rank: int = Field(16, ge=1, le=1024, description="Rank of the update matrices.")
    lora_alpha: float = Field(
        default_factory=lambda data: float(data["lora_rank"]),
        gt=0,
        description="Scale of the update is lora_alpha / lora_rank; default: lora_rank.",
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the LoRA.")
    init_lora: PathField | None = Field(
        None, description="A finished LoRA to go on from, of the same rank: file or run folder."
    )

    # --- training
    epochs: PositiveInt = Field(10, description="Passes over the data.")
    max_train_steps: PositiveInt | None = Field(None, description="A cap on the epochs.")
    batch_size: BatchField = Field(1, description=BATCH)
    gradient_accumulation_steps: PositiveInt = Field(
        1, description="Micro-batches per optimizer step."
    )
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "lion", "prodigy"] = Field(
        "adamw", description="All but adamw and adafactor need their package installed."
    )
    learning_rate: float = Field(
        default_factory=lambda data: rate_for(data, 1e-4),
        gt=0,
        le=1,
        description="Peak rate; default: 1e-4 for images, 2e-4 for texts, 1.0 with prodigy.",
    )
    lr_scheduler: Literal["constant", "linear", "cosine", "cosine_with_restarts"] = Field(
        "constant", description="Course of the learning rate after the warm-up."
    )
    lr_num_cycles: PositiveInt = Field(3, description="Cycles of cosine_with_restarts.")
    lr_warmup_steps: int | None = Field(
        0, ge=0, le=10**9, description="Steps of linear warm-up; null: 4% of the run, at least 5."
    )
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are clipped to this norm; 0 switches clipping off."
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Export a moving average of the LoRA (0.999, say); null: the last step's.",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="A loss that is no number: end, or leave out at most 10 such steps."
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
    distributed: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="Several processes: each holds the frozen base (ddp), or a share of it (fsdp).",
    )
    offload: bool = Field(
        False,
        description="Less of a card's memory for more time: the frozen base waits in RAM.",
    )
    seed: int = Field(42, ge=0, lt=2**63, description="Every random choice follows from it.")
    deterministic: bool = Field(
        False, description="Slower on cards: two runs, resumed or not, are equal to the last bit."
    )

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
    output_name: Annotated[str, AfterValidator(usable_name)] = Field(
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

    @property
    def micro_batch(self) -> int:
        """`batch_size` as a number.

        Raises:
            ValueError: while it is still auto (`batch_size.settle` chooses).
        """
        if self.batch_size == "auto":
            raise ValueError("batch_size is auto; no batch has been chosen yet")
        return self.batch_size

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Self:
        misfits = [f"{key}: {what}" for key, what in misfits_of(self.model_dump())]
        if misfits:
            raise ValueError("\n".join(misfits))
        return self


def rate_for(data: dict[str, object], usual: float) -> float:
    """The default learning rate of an optimizer."""
    return PRODIGY_RATE if data["optimizer"] == "prodigy" else usual
