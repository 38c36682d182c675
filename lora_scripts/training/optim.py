"""Optimizers and learning-rate schedules: two plain dicts."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_scripts.schema import Config

Groups = Sequence[dict[str, Any]]  # {"params": parameters of one component, "lr": their peak rate}


def _adamw(groups: Groups, config: Config) -> torch.optim.Optimizer:
    """Decoupled weight decay (Loshchilov & Hutter 2017, arXiv 1711.05101)."""
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)


def _adamw8bit(groups: Groups, config: Config) -> torch.optim.Optimizer:
    """AdamW with its state in 8 bits, in blocks (Dettmers et al. 2021, arXiv 2110.02861)."""
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, weight_decay=config.weight_decay)
    return optimizer


def _adafactor(groups: Groups, config: Config) -> torch.optim.Optimizer:
    """Second moments as rows and columns (Shazeer & Stern 2018, arXiv 1804.04235).

    The rate is the schedule's, not relative to the step or to the size of the weights, which for
    `up` is zero at the beginning.
    """
    from transformers.optimization import Adafactor

    optimizer: torch.optim.Optimizer = Adafactor(
        groups,
        weight_decay=config.weight_decay,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )
    return optimizer


def _lion(groups: Groups, config: Config) -> torch.optim.Optimizer:
    """Signs of the momentum (Chen et al. 2023, arXiv 2302.06675); wants a tenth of Adam's rate."""
    from lion_pytorch import Lion

    optimizer: torch.optim.Optimizer = Lion(groups, weight_decay=config.weight_decay)
    return optimizer


def _prodigy(groups: Groups, config: Config) -> torch.optim.Optimizer:
    """Finds the rate itself (Mishchenko & Defazio 2023, arXiv 2306.06101); learning_rate scales it.

    With bias correction, as its authors advise for diffusion models, and with the guard of the
    estimate where there is a warm-up.
    """
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it decays weights
        optimizer: torch.optim.Optimizer = Prodigy(
            groups,
            weight_decay=config.weight_decay,
            decouple=True,
            use_bias_correction=True,
            safeguard_warmup=config.lr_warmup_steps != 0,
        )
    return optimizer


WARMUP_SHARE, MINIMAL_WARMUP = 0.04, 5  # where lr_warmup_steps is null

OPTIMIZERS: dict[str, Callable[[Groups, Config], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "lion": _lion,
    "prodigy": _prodigy,
}

# share of the way after the warm-up (0 to 1), cycles -> share of the peak learning rate
SCHEDULES: dict[str, Callable[[float, int], float]] = {
    "constant": lambda way, cycles: 1.0,
    "linear": lambda way, cycles: 1.0 - way,
    "cosine": lambda way, cycles: 0.5 * (1.0 + math.cos(math.pi * way)),
    "cosine_with_restarts": lambda way, cycles: (
        0.5 * (1.0 + math.cos(math.pi * (way * cycles % 1.0)))
    ),
}


def make(
    parameters: Mapping[str, Mapping[str, nn.Parameter]],
    rates: Mapping[str, float],
    config: Config,
) -> torch.optim.Optimizer:
    """The optimizer of a run: one group of parameters a component, each with its peak rate."""
    groups = [
        {"params": list(own.values()), "lr": rates[component]}
        for component, own in parameters.items()
    ]
    return OPTIMIZERS[config.optimizer](groups, config)


def warmup_steps(config: Config, total_steps: int) -> int:
    """Steps of warm-up: as configured, or a share of the run, but long enough to be one."""
    if config.lr_warmup_steps is None:
        return max(MINIMAL_WARMUP, round(WARMUP_SHARE * total_steps))
    return config.lr_warmup_steps


def learning_rate(peak: float, config: Config, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total_steps`.

    Warm-up rises linearly and reaches the peak after `warmup_steps`; the schedule then
    falls over the remaining steps, and the last step is still above zero.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    way = (step - warmup) / max(1, total_steps - warmup)
    return peak * SCHEDULES[config.lr_scheduler](way, config.lr_num_cycles)


def set_rates(
    optimizer: torch.optim.Optimizer, peaks: Sequence[float], config: Config, step: int, total: int
) -> None:
    """Give each group its learning rate of optimizer step `step` (from 0) of `total`."""
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = learning_rate(peak, config, step, total)


def noted_rates(optimizer: torch.optim.Optimizer, components: Sequence[str]) -> dict[str, float]:
    """What the metrics say of the rates: the first component's, the others', and Prodigy's own."""
    first, *others = optimizer.param_groups
    noted = {"learning_rate": float(first["lr"])}
    for component, group in zip(components[1:], others, strict=True):
        noted[f"learning_rate/{component}"] = float(group["lr"])
    if "d" in first:
        noted["learning_rate_found"] = float(first["d"] * first["lr"])
    return noted
