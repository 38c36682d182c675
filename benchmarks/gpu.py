"""Seconds a step and memory on a graphics card, in the exact shapes of well-known models.

    python -m benchmarks.gpu [--rows sd1 sdxl 1b 8b 8b-nf4 …] [--steps 8] [--folder DIR]

Images: batch 1, LoRA of rank 16 on attention, with and without gradient checkpointing. Texts: two
rows of 2,048 tokens, packed, rank 16 on all linear layers, every token learned. Each row is
`lora_scripts.pipeline` in a process of its own, which ends after its last step; seconds are the
median over the steps but the first two. Weights are random, which cost what trained ones cost.
Peak is what PyTorch reserved on the card. `published` are figures of others on the card named.
`--folder` keeps the models (8B: 16 GB). Rows that this machine cannot do are said, not left out.
`--tiny` takes few and narrow layers, and runs on a CPU: it shows only that the command works.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.children import child_of

RANK, TOKENS = 16, 2048
WARMING = 2  # steps that are not counted
LLAMA: Mapping[str, Mapping[str, Any]] = {  # as in their config.json on the hub
    "llama-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": 128256, "tie_word_embeddings": True, "rope_theta": 500000.0,
    },
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "tie_word_embeddings": False, "rope_theta": 500000.0,
    },
}  # fmt: skip
TINY_LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
TINY_UNET = {"block_out_channels": [32, 64, 64, 64], "layers_per_block": 1}
TINY_UNET_XL = {"block_out_channels": [64, 64, 64], "transformer_layers_per_block": [1, 1, 1]}


@dataclass(frozen=True)
class Row:
    """A line of the table: a base, its keys, and what others have published for it."""

    name: str
    base: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    published: str = ""


CHECKPOINTED = {"gradient_checkpointing": True}
SIMPLE = "SimpleTuner, H100"
TUNE = "torchtune compiled, RTX 4090"
ROWS = {
    "sd1": Row("SD1.5, 512²", "sd1", {"resolution": 512}, f"{SIMPLE}: 0.181 s, 2.87 GiB"),
    "sd1-checkpointing": Row(
        "SD1.5, 512², checkpointing", "sd1", {"resolution": 512, **CHECKPOINTED},
        f"{SIMPLE}: 0.305 s, 1.98 GiB",
    ),
    "sd1-4": Row("SD1.5, 512², batch 4", "sd1", {"resolution": 512, "batch_size": 4}),
    "sdxl": Row("SDXL, 1024²", "sdxl", {"resolution": 1024}, f"{SIMPLE}: 0.606 s, 13.0 GiB"),
    "sdxl-checkpointing": Row(
        "SDXL, 1024², checkpointing", "sdxl", {"resolution": 1024, **CHECKPOINTED},
        f"{SIMPLE}: 1.080 s, 6.5 GiB",
    ),
    "sdxl-offload": Row(
        "SDXL, 1024², checkpointing, offload", "sdxl",
        {"resolution": 1024, "offload": True, **CHECKPOINTED},
    ),
    "1b": Row("Llama 1B", "llama-1b"),
    "8b": Row("Llama 8B", "llama-8b", {}, f"{TUNE}: 3,083 tokens/s, 16.2 GiB"),
    "8b-checkpointing": Row("Llama 8B, checkpointing", "llama-8b", CHECKPOINTED),
    "8b-nf4": Row(
        "Llama 8B, NF4, checkpointing", "llama-8b", {"quantization": "nf4", **CHECKPOINTED},
        f"{TUNE}: 2,413 tokens/s, 7.4 GiB",
    ),
    "8b-offload": Row(
        "Llama 8B, checkpointing, offload", "llama-8b", {"offload": True, **CHECKPOINTED}
    ),
}  # fmt: skip
HEAD = """\
| configuration | s/step | spread | tokens/s | peak on the card | published |
|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        print(f"{call('card')}\n\n{HEAD}")
        for row in arguments.rows:
            print(line(folder, ROWS[row], arguments.steps, tiny=arguments.tiny), flush=True)


def line(folder: Path, row: Row, steps: int, *, tiny: bool) -> str:
    """A row of the table."""
    base = folder / f"{row.base}{'-tiny' if tiny else ''}"
    told = base.name.partition("-tiny")[0]
    try:
        if not base.is_dir():
            half = base.with_suffix(".half")
            call("base", told, str(half), json.dumps(tiny))
            half.rename(base)
        config = write_config(folder, row, base, steps, tiny=tiny)
        found = json.loads(call("train", str(config)))
    except SystemExit as error:  # a child's words
        last = str(error).strip().splitlines()[-1]
        return f"| {row.name} | not done: {last} | | | | {row.published} |"
    seconds = found["seconds"]
    middle = statistics.median(seconds)
    rate = f"{found['tokens'] / middle:,.0f}" if found["tokens"] else ""
    return (
        f"| {row.name} | {middle:.3f} | {min(seconds):.3f}–{max(seconds):.3f} | {rate} "
        f"| {found['peak'] / 2**30:.2f} GiB | {row.published} |"
    )


