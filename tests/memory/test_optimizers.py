"""What optimizers keep, against the states of the real ones."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from lora_scripts.memory.optimizers import state_bytes
from lora_scripts.schema import SCHEMAS
from lora_scripts.training import optim

PACKAGES = {"adamw8bit": "bitsandbytes", "lion": "lion_pytorch", "prodigy": "prodigyopt"}
SHAPES = {
    "a.lora_A.default.weight": (16, 300),
    "a.lora_B.default.weight": (500, 16),  # above 4,096, so 8 bits where there are any
    "c.lora_A.default.weight": (8, 20, 3, 3),
    "c.lora_B.default.weight": (40, 8, 1, 1),
    "a.lora_magnitude_vector.default.weight": (500,),
}


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "lion", "prodigy"])
def test_states_are_foretold_to_the_byte(name: str) -> None:
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed")
    parameters = {
        key: nn.Parameter(torch.zeros(shape) if ".lora_B." in key else torch.ones(shape))
        for key, shape in SHAPES.items()
    }
    config = SCHEMAS["image-generation"].model_validate(
        {"base_model": "x", "train_data_dir": "y", "output_dir": "z", "optimizer": name},
        strict=False,
    )
    optimizer = optim.make({"unet": parameters}, {"unet": 1e-3}, config)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = {t.untyped_storage().data_ptr(): t for state in optimizer.state.values()
            for t in tensors_in(state) if not is_table(t)}  # fmt: skip
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) == sum(
        state_bytes(name, parameters)
    )


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in tensors_in(part)]
    return []


def is_table(tensor: torch.Tensor) -> bool:
    """bitsandbytes' map from 8 bits to numbers: two of 1 kB in all, whatever is trained."""
    return tensor.dtype == torch.float32 and tensor.shape == (256,)
