"""Toy-sized models of the real classes, and small data sets of real files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from lora_scripts.models.kinds import Family

WIDTH = 32  # of the text states
WIDTH_2 = 48  # of those of SDXL's second text encoder


def stable_diffusion_parts(
    *, prediction_type: str = "epsilon", zero_snr: bool = False, seed: int = 0
) -> dict[str, object]:
    """The parts of an SD1.x pipeline with random weights; 64-pixel pictures have 8×8 latents."""
    torch.manual_seed(seed)
    return {
        "unet": _unet(),
        "vae": _vae(),
        "scheduler": _scheduler(prediction_type, zero_snr=zero_snr),
        "tokenizer": (tokenizer := character_tokenizer()),
        "text_encoder": CLIPTextModel(_text_config(tokenizer, WIDTH)),
    }


def stable_diffusion_2_parts(
    *, prediction_type: str = "epsilon", zero_snr: bool = False, seed: int = 0
) -> dict[str, object]:
    """The parts of an SD2.x pipeline: linear projections, gelu, prompts padded with "!"."""
    torch.manual_seed(seed)
    tokenizer = character_tokenizer(pad_token="!")
    return {
        "unet": _unet(use_linear_projection=True, attention_head_dim=[2, 4]),
        "vae": _vae(),
        "scheduler": _scheduler(prediction_type, zero_snr=zero_snr),
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(_text_config(tokenizer, WIDTH, hidden_act="gelu")),
    }


def sdxl_parts(
    *, prediction_type: str = "epsilon", zero_snr: bool = False, seed: int = 0
) -> dict[str, object]:
    """The parts of an SDXL pipeline; its second tokenizer pads with "!", whose id is 0."""
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = character_tokenizer(), character_tokenizer(pad_token="!")
    bigger = _text_config(tokenizer_2, WIDTH_2, hidden_act="gelu", projection_dim=WIDTH_2)
    sampler = EulerDiscreteScheduler.from_config(
        _scheduler(prediction_type).config, timestep_spacing="leading"
    )
    if zero_snr:
        sampler = _to_zero_snr(EulerDiscreteScheduler, sampler.config)
    return {
        "unet": _unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH + WIDTH_2,
            attention_head_dim=[2, 4],
            transformer_layers_per_block=[1, 2],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH_2,
        ),
        "vae": _vae(scaling_factor=0.13025),
        "scheduler": sampler,
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "text_encoder": CLIPTextModel(_text_config(tokenizer, WIDTH)),
        "text_encoder_2": CLIPTextModelWithProjection(bigger),
    }


def _unet(**changes: object) -> UNet2DConditionModel:
    options: dict[str, object] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**{**options, **changes})


def _vae(**changes: object) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        **changes,
    )


def _scheduler(prediction_type: str, *, zero_snr: bool = False) -> SchedulerMixin:
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    if zero_snr:
        return _to_zero_snr(DDIMScheduler, scheduler.config, clip_sample=False)
    return scheduler


def _to_zero_snr(cls: Any, config: Any, **more: object) -> SchedulerMixin:
    return cls.from_config(config, rescale_betas_zero_snr=True, timestep_spacing="trailing", **more)


def _text_config(tokenizer: CLIPTokenizer, width: int, **changes: object) -> CLIPTextConfig:
    options: dict[str, object] = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 37,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**{**options, **changes})


def character_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIPTokenizer whose vocabulary is single characters; with "!", the id 0, if it pads."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.<>:_-"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    if pad_token == "!":
        tokens = ["!", *tokens]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77, pad_token=pad_token)


def save_stable_diffusion(folder: Path, **options: Any) -> Path:
    """A diffusers folder of a toy SD1.x model."""
    return _save_pipeline(folder, stable_diffusion_parts(**options))


def save_stable_diffusion_2(folder: Path, **options: Any) -> Path:
    """A diffusers folder of a toy SD2.x model."""
    return _save_pipeline(folder, stable_diffusion_2_parts(**options))


def save_sdxl(folder: Path, **options: Any) -> Path:
    """A diffusers folder of a toy SDXL model."""
    StableDiffusionXLPipeline(**sdxl_parts(**options)).save_pretrained(str(folder))
    return folder


def _save_pipeline(folder: Path, parts: dict[str, Any]) -> Path:
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(str(folder))
    return folder


# family -> how a toy of it is saved, and diffusers' pipeline that reads it
FAMILIES: Mapping[Family, tuple[Callable[[Path], Path], Any]] = {
    "sd1": (save_stable_diffusion, StableDiffusionPipeline),
    "sd2": (save_stable_diffusion_2, StableDiffusionPipeline),
    "sdxl": (save_sdxl, StableDiffusionXLPipeline),
}


def save_pictures(folder: Path, count: int = 6, side: int = 64, seed: int = 0) -> Path:
    """`count` PNGs of random squares with a metadata.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    rows = ["file_name,text"]
    for number in range(count):
        pixels = np.full((side, side, 3), random.integers(0, 255, 3), np.uint8)
        pixels[side // 4 : side // 2, side // 4 : side // 2] = random.integers(0, 255, 3)
        Image.fromarray(pixels).save(folder / f"img{number:02d}.png")
        rows.append(f'img{number:02d}.png,"a square, number {number}"')
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def write_config(path: Path, **values: object) -> Path:
    """A YAML file with these keys (JSON values are YAML values)."""
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
