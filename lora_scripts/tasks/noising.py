"""Noise, targets and weights of the diffusion loss. Pure functions.

Tensor suffixes: B batch, C channels, H height, W width (latent).
"""

from __future__ import annotations

import torch

from lora_scripts.models.family import Prediction


def diffuse(
    latents_BCHW: torch.Tensor,
    noise_BCHW: torch.Tensor,
    signal_B: torch.Tensor,
    prediction: Prediction,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The noisy latent and the training target at signal level ᾱ = `signal_B`.

    x_t = √ᾱ x₀ + √(1−ᾱ) ε (Ho et al. 2020, arXiv 2006.11239, eq. 4); the target is ε, or the
    velocity √ᾱ ε − √(1−ᾱ) x₀ (Salimans & Ho 2022, arXiv 2202.00512, appendix D).
    """
    signal_B111 = signal_B.sqrt()[:, None, None, None]
    noise_B111 = (1 - signal_B).sqrt()[:, None, None, None]
    noisy_BCHW = signal_B111 * latents_BCHW + noise_B111 * noise_BCHW
    if prediction == "epsilon":
        return noisy_BCHW, noise_BCHW
    return noisy_BCHW, signal_B111 * noise_BCHW - noise_B111 * latents_BCHW


def min_snr_weight(signal_B: torch.Tensor, gamma: float, prediction: Prediction) -> torch.Tensor:
    """Min-SNR-γ weights, shape B (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    min(snr, γ) / snr for ε and min(snr, γ) / (snr + 1) for v, with snr = ᾱ / (1 − ᾱ). At zero
    signal the weight for ε is its limit, 1.
    """
    snr_B = signal_B / (1 - signal_B)
    if prediction == "epsilon":
        return (gamma / snr_B).clamp(max=1)
    return snr_B.clamp(max=gamma) / (snr_B + 1)
