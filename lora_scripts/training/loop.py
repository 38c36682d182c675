"""The training loop. It knows a `Task`, never which one."""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lora_scripts.device import Compute
from lora_scripts.models import lora
from lora_scripts.randomness import seed_of
from lora_scripts.run_files import CHECKPOINTS
from lora_scripts.schema import Config
from lora_scripts.tasks.task import Key, Task
from lora_scripts.training import checkpoint, nonfinite, optim, steps
from lora_scripts.training.averaging import PREFIX, Average
from lora_scripts.training.checkpoint import Best, Position, State
from lora_scripts.training.evaluate import held_out_loss, to_device
from lora_scripts.training.log import RunLog
from lora_scripts.training.steps import Step

logger = logging.getLogger(__name__)

TOTAL_SCALE = 2.0**-7  # keeps an fp16 backward of a sum over many items from overflowing
BLOCK = re.compile(r".*?\.\d+(?=\.)")  # a path up to its first number


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    position: Position
    total_steps: int
    interrupted: bool
    best: Best | None
    exported: Position  # what the adapters on the model are: the last step, or the best
    skipped: int  # steps left out because their loss was no number


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
    by_component = {name: lora.trainable(module) for name, module in task.adapted.items()}
    parameters = trained_parameters(task)
    optimizer = optim.make(by_component, task.learning_rates, config)
    peaks = [task.learning_rates[component] for component in by_component]
    average = Average(parameters, config.ema_decay)
    scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")
    position = Position()
    if start is not None:
        average.load(checkpoint.unpack(*start, parameters, optimizer))
        scaler.load_state_dict(dict(start[1].scaler))
        position = start[1].position
    best = start[1].best if start else None
    tallies = Counter(start[1].tallies if start else {})
    total_steps = steps.count(task, config)

    def save(position: Position, *, passing: bool) -> None:
        log.flush()
        tensors, numbers = checkpoint.pack(parameters, optimizer)
        tensors |= average.tensors()
        state = State(
            position=position,
            best=best,
            tallies=dict(tallies),
            passing=passing,
            total_steps=total_steps,
            precision=compute.precision,
            scaler=scaler.state_dict(),
            optimizer=numbers,
            config=config.model_dump(mode="json"),
            fingerprint=task.fingerprint,
        )
        with average.shown():
            path = checkpoint.write(
                folder / CHECKPOINTS,
                state,
                tensors,
                lambda target: write_adapter(target, position),
                config.save_total_limit,
            )
        logger.info("step %d: checkpoint %s", position.step, path)

    def look(step: int, *, sampling: bool, measuring: bool) -> float | None:
        switch(task, training=False)
        with average.shown():
            loss = held_out_loss(task, config.seed, compute) if measuring else None
            if loss is not None:
                log.evaluation(step, loss)
            if sampling:
                log.samples(step, task.sample(Key(config.seed, "validation", 0)))
        return loss

    with RunLog(folder, position.step, total_steps) as log, stop_signals() as stopped:
        if position.step == 0:
            look(0, sampling=True, measuring=True)
        ended = exhausted(best, config)
        todo = () if ended else steps.remaining(task, config, position, total_steps)
        for step, batches in steps.prefetched(task, todo):
            # ---------------------------------------------------------------- the training step
            switch(task, training=True)
            optim.set_rates(optimizer, peaks, config, step.after.step - 1, total_steps)
            total = torch.zeros((), device=compute.device)
            count, seen = 0.0, position.samples
            for indices, batch in zip(step.micro_batches, batches, strict=True):
                with seeded_dropout(config, seen, compute), compute.autocast():
                    loss = task.loss(to_device(batch, compute.device), step.key)
                torch.autograd.backward(scaler.scale(loss.total * TOTAL_SCALE))
                total += loss.total.detach()
                count += loss.count
                tallies.update(loss.tallies)
                seen += len(indices)
            scaler.unscale_(optimizer)
            gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            torch._foreach_mul_(list(gradients.values()), 1.0 / (count * TOTAL_SCALE))
            norm, norms = get_total_norm(gradients.values()), group_norms(gradients)
            found = float(total) / count, float(norm)
            usable = nonfinite.is_usable(*found, scaler)
            if usable:
                if config.max_grad_norm:
                    clip_grads_with_norm_(parameters.values(), config.max_grad_norm, norm)
                scaler.step(optimizer)
            elif nonfinite.skip(step, found, task, config, tallies[nonfinite.SKIPPED]):
                tallies[nonfinite.SKIPPED] += 1
            else:
                raise nonfinite.refuse(step, found, task, parameters, compute)
            scaler.update()
            average.update(step.after.step)
            # ------------------------------------------------------------- noted, looked at, saved
            position = step.after
            numbers = {
                "epoch": step.key.epoch + 1,
                "loss": found[0],
                **optim.noted_rates(optimizer, list(by_component)),
                "grad_norm": found[1],
                "samples": position.samples,
            }
            log.step(position.step, numbers, tallies, norms)
            if usable and position.step % config.histogram_steps == 0:
                log.histograms(position.step, gradients)
            optimizer.zero_grad(set_to_none=True)
            last = position.step == total_steps
            measured = look(
                position.step,
                sampling=last or position.step % config.sample_steps == 0,
                measuring=last or position.step % config.eval_steps == 0,
            )
            if measured is not None and task.held_out:
                best = checkpoint.judged(best, position.step, measured)
            last = last or exhausted(best, config)
            planned = last or stopped.is_set() or due(config, step)
            if planned or (best and best.step == position.step):
                save(position, passing=not planned)
            if last or stopped.is_set():
                break
    switch(task, training=False)
    exported, interrupted = position, position.step < total_steps and not exhausted(best, config)
    average.take()
    if config.early_stopping_patience and best and not interrupted:
        kept = PREFIX if config.ema_decay else checkpoint.ADAPTER
        exported = checkpoint.go_back(folder / CHECKPOINTS, best, parameters, kept)
    skipped = tallies[nonfinite.SKIPPED]
    return Outcome(position, total_steps, interrupted, best, exported, skipped)


def trained_parameters(task: Task) -> dict[str, nn.Parameter]:
    """The adapters' parameters by component and path, in the order that a checkpoint keeps."""
    return {
        f"{component}.{name}": parameter
        for component, module in task.adapted.items()
        for name, parameter in lora.trainable(module).items()
    }


def switch(task: Task, *, training: bool) -> None:
    """Dropout on or off."""
    for module in task.adapted.values():
        module.train(training)


def exhausted(best: Best | None, config: Config) -> bool:
    """Whether the held-out loss has not fallen for as long as the config waits."""
    patience = config.early_stopping_patience
    return bool(patience and best and best.waited >= patience)


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


def group_norms(gradients: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Gradient norms by block of the model, e.g. `unet.down_blocks.0`, `model.model.layers.7`."""
    groups: dict[str, list[torch.Tensor]] = {}
    for name, gradient in gradients.items():
        block = BLOCK.match(name)
        groups.setdefault(block[0] if block else name, []).append(gradient)
    norms = torch.stack([get_total_norm(group) for group in groups.values()]).tolist()
    return dict(zip(groups, norms, strict=True))


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
        logger.warning("Stopping after this step; press Ctrl-C again to stop at once.")
        stopped.set()
        for kind, handler in before.items():
            signal.signal(kind, handler)

    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    for kind in before:
        signal.signal(kind, stop)
    try:
        yield stopped
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
