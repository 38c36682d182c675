"""Toy-sized models of the real classes, and small data sets of real files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 32  # of the text states


def stable_diffusion_parts(
    *, prediction_type: str = "epsilon", zero_snr: bool = False, seed: int = 0
) -> dict[str, object]:
    """The parts of an SD1.x pipeline with random weights; 64-pixel pictures have 8×8 latents."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    if zero_snr:
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_config(
            scheduler.config,
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
        )
    tokenizer = character_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=37,
            num_attention_heads=2,
            num_hidden_layers=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return {
        "unet": unet,
        "vae": vae,
        "scheduler": scheduler,
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
    }


def character_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer whose vocabulary is single characters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.<>:_-"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def save_stable_diffusion(folder: Path, **options: object) -> Path:
    """A diffusers folder of a toy SD1.x model."""
    pipeline = StableDiffusionPipeline(
        **stable_diffusion_parts(**options),  # type: ignore[arg-type]
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(str(folder))
    return folder


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
