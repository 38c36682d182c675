"""What each lever of speed and memory brings: training without it and with it, by turns.

    python -m benchmarks.levers [--only NAME …] [--cases CASE …] [--rounds 3] [--folder DIR]

Each measurement is a process of its own: load, encode, attach, then optimizer steps through the
run's own loop over batches (`training.steps`, `training.learner`). Seconds a sample are the median
over the steps but the first two (batches of text differ in length, the same ones in both ways);
memory is the most that the process held in those steps. Medians over the rounds. `--folder` keeps
the models for the next time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import memory_estimate
from benchmarks.children import ROOT, child_of
from benchmarks.memory_estimate import Case
from lora_scripts import allocator

STEPS, WARMING = 10, 2
DEMO_MODEL = ROOT / "assets" / "demo" / "model"
TEXT, IMAGE = "Llama 110M, 8 rows of about 110 tokens", "SD small, 256², batch 4"
DEMO = "the demo, 64², batch 16"
LONG, LARGE = "Llama 110M, 2 rows of about 600 tokens", "SD small, 512², batch 1"
_TEXT_KEYS = {**memory_estimate.TEXT, "max_train_steps": STEPS, "epochs": 50}
CASES: Mapping[str, Case] = {
    TEXT: Case("Llama 110M", {**_TEXT_KEYS, "batch_size": 8, "words": 70}),
    LONG: Case("Llama 110M", {**_TEXT_KEYS, "batch_size": 2, "words": 400, "max_seq_length": 1024}),
    IMAGE: Case("SD small", {"resolution": 256, "batch_size": 4, "epochs": 50}),
    DEMO: Case("demo", {"resolution": 64, "batch_size": 16, "epochs": 100, "lora_dropout": 0.1}),
    LARGE: Case("SD small", {"resolution": 512, "batch_size": 1, "epochs": 50}),
}


@dataclass(frozen=True)
class Side:
    """A way of training: keys of the config, and what is changed within the process."""

    keys: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Lever:
    """The two sides, and the cases that they are measured on."""

    without: Side
    pulled: Side
    cases: Sequence[str]


def padded_at_random() -> None:
    """Rows of a padded batch as they come, not of like length."""
    from lora_scripts.data import samples

    grouped = samples.batches
    samples.batches = lambda views, size, lengths, *key: grouped(views, size, None, *key)


def pefts_layer() -> None:
    """PEFT's own way through a LoRA layer."""
    from lora_scripts.models.lora import linear

    linear.in_one_step = lambda layer: None


def all_logits_at_once() -> None:
    """The model's own head on all tokens to learn."""
    from lora_scripts.models import head

    head.may_come_in_parts = lambda model: False


def one_parameter_at_a_time() -> None:
    """AdamW as a loop over the parameters."""
    import torch

    fused = torch.optim.AdamW

    def plain(*arguments: Any, **settings: Any) -> torch.optim.AdamW:
        return fused(*arguments, **{**settings, "fused": False, "foreach": False})

    torch.optim.AdamW = plain  # type: ignore[assignment, misc]


def batches_when_needed() -> None:
    """The next batch is read once it is needed."""
    from lora_scripts.training import steps

    def one_by_one(task: Any, todo: Any, compute: Any) -> Iterator[tuple[Any, Iterator[Any]]]:
        for step in todo:
            own = step.share(compute)
            yield step, (task.load(part.indices, step.key) for part in own)

    steps.prefetched = one_by_one


def helped_by_others() -> None:
    """What reads ahead computes with helpers, too."""
    from lora_scripts import threads

    threads.compute_alone = lambda: None


def blocks_compiled() -> None:
    """Each block of attention compiled by torch.compile, with PEFT's layers, which it fuses.

    Texts once for all shapes, around the attention, as rows end elsewhere in every batch; pictures
    for each shape.
    """
    import torch

    from lora_scripts.models import packing
    from lora_scripts.tasks import diffusion, language

    pefts_layer()
    apart: Any = torch.compiler.disable
    packing.segment_attention = apart(packing.segment_attention)
    for kind, dynamic in ((diffusion.DiffusionTask, False), (language.LanguageTask, True)):
        kind.attach = _compiling(kind.attach, dynamic=dynamic)  # type: ignore[method-assign]


def _compiling(attach: Callable[[Any], None], *, dynamic: bool) -> Callable[[Any], None]:
    """`attach`, and then the compiler on the blocks that it has put the LoRA on."""
    import torch

    def attached(task: Any) -> None:
        attach(task)
        for block in _blocks_of(task):
            block.forward = torch.compile(block.forward, dynamic=dynamic)

    return attached


def _blocks_of(task: Any) -> list[Any]:
    """The repeated blocks of attention: of a UNet, or of a LLaMA."""
    from diffusers.models.attention import BasicTransformerBlock
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    kinds = BasicTransformerBlock, LlamaDecoderLayer
    (module, *_) = task.adapted.values()
    return [part for part in module.modules() if isinstance(part, kinds)]


