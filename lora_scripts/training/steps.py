"""Optimizer steps: which micro-batches each takes, how many there are, their batches read ahead."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate

from lora_scripts import threads
from lora_scripts.device import Compute
from lora_scripts.processes import Processes
from lora_scripts.schema import Config
from lora_scripts.tasks.task import Batch, Indices, Key, Task
from lora_scripts.training.checkpoint import Position

PREFETCHED_BATCHES = 4


@dataclass(frozen=True)
class Part:
    """A micro-batch as a process takes it.

    Attributes:
        seen: How many samples the run has seen before it.
        counts: Whether it is learned from; else it is only gone through, beside another process.
    """

    seen: int
    indices: Indices
    counts: bool


@dataclass(frozen=True)
class Step:
    """One optimizer step: its micro-batches and where the run stands after it."""

    key: Key
    micro_batches: Sequence[Indices]
    after: Position
    ends_epoch: bool

    def share(self, compute: Compute) -> list[Part]:
        """A process's micro-batches."""
        first = self.after.samples - sum(map(len, self.micro_batches))
        seen = accumulate(map(len, self.micro_batches), initial=first)
        parts = list(zip(seen, self.micro_batches, strict=False))
        return [Part(*part, counts) for part, counts in compute.share(parts)]


def at_once(config: Config, processes: Processes) -> int:
    """Micro-batches of an optimizer step, over all processes."""
    return config.gradient_accumulation_steps * processes.size


def count(task: Task, config: Config, processes: Processes) -> int:
    """Optimizer steps of the whole run: the epochs, or the cap `max_train_steps`."""
    size = at_once(config, processes)
    total = sum(
        math.ceil(len(task.plan(Key(config.seed, "train", epoch))) / size)
        for epoch in range(config.epochs)  # the last step of one may hold fewer micro-batches
    )
    return min(total, config.max_train_steps or total)


def remaining(
    task: Task, config: Config, start: Position, total_steps: int, processes: Processes
) -> Iterator[Step]:
    """The optimizer steps from `start` on: each takes the next micro-batches of the plan."""
    position, size = start, at_once(config, processes)
    for epoch in range(start.epochs_done, config.epochs):
        key = Key(config.seed, "train", epoch)
        plan = task.plan(key)
        if not plan and position.epochs_done == epoch:  # weights below 1 may leave an epoch empty
            position = replace(position, epochs_done=epoch + 1)
        while position.epochs_done == epoch and position.step < total_steps:
            first = position.batches_done
            micro_batches = plan[first : first + size]
            ends_epoch = first + len(micro_batches) == len(plan)
            position = Position(
                step=position.step + 1,
                epochs_done=epoch + 1 if ends_epoch else epoch,
                batches_done=0 if ends_epoch else first + len(micro_batches),
                samples=position.samples + sum(len(indices) for indices in micro_batches),
            )
            yield Step(key, micro_batches, position, ends_epoch)


def prefetched(
    task: Task, steps: Iterable[Step], compute: Compute
) -> Iterator[tuple[Step, Iterator[Batch]]]:
    """Each step with this process's batches, read in a thread a few ahead of their use."""
    with ThreadPoolExecutor(max_workers=1, initializer=threads.compute_alone) as pool:
        waiting: deque[tuple[Step, list[Future[Batch]]]] = deque()
        for step in steps:
            own = step.share(compute)
            futures = [pool.submit(task.load, part.indices, step.key) for part in own]
            waiting.append((step, futures))
            while sum(len(futures) for _, futures in waiting) > PREFETCHED_BATCHES:
                yield _results(waiting.popleft())
        while waiting:
            yield _results(waiting.popleft())


def _results(entry: tuple[Step, list[Future[Batch]]]) -> tuple[Step, Iterator[Batch]]:
    step, futures = entry
    return step, (future.result() for future in futures)
