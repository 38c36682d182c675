"""Gradients and counts of a step added up over all processes, in one message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from lora_scripts.processes import Processes


class Sums:
    """Adds up what the processes have of each step.

    A sum of sums divided by the count over all is the mean over all samples, however unequally they
    are dealt out.
    """

    def __init__(self, processes: Processes, parameters: Sequence[nn.Parameter]) -> None:
        self._processes = processes
        self._parameters = parameters
        self._names: list[str] | None = None  # of the tallies, the same in all processes

    def over_processes(
        self, total: torch.Tensor, count: float, tallies: Counter[str]
    ) -> tuple[torch.Tensor, float]:
        """Replace gradients and tallies by their sums. Returns those of loss and count.

        A process that had nothing to do brings zeros; a parameter without a gradient in all of
        them keeps none.
        """
        if self._processes.size == 1:
            return total, count
        if self._names is None:
            own = self._processes.gathered(set(tallies))
            self._names = sorted(set.union(*own))
        has = [parameter.grad is not None for parameter in self._parameters]
        parts = [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self._parameters
        ]
        numbers = [count, *(float(tallies[name]) for name in self._names), *map(float, has)]
        sums = torch.cat([*parts, total.view(1), total.new_tensor(numbers)])
        self._processes.add_up(sums)
        sizes = [len(part) for part in parts]
        *gradients, rest = torch.split(sums, [*sizes, len(sums) - sum(sizes)])
        loss, (counted, *others) = rest[0], rest[1:].tolist()
        found = others[len(self._names) :]
        for parameter, gradient, somewhere in zip(self._parameters, gradients, found, strict=True):
            parameter.grad = gradient.view_as(parameter) if somewhere else None
        for name, value in zip(self._names, others, strict=False):
            tallies[name] = round(value)
        return loss, counted
