"""The config of a text run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from lora_scripts.schema.common import BATCH, CommonConfig, Dataset, rate_for
from lora_scripts.schema.fields import BatchField, ModelField, Names, PositiveInt
from lora_scripts.schema.text_parts import TextDataset, TextPromptField


class TextConfig(CommonConfig):
    """A LoRA for a language model (`task_type: text-generation`)."""

    task_type: Literal["text-generation"] = Field(description="What is trained.")
    base_model: ModelField = Field(
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
    lora_targets: Literal["attention", "linear"] | Names = Field(
        "linear",
        description="attention; linear: every linear layer of the blocks; or names: [q_proj].",
    )
    lora_alpha: float = Field(
        default_factory=lambda data: 2.0 * data["lora_rank"],
        gt=0,
        description="Scale of the update is lora_alpha / lora_rank; default: twice lora_rank.",
    )
    epochs: PositiveInt = Field(3, description="Passes over the data.")
    batch_size: BatchField = Field(4, description=BATCH)
    gradient_accumulation_steps: PositiveInt = Field(
        4, description="Micro-batches per optimizer step."
    )
    learning_rate: float = Field(
        default_factory=lambda data: rate_for(data, 2e-4),
        gt=0,
        le=1,
        description="Peak rate; default: 1e-4 for images, 2e-4 for texts, 1.0 with prodigy.",
    )
    lr_scheduler: Literal["constant", "linear", "cosine", "cosine_with_restarts"] = Field(
        "cosine", description="Course of the learning rate after the warm-up."
    )
    lr_warmup_steps: int | None = Field(
        None,
        ge=0,
        le=10**9,
        description="Steps of linear warm-up; null: 4% of the run, at least 5.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
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


def _measured(datasets: Sequence[Dataset]) -> bool:
    return any(dataset.role == "validation" for dataset in datasets)
