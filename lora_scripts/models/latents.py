"""Between pictures and latents: the VAE, always in float32 and one picture at a time.

SDXL's VAE overflows in fp16, and a latent that is encoded alone depends on its picture alone.
Tensor suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from PIL import Image

from lora_scripts.errors import user_error
from lora_scripts.models.family import Options


def check(vae: AutoencoderKL) -> None:
    """See that a VAE is of a kind that is known here.

    Raises:
        UserError: if its latents are normed by channel, which no family here was trained with.
    """
    if vae.config.latents_mean is not None or vae.config.latents_std is not None:
        what = "its config has latents_mean and latents_std, which these models do not know"
        raise user_error("vae", f"{what}; name the VAE that belongs to the base model")


def side_factor(vae: AutoencoderKL) -> int:
    """How many pixels a latent pixel is wide."""
    factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
    return factor


def reading_of(vae: AutoencoderKL, options: Options) -> list[str]:
    """What latents depend on beside the VAE's weights: the scale where another VAE was put in."""
    return [] if options.vae is None else [f"times {vae.config.scaling_factor}"]


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels_CHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of a picture's latent, CHW on the CPU, scaled for the denoiser."""
    latent = vae.encode(pixels_CHW[None].to(vae.device)).latent_dist
    scale = vae.config.scaling_factor
    return latent.mean[0].cpu() * scale, latent.std[0].cpu() * scale


@torch.no_grad()
def decode(vae: AutoencoderKL, latents_BCHW: torch.Tensor) -> Image.Image:
    """The first of the latents as a picture."""
    latents_BCHW = latents_BCHW[:1].float() / vae.config.scaling_factor
    return _to_image(vae.decode(latents_BCHW.to(vae.device)).sample[0])


def _to_image(pixels_CHW: torch.Tensor) -> Image.Image:
    array_HWC = ((pixels_CHW.float().clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0)
    return Image.fromarray(array_HWC.to("cpu", torch.uint8).numpy(), mode="RGB")
