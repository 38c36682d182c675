"""Noise schedules: diffusers' samplers, read, and set to what the model predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from lora_scripts.errors import user_error
from lora_scripts.models import foreign
from lora_scripts.models.family import Prediction

# These can draw from a noise schedule that ends in pure noise.
TO_ZERO_SNR = (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
SCHEDULERS = (
    *TO_ZERO_SNR,
    DEISMultistepScheduler,
    DPMSolverSinglestepScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)


def read(folder: Path) -> SchedulerMixin:
    """The sampler that a diffusers folder names.

    Raises:
        UserError: if it is of a kind that is not known here.
    """
    with foreign.reading(folder, "the scheduler's config"):
        config = DDPMScheduler.load_config(str(folder), local_files_only=True)
    name = str(config.get("_class_name"))
    known = {cls.__name__: cls for cls in SCHEDULERS}
    if name not in known:
        what = f"the scheduler {name} is none of {', '.join(sorted(known))}"
        raise user_error(str(folder / "scheduler_config.json"), what)
    with foreign.reading(folder, "the scheduler's config"):
        return known[name].from_config(config)


def ends_in_noise(scheduler: SchedulerMixin) -> bool:
    """Whether the sampler's config asks for zero signal at the last step."""
    return bool(scheduler.config.get("rescale_betas_zero_snr", False))


def alphas_cumprod(scheduler: SchedulerMixin) -> torch.Tensor:
    """The training schedule ᾱ that belongs to a sampler's config, float32, T values."""
    alphas_cumprod_T: torch.Tensor = DDPMScheduler.from_config(scheduler.config).alphas_cumprod
    return alphas_cumprod_T.float()


def settled(scheduler: Any, prediction: Prediction, *, zero_snr: bool) -> SchedulerMixin:
    """The sampler for a model that predicts so and was trained to zero terminal SNR, or not.

    For zero SNR the betas are rescaled (Lin et al. 2023, arXiv 2305.08891, algorithm 1) and steps
    begin at the last timestep, as the paper asks; a sampler that cannot do this becomes DDIM.
    One that is so already is given back as it is.
    """
    fits = isinstance(scheduler, TO_ZERO_SNR) or not zero_snr
    as_told = scheduler.config.prediction_type == prediction
    if fits and as_told and ends_in_noise(scheduler) == zero_snr:
        return scheduler
    changes: dict[str, Any] = {"prediction_type": prediction}
    if zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    elif ends_in_noise(scheduler):
        changes["rescale_betas_zero_snr"] = False
    if fits:
        return type(scheduler).from_config({**scheduler.config, **changes})
    return DDIMScheduler.from_config({**scheduler.config, **changes, "clip_sample": False})
