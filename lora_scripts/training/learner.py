"""What a training step changes: adapters, optimizer, scaler, average; and how one step is taken."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_

from lora_scripts.device import Compute
from lora_scripts.models import lora
from lora_scripts.randomness import seed_of
from lora_scripts.schema import Config
from lora_scripts.tasks.task import Batch, Task
from lora_scripts.training import contents, nonfinite, optim
from lora_scripts.training.averaging import PREFIX, Average
from lora_scripts.training.checkpoint import Best, Position, State
from lora_scripts.training.evaluate import to_device
from lora_scripts.training.steps import Step
from lora_scripts.training.sums import Sums

BLOCK = re.compile(r".*?\.\d+(?=\.)")  # a path up to its first number
STOPPING = "stopping"  # beside a step's tallies: how many processes were told to stop
TOTAL_SCALE = 2.0**-7  # keeps an fp16 backward of a sum over many items from overflowing


@dataclass(frozen=True)
class Taken:
    """One optimizer step that was taken.

    Attributes:
        numbers: What is noted of it: loss, rates, gradient norm.
        norms: Of the gradients, by block of the model, before clipping.
        gradients: By parameter; of a step that was left out as they came.
        usable: Whether they were used: finite, and not left out.
        stopping: Whether any process had been told to stop when they were added up.
    """

    numbers: Mapping[str, float]
    norms: Mapping[str, float]
    gradients: Mapping[str, torch.Tensor]
    usable: bool
    stopping: bool


class Learner:
    """The state of a run at a position, and the steps that move it on.

    Attributes:
        position: Where the run stands.
        best: The lowest held-out loss so far.
        tallies: What is counted over the run: tokens, steps left out.
    """

    def __init__(
        self,
        task: Task,
        config: Config,
        compute: Compute,
        total_steps: int,
        start: tuple[Path, State] | None,
    ) -> None:
        self.task = task
        self.config = config
        self.compute = compute
        self.total_steps = total_steps
        by_component = {name: lora.trainable(module) for name, module in task.adapted.items()}
        self.components = list(by_component)
        self.parameters = trained_parameters(task)
        self.optimizer = optim.make(by_component, task.learning_rates, config)
        self.peaks = [task.learning_rates[component] for component in by_component]
        self.average = Average(self.parameters, config.ema_decay)
        fp16 = compute.precision == "fp16"
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=fp16)
        self.sums = Sums(compute.processes, list(self.parameters.values()))
        self.position = Position()
        self.best: Best | None = None
        self.tallies: Counter[str] = Counter()
        if start is not None:
            path, state = start
            # the folder need not be there but for the first process
            here = compute.processes.is_first
            tensors = compute.processes.told_by_first(contents.read_tensors(path) if here else {})
            contents.unpack(path, tensors, state, self.parameters, self.optimizer)
            self.average.load(tensors)
            self.scaler.load_state_dict(dict(state.scaler))
            self.position, self.best = state.position, state.best
            self.tallies.update(state.tallies)

    def take(self, step: Step, batches: Iterator[Batch], told_to_stop: Callable[[], bool]) -> Taken:
        """Take one optimizer step; `clear` its gradients afterwards.

        `told_to_stop`: whether this process was; all learn of it with the gradients, as a message
        of its own would take longer than they among hundreds of processes.

        Raises:
            WorkError: if the loss or a gradient is not finite and may not be left out.
        """
        optim.set_rates(
            self.optimizer, self.peaks, self.config, step.after.step - 1, self.total_steps
        )
        total, count, stopping = self._backward(step, batches, told_to_stop)
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norm, norms = gradient_norms(gradients)
        # one wait for the device in a step: nothing may reach the optimizer unjudged
        summed, norm_found, *norms_found = torch.stack([total, norm, *norms.values()]).tolist()
        found = summed / count, norm_found
        usable = nonfinite.is_usable(*found, self.scaler)
        if usable:
            if self.config.max_grad_norm:
                clip_grads_with_norm_(self.parameters.values(), self.config.max_grad_norm, norm)
            self.scaler.step(self.optimizer)
        elif nonfinite.skip(step, found, self.task, self.config, self.tallies[nonfinite.SKIPPED]):
            self.tallies[nonfinite.SKIPPED] += 1
        else:
            raise nonfinite.refuse(step, found, self.task, self.parameters, self.compute)
        self.scaler.update()
        self.average.update(step.after.step)
        self.position = step.after
        numbers = {
            "epoch": step.key.epoch + 1,
            "loss": found[0],
            **optim.noted_rates(self.optimizer, self.components),
            "grad_norm": norm_found,
            "samples": self.position.samples,
        }
        by_group = dict(zip(norms, norms_found, strict=True))
        finite = usable and math.isfinite(norm_found)
        return Taken(numbers, by_group, gradients, finite, stopping)

    def clear(self) -> None:
        """Let the gradients go."""
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(
        self, step: Step, batches: Iterator[Batch], told_to_stop: Callable[[], bool]
    ) -> tuple[torch.Tensor, float, bool]:
        """Gradients of all micro-batches, added up and divided by the global count.

        Returns the sum of losses, the count, and whether any process was told to stop.
        """
        total = torch.zeros((), device=self.compute.device)
        count, tallies = 0.0, Counter[str]()
        own = step.share(self.compute)
        if self.compute.sharded:  # within a step all wait for each other: none may still be saving
            self.compute.processes.wait()
        with self.compute.processes.part_of_step():
            for part, batch in zip(own, batches, strict=True):
                with seeded_dropout(self.config, part.seen, self.compute), self.compute.autocast():
                    loss = self.task.loss(to_device(batch, self.compute.device), step.key)
                scale = TOTAL_SCALE * part.counts
                torch.autograd.backward(self.scaler.scale(loss.total * scale))
                if not part.counts:
                    continue
                total += loss.total.detach()
                count += loss.count
                tallies.update(loss.tallies)
        tallies[STOPPING] = told_to_stop()
        total, count = self.sums.over_processes(total, count, tallies)
        stopping = bool(tallies.pop(STOPPING))
        self.tallies.update(tallies)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        torch._foreach_mul_(gradients, 1.0 / (count * TOTAL_SCALE))
        return total, count, stopping

    def packed(self, *, passing: bool) -> tuple[State, dict[str, torch.Tensor]]:
        """What a checkpoint keeps. `passing`: it was not due, but is the best or made at a stop."""
        tensors, numbers = contents.pack(self.parameters, self.optimizer)
        state = State(
            position=self.position,
            best=self.best,
            tallies=dict(self.tallies),
            passing=passing,
            processes=self.compute.processes.size,
            total_steps=self.total_steps,
            precision=self.compute.precision,
            scaler=self.scaler.state_dict(),
            optimizer=numbers,
            config=self.config.model_dump(mode="json"),
            fingerprint=self.task.fingerprint,
        )
        return state, tensors | self.average.tensors()

    def is_done(self) -> bool:
        """Whether all steps are taken, or the held-out loss has not fallen for long enough."""
        patience = self.config.early_stopping_patience
        exhausted = bool(patience and self.best and self.best.waited >= patience)
        return exhausted or self.position.step >= self.total_steps

    def settle(self, folder: Path, *, interrupted: bool) -> Position:
        """Make the adapters what is exported: the average, or with early stopping the best.

        `folder`: of the checkpoints. Returns where the run stood there.
        """
        self.average.take()
        if not self.config.early_stopping_patience or self.best is None or interrupted:
            return self.position
        kept = PREFIX if self.config.ema_decay else contents.ADAPTER
        return contents.go_back(folder, self.best, self.parameters, kept)


def trained_parameters(task: Task) -> dict[str, nn.Parameter]:
    """The adapters' parameters by component and path, in the order that a checkpoint keeps."""
    return {
        f"{component}.{name}": parameter
        for component, module in task.adapted.items()
        for name, parameter in lora.trainable(module).items()
    }


def gradient_norms(
    gradients: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The norm of all gradients together, and by block of the model, still on the device.

    Blocks are named as `unet.down_blocks.0`, `model.model.layers.7`.
    """
    groups: dict[str, list[torch.Tensor]] = {}
    each = torch._foreach_norm(list(gradients.values()))
    for name, norm in zip(gradients, each, strict=True):
        block = BLOCK.match(name)
        groups.setdefault(block[0] if block else name, []).append(norm)
    of_groups = {name: _of_norms(norms) for name, norms in groups.items()}
    return _of_norms(each), of_groups


def _of_norms(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of what has these norms."""
    found: torch.Tensor = torch.linalg.vector_norm(torch.stack(tuple(norms)))
    return found


def seeded_dropout(
    config: Config, samples_seen: int, compute: Compute
) -> AbstractContextManager[None]:
    """LoRA dropout reads the global generator: seed it by the samples seen, and leave no trace."""
    if not config.lora_dropout:
        return nullcontext()
    return _global_seed(seed_of(config.seed, "dropout", samples_seen), compute)


@contextmanager
def _global_seed(seed: int, compute: Compute) -> Iterator[None]:
    devices = [compute.device] if compute.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
