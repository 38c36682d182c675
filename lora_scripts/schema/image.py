"""The config of an image run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from lora_scripts.schema.common import CommonConfig
from lora_scripts.schema.fields import (
    AutoOrBool,
    Fraction,
    ModelField,
    Names,
    PathField,
    PositiveInt,
)
from lora_scripts.schema.image_parts import ImageDataset, ImagePromptField

TEXT_ENCODER_SHARE = 0.5  # of learning_rate, by default


class ImageConfig(CommonConfig):
    """A LoRA for a text-to-image model (`task_type: image-generation`)."""

    task_type: Literal["image-generation"] = Field(
        "image-generation", description="What is trained."
    )
    base_model: ModelField = Field(
        min_length=1,
        description="Hub id, diffusers folder, or original .safetensors: SD1.x, SD2.x, SDXL.",
    )
    datasets: Sequence[ImageDataset] = Field(
        default_factory=list, description="Several folders, in place of `train_data_dir`."
    )
    repeats: PositiveInt = Field(
        1, description="How often each picture of `train_data_dir` is seen in an epoch."
    )
    caption_keys: Names | None = Field(
        None,
        description="Columns of the captions file; of several one is drawn each time.",
    )

    # --- the base model
    vae: ModelField | None = Field(
        None, min_length=1, description="Another VAE than the base model's: hub id, folder or file."
    )
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = Field(
        "auto", description="What the model predicts; auto: read from it, else tried out."
    )
    zero_terminal_snr: AutoOrBool = Field(
        "auto", description="Noise schedule that ends in pure noise; auto: as the model says."
    )
    clip_skip: int | None = Field(
        None,
        ge=1,
        le=24,
        description="Text encoder layer from the end, as in WebUI; null: the model's own.",
    )
    max_caption_tokens: Literal[75, 150, 225] = Field(
        75, description="Longer captions are cut; past 75 they are read in parts, as in WebUI."
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
    random_crop: bool = Field(
        False, description="Cut at a place drawn anew each time, not from the middle."
    )
    random_flip: bool = Field(False, description="Mirror half of the views left to right.")
    cache_latents: AutoOrBool = Field(
        "auto", description="Encode pictures once, to disk; auto: unless random_crop."
    )
    masked_loss: bool = Field(
        False, description="Learn only where a mask, or the picture's alpha, says so."
    )
    mask_dir: PathField | None = Field(
        None, description="Masks of `train_data_dir`, of the pictures' names; white is learned."
    )
    trigger_word: str | None = Field(
        None, min_length=1, description="Put before each caption that does not contain it."
    )
    caption_prefix: str = Field("", description="Put before each caption, exactly as typed.")
    caption_suffix: str = Field("", description="Put after each caption, exactly as typed.")
    caption_dropout: Fraction = Field(
        0.0, description="Share of the views shown with an empty caption."
    )
    shuffle_tags: bool = Field(
        False, description="Comma-separated tags in another order each time."
    )
    tag_dropout: float = Field(0.0, ge=0, lt=1, description="Share of the tags left out each time.")
    keep_tokens: int = Field(
        0,
        ge=0,
        le=225,
        description="So many tags stay first; a trigger word put in front is one of them.",
    )

    # --- the LoRA and the training
    lora_targets: Literal["attention", "linear", "all"] | Names = Field(
        "attention",
        description="attention; linear: feed-forward, too; all: convolutions, too; or names.",
    )
    train_text_encoder: bool = Field(False, description="Put a LoRA on the text encoders, too.")
    text_encoder_learning_rate: float = Field(
        default_factory=lambda data: text_encoder_rate(data),
        gt=0,
        le=1,
        description="Its peak learning rate; default: half of learning_rate, with prodigy all.",
    )
    min_snr_gamma: float | None = Field(
        None, gt=0, description="Min-SNR loss weighting (5 is usual); null weighs all steps alike."
    )
    noise_offset: float = Field(
        0.0, ge=0, le=1, description="Shift of each noise channel, to learn dark and bright (0.05)."
    )
    prior_loss_weight: float = Field(
        1.0, gt=0, le=100, description="Weight of the pictures with the role regularisation."
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
                caption_keys=self.caption_keys,
                mask_dir=self.mask_dir,
                repeats=self.repeats,
                weight=1.0,
                role="train",
            )
        ]


def text_encoder_rate(data: dict[str, object]) -> float:
    """Half of the learning rate; Prodigy takes one rate for all."""
    rate = data["learning_rate"]
    assert isinstance(rate, float)
    return rate if data["optimizer"] == "prodigy" else TEXT_ENCODER_SHARE * rate
