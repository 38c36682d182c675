"""One real micro-step before the first: what it takes corrects the estimate."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from lora_scripts import allocator
from lora_scripts.device import Compute
from lora_scripts.memory import heaviest, room
from lora_scripts.memory.estimate import PASSING, STEP, Estimate, Phase
from lora_scripts.memory.optimizers import FLOAT, state_bytes
from lora_scripts.schema import Config, TextConfig
from lora_scripts.tasks.diffusion import DiffusionTask
from lora_scripts.tasks.language import LanguageTask
from lora_scripts.tasks.task import Indices, Key, Task
from lora_scripts.training.evaluate import to_device
from lora_scripts.training.learner import TOTAL_SCALE, seeded_dropout, trained_parameters


@dataclass(frozen=True)
class Peak:
    """What micro-steps reached, and what lay in memory before them.

    Attributes:
        gpu: Bytes reserved on the card at most; 0 on a CPU.
        ram: The largest resident set; where the system cannot forget an earlier one, since the
            process began.
        ram_before: The resident set before.
        seconds: How long one of them took.
    """

    gpu: int
    ram: int
    ram_before: int
    seconds: float


def micro_step(task: Task, config: Config, compute: Compute) -> Peak:
    """Forward and backward of the heaviest micro-batch, without a trace in what is trained.

    Twice, as in two steps of the run: in the second one memory is taken for what the optimizer
    keeps. The heap has more gaps then, and code that runs for the first time is not timed. With
    accumulation each of the two has a second micro-batch, which finds the gradients of the first.
    Gradients are dropped, the global generator and the modules are as they were.

    Args:
        task: Encoded and attached.

    Raises:
        torch.OutOfMemoryError: as it comes.
    """
    indices, key = _heaviest(task, config)
    on_card = compute.device.type == "cuda"
    modes = [(m, m.training) for whole in task.adapted.values() for m in whole.modules()]
    allocator.give_back()
    before = room.resident()
    room.forget_peak()
    if on_card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(compute.device)
    try:
        with torch.random.fork_rng(devices=[compute.device] if on_card else []):
            seconds = _steps(task, config, compute, indices, key)
        gpu = torch.cuda.max_memory_reserved(compute.device) if on_card else 0
        return Peak(gpu, room.peak_resident(), before, seconds)
    finally:
        _drop_gradients(task)
        for module, mode in modes:
            module.training = mode
        allocator.give_back()


def corrected(estimate: Estimate, peak: Peak) -> Estimate:
    """The estimate with the training step as it was measured.

    The other phases in RAM move by as much as what lay there before the step was misjudged.
    """
    (step,) = (phase for phase in estimate.phases if phase.name == STEP)
    ram = {"before the step": peak.ram_before, "the step": peak.ram - peak.ram_before}
    if peak.gpu:
        before = _before(step.gpu, estimate)
        gpu = {"before the step": before, "the step": peak.gpu - before}
        moved = peak.ram_before - step.total("ram")
    else:
        gpu = {}
        moved = peak.ram_before - _before(step.ram, estimate)
    phases = [
        Phase(STEP, gpu, ram)
        if phase is step
        else Phase(phase.name, phase.gpu, {**phase.ram, "misjudged": moved})
        for phase in estimate.phases
    ]
    return replace(estimate, phases=phases, measured=True)


def _steps(task: Task, config: Config, compute: Compute, indices: Indices, key: Key) -> float:
    """Two steps. Returns the seconds of the last micro-batch."""
    kept: list[torch.Tensor] = []
    for _ in range(2):
        for _ in range(min(config.gradient_accumulation_steps, 2)):
            started = time.perf_counter()
            _forward_and_backward(task, config, compute, indices, key)
            seconds = time.perf_counter() - started
        if not kept:
            kept = [
                torch.zeros(size, dtype=torch.uint8, device=compute.device)
                for size in _lasting(task, config)
            ]
        _drop_gradients(task)
    return seconds


def _lasting(task: Task, config: Config) -> list[int]:
    """Bytes of each tensor that is there from the first step on: optimizer, moving average."""
    parameters = trained_parameters(task)
    average = [FLOAT * p.numel() for p in parameters.values()] if config.ema_decay else []
    return [*state_bytes(config.optimizer, parameters), *average]


def _drop_gradients(task: Task) -> None:
    for parameter in trained_parameters(task).values():
        parameter.grad = None


def _before(parts: Mapping[str, int], estimate: Estimate) -> int:
    """What lies in memory before the first micro-step, by the estimate of a step."""
    return sum(size for name, size in parts.items() if name not in (*PASSING, *estimate.later))


def _heaviest(task: Task, config: Config) -> tuple[Indices, Key]:
    """The micro-batch that takes most, and its place in the run."""
    match task:
        case DiffusionTask():
            # weights below 1 may leave an epoch empty
            epochs = (Key(config.seed, "train", epoch) for epoch in range(config.epochs))
            key, batches = next((key, batches) for key in epochs if (batches := task.plan(key)))
            return heaviest.most_pixels(task.train_set, batches), key
        case LanguageTask():
            assert isinstance(config, TextConfig)
            return _heaviest_rows(task, config)
        case _:
            raise TypeError(type(task))


def _heaviest_rows(task: LanguageTask, config: TextConfig) -> tuple[Indices, Key]:
    keys = [Key(config.seed, "train", epoch) for epoch in heaviest.epochs(config)]
    planned = (batch for key in keys for batch in task.plan(key))
    model = task.base.model
    indices = heaviest.most_tokens(task.data, planned, model, packed=task.packed)
    return indices, next(key for key in reversed(keys) if indices in task.plan(key))


def _forward_and_backward(
    task: Task, config: Config, compute: Compute, indices: Indices, key: Key
) -> None:
    for module in task.adapted.values():
        module.train()
    batch = to_device(task.load(indices, key), compute.device)
    with seeded_dropout(config, 0, compute), compute.autocast():
        loss = task.loss(batch, key)
    torch.autograd.backward(loss.total * TOTAL_SCALE)
    if compute.device.type == "cuda":
        torch.cuda.synchronize(compute.device)
