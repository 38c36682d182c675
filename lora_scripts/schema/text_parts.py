"""What stands inside the config of a text run: an entry of `datasets`, a sample prompt."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from lora_scripts.schema.fields import PathField, PositiveInt, Section, Weight, prompt_from_text


class TextDataset(Section):
    """One file or folder of texts in `datasets`."""

    path: PathField = Field(description="A data file, or a folder of them.")
    metadata_path: PathField | None = Field(
        None, description="The data file of a folder; by default metadata.csv, or all data files."
    )
    weight: Weight = Field(
        1.0,
        description="How often each row is seen in an epoch: 2 twice, 0.5 every second epoch.",
    )
    role: Literal["train", "validation"] = Field(
        "train", description="train: learned from. validation: only measured (held-out loss)."
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


TextPromptField = Annotated[
    TextPrompt, BeforeValidator(prompt_from_text, json_schema_input_type=str | TextPrompt)
]
