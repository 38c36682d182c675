"""How long a step of the text demo takes, with and without two of the ways it is made fast.

    make demo-text
    python benchmarks/text_step.py

Forward, loss and backward over the first micro-batches of `configs/demo_text.yaml`, on the same
batches each time, the ways by turns, so that a busy machine slows all alike. Prints real tokens a
second and the ratio to the first row.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from lora_scripts.config import read
from lora_scripts.device import Compute, choose
from lora_scripts.logs import quiet_libraries
from lora_scripts.models import packing
from lora_scripts.preflight import inputs
from lora_scripts.tasks import build
from lora_scripts.tasks.language import LanguageTask
from lora_scripts.tasks.task import Key
from lora_scripts.training.evaluate import to_device

CONFIG = Path("configs/demo_text.yaml")
BATCHES, ROUNDS = 6, 3
# name -> (rows packed, up to which length attention is written out)
WAYS = {
    "padded batches of like length, fused attention": (False, 0),
    "packed, one fused call a row": (True, 0),
    "packed, rows up to 256 tokens written out": (True, 256),
}


def main() -> None:
    quiet_libraries()
    compute = choose("auto", "auto")
    tasks = {packed: load(packed, compute) for packed in (False, True)}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    tokens: dict[str, int] = {}
    for _ in range(ROUNDS + 1):
        for name, (packed, length) in WAYS.items():
            packing.PLAIN_LENGTH = length
            tokens[name], took = measure(tasks[packed], compute)
            seconds[name].append(took)
    rates = {name: tokens[name] / statistics.median(seconds[name][1:]) for name in WAYS}
    first = next(iter(rates.values()))
    print(f"{compute.device.type}, {compute.precision}, {BATCHES} micro-batches, {ROUNDS} rounds\n")
    print("| way | tokens/s | ratio |\n|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} | {rate / first:.2f} |")


def load(packed: bool, compute: Compute) -> LanguageTask:
    """The demo's task, its LoRA attached."""
    draft = read(CONFIG, [f"packing={str(packed).lower()}"])
    task = build.build(draft.checked(), inputs(draft)[0], compute)
    assert isinstance(task, LanguageTask)
    task.encode(lambda what, done, total: None)
    task.attach()
    task.base.model.train()
    return task


def measure(task: LanguageTask, compute: Compute) -> tuple[int, float]:
    """Tokens and seconds of a pass over the first micro-batches."""
    key = Key(0, "train", 0)
    tokens, started = 0, time.perf_counter()
    for indices in task.plan(key)[:BATCHES]:
        batch = to_device(task.load(indices, key), compute.device)
        with compute.autocast():
            loss = task.loss(batch, key)
        (loss.total / loss.count).backward()
        tokens += loss.tallies["tokens"]
    return tokens, time.perf_counter() - started


if __name__ == "__main__":
    main()
