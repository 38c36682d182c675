"""Optimizers and learning-rate schedules: two plain dicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from lora_scripts.schema import Config


def _adamw(parameters: Iterable[nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """Decoupled weight decay (Loshchilov & Hutter 2017, arXiv 1711.05101)."""
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )


WARMUP_SHARE, MINIMAL_WARMUP = 0.04, 5  # where lr_warmup_steps is null

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], Config], torch.optim.Optimizer]] = {
    "adamw": _adamw,
}

# share of the way after the warm-up (0 to 1) -> share of the peak learning rate
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda way: 1.0,
    "linear": lambda way: 1.0 - way,
    "cosine": lambda way: 0.5 * (1.0 + math.cos(math.pi * way)),
}


def warmup_steps(config: Config, total_steps: int) -> int:
    """Steps of warm-up: as configured, or a share of the run, but long enough to be one."""
    if config.lr_warmup_steps is None:
        return max(MINIMAL_WARMUP, round(WARMUP_SHARE * total_steps))
    return config.lr_warmup_steps


def learning_rate(config: Config, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total_steps`.

    Warm-up rises linearly and reaches the peak after `warmup_steps`; the schedule then
    falls over the remaining steps, and the last step is still above zero.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    way = (step - warmup) / max(1, total_steps - warmup)
    return config.learning_rate * SCHEDULES[config.lr_scheduler](way)