def write_config(folder: Path, row: Row, base: Path, steps: int, *, tiny: bool) -> Path:
    """The config of a row, its data made if need be."""
    keys: dict[str, Any] = {
        "base_model": str(base), "output_dir": str(folder / "output"),
        "cache_dir": str(folder / "cache"), "resume": "never", "lora_rank": RANK,
        "epochs": 1000, "max_train_steps": steps, "mixed_precision": "auto" if tiny else "bf16",
        **row.keys,
    }  # fmt: skip
    if row.base.startswith("llama"):
        keys |= {
            "task_type": "text-generation", "max_seq_length": TOKENS, "batch_size": 2,
            "gradient_accumulation_steps": 1, "validation_split": 0,
        }  # fmt: skip
    elif tiny:
        keys["resolution"] = 128
    keys["train_data_dir"] = str(make_data(folder, keys))
    path = folder / "run.yaml"
    path.write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in keys.items()), encoding="utf-8")
    return path


def make_data(folder: Path, keys: Mapping[str, Any]) -> Path:
    """Pictures of noise, or texts that are longer than a row."""
    import numpy as np

    if "resolution" in keys:
        from benchmarks.memory_estimate import save_pictures

        return save_pictures(folder / f"pictures-{keys['resolution']}", keys["resolution"])
    path = folder / "texts.jsonl"
    draw = np.random.default_rng(0)
    texts = (" ".join(map(str, draw.integers(0, 1000, TOKENS))) for _ in range(8))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def call(*arguments: str) -> str:
    """Run `child` in a process of its own; the last line of what it says."""
    return child_of("gpu", *arguments)


# --- in a process of its own ----------------------------------------------------------------------


def child(what: str, *arguments: str) -> None:
    """One piece of work; the last line of the output is its result."""
    {"card": card, "base": make_base, "train": train}[what](*arguments)  # type: ignore[operator]


def card() -> None:
    """Print what this machine computes with."""
    import torch

    if not torch.cuda.is_available():
        print(f"no card; CPU, torch {torch.__version__}")
        return
    about = torch.cuda.get_device_properties(0)
    size = about.total_memory / 2**30
    print(f"{about.name}, {size:.0f} GiB, torch {torch.__version__}, CUDA {torch.version.cuda}")


def make_base(name: str, folder: str, tiny: str) -> None:
    """A model of the exact shapes (`tiny`: of few and narrow layers) with random weights."""
    from benchmarks import memory_estimate

    if not name.startswith("llama"):
        changes: Mapping[str, Any] = {"sd1": TINY_UNET, "sdxl": TINY_UNET_XL}[name]
        memory_estimate.save_sd(name, changes if json.loads(tiny) else {}, 0, 0)(Path(folder))
        return
    import torch

    settings = {**LLAMA[name], **(TINY_LLAMA if json.loads(tiny) else {})}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        memory_estimate.save_lm("bfloat16", **settings)(Path(folder))


def train(config: str) -> None:
    """Print the seconds of the steps, the tokens of one, and the peak on the card."""
    import torch

    from lora_scripts import pipeline
    from lora_scripts.memory import room
    from lora_scripts.tasks import diffusion
    from lora_scripts.training.learner import Learner

    diffusion.MEASURED_VIEWS = 1
    times: list[float] = []
    take = Learner.take

    def timed(learner: Any, *arguments: Any) -> Any:
        if not times:
            times.append(time.perf_counter())
        taken = take(learner, *arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        if learner.is_done():
            steps = len(times) - 1
            seconds = [after - before for before, after in pairwise(times)][WARMING:]
            cuda = torch.cuda.is_available()
            peak = torch.cuda.max_memory_reserved() if cuda else room.peak_resident()
            tokens = learner.tallies["tokens"] / steps
            print(json.dumps({"seconds": seconds, "tokens": tokens, "peak": peak}), flush=True)
            os._exit(0)
        return taken

    setattr(Learner, "take", timed)  # noqa: B010
    raise SystemExit(pipeline.run(Path(config)))


if __name__ == "__main__":
    main()
