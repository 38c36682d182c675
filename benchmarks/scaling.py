"""What the sum over all processes costs: foretold for many cards, and measured between CPUs.

    python -m benchmarks.scaling foretold
    python -m benchmarks.scaling measured [--processes 1 2 4]

Each process does the same work, and the gradients of the adapters (float32) are added up once a
step, after the backward pass. A ring of N sends 2 (N - 1) / N of the bytes past each process in
2 (N - 1) rounds; a tree sends twice the bytes in 2 log2 N rounds; the better one counts. Cards of a
node add up among themselves first, then one message a node goes between nodes. Efficiency is a step
alone over a step of N. Adapters have the real shapes; steps are published figures of other
programs; links are assumptions. `measured` tries the formula on gloo processes of one thread each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_scripts.belonging import outputs_and_inputs
from lora_scripts.models import causal_lm, skeleton, unet
from lora_scripts.models.kinds import Family
from lora_scripts.processes import joined

ROOT = Path(__file__).resolve().parent.parent
RANK = 16
NODE = 8  # cards
COUNTS = (8, 64, 512)
MB = 1e6


@dataclass(frozen=True)
class Link:
    """What connects two of them: seconds a round, bytes a second in each direction."""

    name: str
    latency: float
    bandwidth: float

    def seconds(self, size: float, members: int) -> float:
        """Of adding up `size` bytes over `members`: the ring or the tree, whichever takes less."""
        if members == 1:
            return 0.0
        ring = 2 * (members - 1) / members * size / self.bandwidth
        ring += 2 * (members - 1) * self.latency
        tree = 2 * size / self.bandwidth + 2 * math.ceil(math.log2(members)) * self.latency
        return min(ring, tree)


# Assumed: about four fifths of the line's rate, and latencies as they are usual
NVLINK = Link("NVLink", 5e-6, 300e9)
PCIE = Link("PCIe 4.0", 10e-6, 20e9)
BETWEEN = (
    Link("100 Gbit/s", 20e-6, 10e9),
    Link("10 Gbit/s", 50e-6, 1e9),
)


@dataclass(frozen=True)
class Model:
    """An adapter of real shapes, and a published step.

    Attributes:
        size: Bytes of the adapter's gradients.
        step: Seconds of one process alone.
        inside: Between the cards of a node.
    """

    name: str
    size: int
    step: float
    inside: Link

    def efficiency(self, cards: int, between: Link) -> float:
        """A step alone over a step of so many cards."""
        nodes = math.ceil(cards / NODE)
        seconds = self.inside.seconds(self.size, min(cards, NODE))
        return self.step / (self.step + seconds + between.seconds(self.size, nodes))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["foretold", "measured", "sums"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    match arguments.what:
        case "foretold":
            foretold()
        case "measured":
            measured(arguments.processes)
        case "sums":  # one of the processes that `measured` starts
            sums()


# --- foretold -------------------------------------------------------------------------------------


def foretold() -> None:
    print("| adapter | gradients | a step alone | in a node | between nodes | 8 | 64 | 512 cards |")
    print("|---|--:|---|---|---|--:|--:|--:|")
    for model in models():
        for between in BETWEEN:
            cells = " | ".join(f"{model.efficiency(n, between):.1%}" for n in COUNTS)
            print(
                f"| {model.name} | {model.size / MB:.1f} MB | {model.step:.3f} s "
                f"| {model.inside.name} | {between.name} | {cells} |"
            )


def models() -> list[Model]:
    """The published steps are SimpleTuner's on an H100, and torchtune's on an RTX 4090."""
    return [
        Model("SD1.5, 512², batch 1, attention", image_bytes("sd1"), 0.181, NVLINK),
        Model("SDXL, 1024², batch 1, attention", image_bytes("sdxl"), 0.606, NVLINK),
        Model("Llama 3.1 8B, 2 × 2048 tokens, linear", llama_bytes(), 2 * 2048 / 3083, PCIE),
    ]


def image_bytes(family: Family) -> int:
    """Of the gradients of a UNet's adapters."""
    module = skeleton.of(family).adapted["unet"]
    paths = unet.targets({"unet": module}, "attention")["unet"]
    return gradient_bytes(module, paths)