BF16 = {"mixed_precision": "bf16"}
LEVERS: Mapping[str, Lever] = {
    "the base in bf16, not float32": Lever(Side(), Side(BF16), [TEXT, LONG, IMAGE, LARGE]),
    "rows of like length side by side": Lever(
        Side({**BF16, "packing": False}, padded_at_random), Side({**BF16, "packing": False}), [TEXT]
    ),
    "rows packed, attention row by row": Lever(
        Side({**BF16, "packing": False}), Side(BF16), [TEXT, LONG]
    ),
    "logits in parts": Lever(Side(BF16, all_logits_at_once), Side(BF16), [TEXT, LONG]),
    "layer and LoRA in one operation": Lever(
        Side(BF16, pefts_layer), Side(BF16), [TEXT, LONG, IMAGE, LARGE]
    ),
    "latents and captions encoded once": Lever(
        Side({**BF16, "cache_latents": False, "caption_dropout": 0.1}), Side(BF16), [IMAGE, LARGE]
    ),
    "fused AdamW": Lever(Side(BF16, one_parameter_at_a_time), Side(BF16), [TEXT, IMAGE]),
    "batches read ahead": Lever(Side(BF16, batches_when_needed), Side(BF16), [TEXT, IMAGE]),
    "what reads ahead computes alone": Lever(
        Side(BF16, helped_by_others), Side(BF16), [DEMO, IMAGE, TEXT]
    ),
    "blocks compiled": Lever(
        Side(BF16), Side(BF16, blocks_compiled), [TEXT, LONG, IMAGE, LARGE]
    ),
    "gradient checkpointing": Lever(
        Side(BF16), Side({**BF16, "gradient_checkpointing": True}), [LONG, LARGE]
    ),
    "tensors mapped alone": Lever(
        Side(BF16), Side(BF16, allocator.map_alone), [LONG, LARGE]
    ),
}  # fmt: skip
HEAD = """\
| lever | configuration | s/sample without | with | ratio | memory without | with | ratio |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(LEVERS), default=list(LEVERS))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        print(HEAD)
        for lever in arguments.only:
            for case in (c for c in LEVERS[lever].cases if c in arguments.cases):
                print(line(folder, lever, case, arguments.rounds), flush=True)


def line(folder: Path, lever: str, case: str, rounds: int) -> str:
    """A row of the table."""
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(rounds):
        for pulled in (False, True):
            told = json.loads(child_of("levers", str(folder), lever, case, json.dumps(pulled)))
            found[pulled].append((told["seconds"], told["peak"]))
    (seconds_off, bytes_off), (seconds_on, bytes_on) = (
        [median(values) for values in zip(*found[pulled], strict=True)] for pulled in (False, True)
    )
    return (
        f"| {lever} | {case} | {seconds_off:.3f} | {seconds_on:.3f} "
        f"| {seconds_on / seconds_off:.2f} | {bytes_off / 1e6:,.0f} MB | {bytes_on / 1e6:,.0f} MB "
        f"| {bytes_on / bytes_off:.2f} |"
    )


# --- in a process of its own ----------------------------------------------------------------------


def child(folder: str, lever: str, case: str, pulled: str) -> None:
    """Train a few steps on one side of a lever; print seconds a sample and bytes."""
    side = LEVERS[lever].pulled if json.loads(pulled) else LEVERS[lever].without
    side.change()
    told = CASES[case]
    is_demo = told.base == "demo"
    base = DEMO_MODEL if is_demo else memory_estimate.base_of(Path(folder), told.base)
    on_this_side = Case(told.base, {**told.keys, **side.keys})
    config_path = memory_estimate.write_config(Path(folder), on_this_side, base)
    print(json.dumps(trained(str(config_path))))


def trained(config_path: str) -> dict[str, float]:
    """Seconds a sample, and the largest resident set, in the steps of a run."""
    from lora_scripts.memory import room
    from lora_scripts.tasks import build
    from lora_scripts.training import loop, steps
    from lora_scripts.training.learner import Learner

    config, rows, compute = memory_estimate.prepared(config_path)
    task = build.build(config, rows, compute)
    task.encode(lambda what, done, total: None)
    task.attach()
    learner = Learner(task, config, compute, STEPS, None)
    todo = islice(steps.remaining(task, config, learner.position, STEPS, compute.processes), STEPS)
    loop.switch(task, training=True)
    seconds = []
    for step, batches in steps.prefetched(task, todo, compute):
        if len(seconds) == WARMING:
            allocator.give_back()
            room.forget_peak()
        started = time.perf_counter()
        learner.take(step, batches, lambda: False)
        learner.clear()
        samples = sum(len(indices) for indices in step.micro_batches)
        seconds.append((time.perf_counter() - started) / samples)
    return {"seconds": median(seconds[WARMING:]), "peak": room.peak_resident()}


if __name__ == "__main__":
    main()
