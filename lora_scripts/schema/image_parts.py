"""What stands inside the config of an image run: an entry of `datasets`, a sample prompt."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from lora_scripts.schema.fields import (
    Names,
    PathField,
    PositiveInt,
    Section,
    Weight,
    prompt_from_text,
)


class ImageDataset(Section):
    """One folder of pictures in `datasets`."""

    path: PathField = Field(description="Folder of pictures.")
    metadata_path: PathField | None = Field(
        None, description="Captions file; by default metadata.csv, metadata.jsonl or .txt sidecars."
    )
    caption_keys: Names | None = Field(
        None,
        description="Columns of the captions file; of several one is drawn each time.",
    )
    mask_dir: PathField | None = Field(
        None, description="Folder of masks, of the pictures' names: white is learned, black not."
    )
    repeats: PositiveInt = Field(1, description="How often each picture is seen in an epoch.")
    weight: Weight = Field(
        1.0, description="Times repeats: 2 twice as often, 0.5 in every second epoch."
    )
    role: Literal["train", "regularisation", "validation"] = Field(
        "train",
        description="regularisation: the class, to be kept; validation: only measured.",
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


ImagePromptField = Annotated[
    SamplePrompt, BeforeValidator(prompt_from_text, json_schema_input_type=str | SamplePrompt)
]