def llama_bytes() -> int:
    """Of the gradients of an 8B's adapters, by the sizes in its published config."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return gradient_bytes(model, causal_lm.targets(model, "linear").adapted)


def gradient_bytes(module: torch.nn.Module, paths: list[str]) -> int:
    sides = (sum(outputs_and_inputs(module.get_submodule(path))) for path in paths)
    return 4 * RANK * sum(sides)


# --- measured -------------------------------------------------------------------------------------

ROUNDS = 7
FLOAT, MUCH = 4, 64_000_000  # bytes of the two messages that latency and bandwidth are taken from
TRIED = (1_000_000, 12_800_000, 33_000_000)


def measured(counts: list[int]) -> None:
    """Steps of a toy in N processes, and sums of some sizes against the formula."""
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores; more processes than cores share them")
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name))
        print("| processes | s/step | efficiency |\n|---|--:|--:|")
        alone = None
        for count in counts:
            seconds = step_seconds(Path(name), count)
            alone = alone or seconds
            print(f"| {count} | {seconds:.3f} | {alone / seconds:.0%} |", flush=True)
    print("| processes | message | measured | foretold | error |\n|---|--:|--:|--:|--:|")
    for count in (count for count in counts if count > 1):
        found = json.loads(launched(count, "-m", "benchmarks.scaling", "sums").splitlines()[-1])
        times = {int(size): seconds for size, seconds in found.items()}
        latency = times[FLOAT] / (2 * (count - 1))
        per_byte = (times[MUCH] - times[FLOAT]) / (2 * (count - 1) / count * MUCH)
        link = Link("gloo", latency, 1 / per_byte)
        print(f"{count} processes: {latency * 1e6:.0f} µs a round, {1e-9 / per_byte:.2f} GB/s")
        for size in TRIED:
            told = link.seconds(size, count)
            took, error = times[size], told / times[size] - 1
            print(f"| {count} | {size / MB:.1f} MB | {took * 1e3:.1f} ms "
                  f"| {told * 1e3:.1f} ms | {error:+.0%} |", flush=True)  # fmt: skip


def sums() -> None:
    """Seconds of adding up messages: medians, printed by the first process."""
    torch.set_num_threads(1)
    with joined() as processes:
        found = {}
        for size in (FLOAT, MUCH, *TRIED):
            message = torch.ones(size // 4)
            taken = []
            for _ in range(ROUNDS + 1):
                processes.wait()
                began = time.perf_counter()
                processes.add_up(message)
                taken.append(time.perf_counter() - began)
            found[size] = statistics.median(taken[1:])
        if processes.is_first:
            print(json.dumps(found), flush=True)


def make_inputs(folder: Path) -> None:
    """A LLaMA of 13 million parameters, and rows that fill its windows."""
    from tests import text_toys

    text_toys.save_model(
        folder / "base", hidden_size=384, intermediate_size=1024, num_hidden_layers=8,
        num_attention_heads=6, num_key_value_heads=6, head_dim=64,
    )  # fmt: skip
    text_toys.write_jsonl(folder / "rows.jsonl", text_toys.conversations(240))


def step_seconds(folder: Path, count: int) -> float:
    """The median of a run's steps, without the first two."""
    from tests import runs, toys

    keys = runs.text_values(
        folder / "base", folder / "rows.jsonl", folder, output_dir=str(folder / f"run-{count}"),
        batch_size=1, max_train_steps=14, epochs=100, lora_rank=RANK,
    )  # fmt: skip
    config = toys.write_config(folder / f"{count}.yaml", **keys)
    launched(count, str(ROOT / "train.py"), "--config", str(config))
    text = (folder / f"run-{count}" / "metrics.jsonl").read_text(encoding="utf-8")
    times = [row["time"] for row in map(json.loads, text.splitlines()) if "loss" in row]
    return statistics.median(later - earlier for earlier, later in pairwise(times[2:]))


def launched(count: int, *command: str) -> str:
    """A command in so many processes of one thread each; what it prints."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count))
    done = subprocess.run(
        [sys.executable, *torchrun, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()
