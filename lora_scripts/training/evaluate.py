"""The held-out loss: the same samples, timesteps and noise every time, so that it is comparable."""

from __future__ import annotations

import torch

from lora_scripts.device import Compute
from lora_scripts.tasks.task import Batch, Key, Task


def held_out_loss(task: Task, seed: int, compute: Compute) -> float:
    """Mean loss over the validation plan, without gradients. Dropout must be off already.

    Each process measures its share; all get the mean over all.
    """
    key = Key(seed, "validation", 0)
    total, count = 0.0, 0.0
    with torch.no_grad():
        for indices, counts in compute.share(task.plan(key)):
            batch = to_device(task.load(indices, key), compute.device)
            with compute.autocast():
                loss = task.loss(batch, key)
            if counts:
                total += loss.total.item()
                count += loss.count
    sums = torch.tensor([total, count], dtype=torch.float64)
    compute.processes.add_up(sums)
    return float(sums[0] / sums[1])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
