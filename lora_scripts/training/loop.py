"""The training loop. It knows a `Task`, never which one."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora_scripts.device import Compute
from lora_scripts.models import lora
from lora_scripts.processes import Processes
from lora_scripts.run_files import CHECKPOINTS
from lora_scripts.schema import Config
from lora_scripts.tasks.task import Key, Task
from lora_scripts.training import checkpoint, nonfinite, steps
from lora_scripts.training.checkpoint import Best, Position, State
from lora_scripts.training.clock import Clock
from lora_scripts.training.evaluate import held_out_loss
from lora_scripts.training.learner import Learner, Taken
from lora_scripts.training.log import NoLog, RunLog
from lora_scripts.training.steps import Step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    position: Position
    total_steps: int
    interrupted: bool
    best: Best | None
    exported: Position  # what the adapters on the model are: the last step, or the best
    skipped: int  # steps left out because their loss was no number
    clock: Clock


def train(
    task: Task,
    config: Config,
    compute: Compute,
    folder: Path,
    write_adapter: Callable[[Path, Position], list[Path]],
    start: tuple[Path, State] | None,
) -> Outcome:
    """Train `task` as `config` says, from the beginning or from a checkpoint.

    Args:
        folder: the run's folder; checkpoints, metrics, TensorBoard and samples go below it.
        write_adapter: writes the adapter as it is as a ready file into a folder.
        start: a checkpoint and its verified state.

    Raises:
        WorkError: if the loss or a gradient is not finite.
    """
    processes = compute.processes
    total_steps = steps.count(task, config, processes)
    learner = Learner(task, config, compute, total_steps, start)
    first_step = learner.position.step
    with (
        open_log(folder, first_step, total_steps, task, processes) as log,
        stop_signals() as stopped,
    ):
        between = _Between(learner, log, Clock(), folder, write_adapter)
        begins_afresh = config.init_lora is None  # with the base as it is
        if first_step == 0:
            between.look(sampling=not begins_afresh, measuring=True)
        done = learner.is_done()
        todo = (
            () if done else steps.remaining(task, config, learner.position, total_steps, processes)
        )
        for step, batches in steps.prefetched(task, todo, compute):
            switch(task, training=True)
            with between.clock.time("step"):
                taken = learner.take(step, batches, stopped.is_set)
                between.note(taken)
                learner.clear()
            number = learner.position.step
            if number == 1 and begins_afresh:
                between.look_back()
            last = number == total_steps
            measured = between.look(
                sampling=last or number % config.sample_steps == 0,
                measuring=last or number % config.eval_steps == 0,
            )
            if measured is not None and task.held_out:
                learner.best = checkpoint.judged(learner.best, number, measured)
            done = learner.is_done()
            planned = done or due(config, step)
            is_best = learner.best is not None and learner.best.step == number
            # several must stop after the same step: what one was told later is for the next
            stopping = taken.stopping if processes.size > 1 else stopped.is_set()
            if planned or is_best or stopping:
                between.save(passing=not planned)
            if done or stopping:
                break
    switch(task, training=False)
    interrupted = not learner.is_done()
    exported = learner.position
    if processes.is_first:
        exported = learner.settle(folder / CHECKPOINTS, interrupted=interrupted)
    return Outcome(
        learner.position,
        total_steps,
        interrupted,
        learner.best,
        exported,
        learner.tallies[nonfinite.SKIPPED],
        between.clock,
    )


@dataclass(frozen=True)
class _Between:
    """What is done between the steps: noting, measuring, drawing, saving."""

    learner: Learner
    log: RunLog | NoLog
    clock: Clock
    folder: Path
    write_adapter: Callable[[Path, Position], list[Path]]

    def note(self, taken: Taken) -> None:
        """A step that was taken, its gradients still there."""
        number = self.learner.position.step
        self.log.step(number, taken.numbers, self.learner.tallies, taken.norms)
        if taken.usable and number % self.learner.config.histogram_steps == 0:
            self.log.histograms(number, taken.gradients)

    def look(self, *, sampling: bool, measuring: bool) -> float | None:
        """Held-out loss and samples of what was learned so far. Returns the loss, if measured."""
        learner, loss = self.learner, None
        task, step = learner.task, learner.position.step
        switch(task, training=False)
        with learner.average.shown():
            if measuring:
                with self.clock.time("evaluation"):
                    loss = held_out_loss(task, learner.config.seed, learner.compute)
                self.log.evaluation(step, loss)
            if sampling:
                self._draw(step)
        return loss

    def look_back(self) -> None:
        """Samples of the base, as of step 0: drawn once a step has been taken.

        They take longer than a step, and what may fail or be mistaken shows itself in that.
        """
        task = self.learner.task
        switch(task, training=False)
        with lora.resting(task.adapted.values()):
            self._draw(0)

    def _draw(self, step: int) -> None:
        """Samples of the model as it is; the first process does that, or all where it is spread."""
        learner = self.learner
        if learner.compute.processes.is_first or learner.compute.sharded:
            with self.clock.time("samples"):
                key = Key(learner.config.seed, "validation", 0)
                self.log.samples(step, learner.task.sample(key))

    def save(self, *, passing: bool) -> None:
        """A checkpoint; only the first process writes one. `passing`: as `Learner.packed`."""
        learner = self.learner
        if not learner.compute.processes.is_first:
            return
        self.log.flush()
        state, tensors = learner.packed(passing=passing)
        with self.clock.time("checkpoint"), learner.average.shown():
            path = checkpoint.write(
                self.folder / CHECKPOINTS,
                state,
                tensors,
                lambda target: self.write_adapter(target, learner.position),
                learner.config.save_total_limit,
            )
        logger.info("step %d: checkpoint %s", learner.position.step, path)


def open_log(
    folder: Path, first_step: int, total_steps: int, task: Task, processes: Processes
) -> RunLog | NoLog:
    """The run's log; only the first process writes one."""
    if not processes.is_first:
        return NoLog()
    return RunLog(folder, first_step, total_steps, held_out=task.held_out)


def switch(task: Task, *, training: bool) -> None:
    """Dropout on or off."""
    for module in task.adapted.values():
        module.train(training)


def due(config: Config, step: Step) -> bool:
    """Whether a checkpoint belongs after this step."""
    if config.save_steps and step.after.step % config.save_steps == 0:
        return True
    every = config.save_every_epochs
    return bool(every and step.ends_epoch and step.after.epochs_done % every == 0)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event, so that the step ends and is saved; a second one kills."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: object) -> None:
        for kind, handler in before.items():  # first of all: a second may come while this is told
            ignored = handler is signal.SIG_IGN  # as a shell starts what is to run behind it
            signal.signal(kind, signal.default_int_handler if ignored else handler)
        stopped.set()
        logger.warning("Stopping after this step; press Ctrl-C again to stop at once.")

    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    for kind in before:
        signal.signal(kind, stop)
    try:
        yield stopped
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
