"""A moving average of the adapters, which is smoother than the last step's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

PREFIX = "average."  # of its tensors in a checkpoint


class Average:
    """The exponential moving average of parameters; without a decay it does nothing.

    After step n it is decayed by min(decay, (1 + n) / (10 + n)), so that the beginning is soon
    forgotten, as in TensorFlow's and diffusers' averages.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float | None) -> None:
        self.parameters = parameters
        self.decay = decay
        kept = parameters if decay is not None else {}
        self.values = {name: p.detach().clone() for name, p in kept.items()}

    def update(self, step: int) -> None:
        """Take in the parameters as they are after optimizer step `step`, counted from 1."""
        if self.decay is None:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [self.parameters[name].detach() for name in self.values]
        torch._foreach_lerp_(list(self.values.values()), current, 1 - decay)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within this context the parameters are the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def take(self) -> None:
        """Make the parameters the average for good."""
        for name, value in self.values.items():
            self.parameters[name].data.copy_(value)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        return {f"{PREFIX}{name}": value.cpu() for name, value in self.values.items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what a checkpoint kept."""
        for name, value in self.values.items():
            value.copy_(tensors[f"{PREFIX}{name}"])

    def _swap(self) -> None:
        for name, value in self.values.items():
            parameter = self.parameters[name]
            self.values[name] = parameter.data
            parameter.data = value
