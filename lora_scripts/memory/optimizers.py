"""What an optimizer keeps of the parameters that it moves."""

from __future__ import annotations

from collections.abc import Mapping

import torch

FLOAT = 4  # bytes
BLOCK = 256  # parameters whose 8-bit states share a scale (bitsandbytes 0.50)
SMALLEST_IN_8_BITS = 4096  # parameters of a tensor; smaller ones are kept in float32
UP = ".lora_B."  # in the names of matrices that are zero at the beginning


def state_bytes(optimizer: str, parameters: Mapping[str, torch.Tensor]) -> list[int]:
    """Bytes of what an optimizer keeps of each parameter after its first step.

    `parameters`: float32, by name.
    """
    return [
        _state_of(optimizer, parameter.shape, starts_at_zero=UP in name)
        for name, parameter in parameters.items()
    ]


def _state_of(optimizer: str, shape: torch.Size, *, starts_at_zero: bool) -> int:
    count = shape.numel()
    match optimizer:
        case "adamw":  # both moments, and the number of steps as a tensor
            return FLOAT * (2 * count + 1)
        case "adamw8bit" if count < SMALLEST_IN_8_BITS:
            return FLOAT * 2 * count
        case "adamw8bit":  # both moments at a byte each, with a scale a block
            return 2 * count + FLOAT * 2 * -(-count // BLOCK)
        case "adafactor" if len(shape) < 2:
            return FLOAT * (count + 1)
        case "adafactor":  # the second moment as rows and columns, and the root mean square
            return FLOAT * (shape[:-1].numel() + (shape[:-2] + shape[-1:]).numel() + 1)
        case "lion":
            return FLOAT * count
        case "prodigy":  # both moments, the sum of gradients, where the parameters began
            return FLOAT * (3 * count + (1 if starts_at_zero else count))
        case _:
            raise ValueError(f"optimizer {optimizer!r}")
