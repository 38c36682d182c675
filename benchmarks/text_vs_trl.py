"""Text, side by side with TRL: the same model, rows, supervised tokens, dtype, number of samples.

    pip install -e ".[bench]" -c constraints.txt
    python -m benchmarks.text_vs_trl [--rows short long] [--samples 96] [--rounds 2] [--seeds 1]

Every measurement is a process of its own, the trainers by turns. Ours is `lora_scripts.pipeline`,
the whole run; TRL is SFTTrainer with PEFT's LoraConfig, rank 16 on all linear layers:

- `trl`: its defaults (bf16, gradient checkpointing, its own loss);
- `trl, no checkpointing`: the same without it;
- `trl at its best`: weights in bf16, too, and rows of like length together. Its packing and
  padding-free batches need FlashAttention, which a CPU has not.

Rows are tokenised once, by us, and TRL gets them so, with the same tokens labelled. Seconds run
from the beginning of the first step to the end of the last, over all samples once. Peak is the
resident set of the whole process. The held-out loss is measured by transformers and PEFT in
float32, one row at a time, in a process that belongs to neither.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.children import ROOT, child_of

GGUF = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"  # `make demo-text` fetches it
LETTERS = ROOT / "assets" / "demo" / "support_dialogues.jsonl"
HELD_OUT = ROOT / "assets" / "demo" / "support_heldout.jsonl"
BATCH, RANK, RATE, LONGEST = 8, 16, 2e-4, 1024
HELD_OUT_ROWS = 16
WAYS = ("ours", "trl", "trl, no checkpointing", "trl at its best")
# turns of a row, and how often: short is a question and its answer, as in Alpaca; long is a
# conversation of some hundred to a thousand tokens, as people share them
MIXES: Mapping[str, Sequence[int]] = {"short": [1], "long": [1, 2, 2, 3, 3, 4, 5, 6]}
HEAD = """\
| rows | trainer | s | tokens/s | supervised/s | × trl | × trl at its best | peak | held-out loss |
|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=list(MIXES), default=list(MIXES))
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1, help="the rounds take them in turn")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        call("base", str(folder / "base"))
        print(HEAD)
        for mix in arguments.rows:
            compare(folder, mix, arguments.samples, arguments.rounds, arguments.seeds)


def compare(folder: Path, mix: str, samples: int, rounds: int, seeds: int) -> None:
    """The rows of the table for a mix, and what they hold."""
    work = folder / mix
    work.mkdir()
    write_rows(work, mix, samples)
    counts = json.loads(call("tokens", str(folder / "base"), str(work)))
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(rounds):
        for way in WAYS:
            found[way].append(measure(folder / "base", work, way, turn % seeds))
    seconds = {way: statistics.median(one["seconds"] for one in found[way]) for way in WAYS}
    for way in WAYS:
        took = [one["seconds"] for one in found[way]]
        losses = [one["loss"] for one in found[way]]
        print(
            f"| {mix} | {way} | {seconds[way]:.1f} ({min(took):.1f}–{max(took):.1f}) "
            f"| {counts['tokens'] / seconds[way]:.0f} | {counts['learned'] / seconds[way]:.0f} "
            f"| {seconds['trl'] / seconds[way]:.2f} "
            f"| {seconds['trl at its best'] / seconds[way]:.2f} "
            f"| {max(one['peak'] for one in found[way]) / 2**30:.2f} GiB "
            f"| {statistics.mean(losses):.4f} ({min(losses):.4f}–{max(losses):.4f}) |",
            flush=True,
        )
    print(
        f"\n{mix}: {samples} samples, {counts['tokens']:,} tokens (a row {counts['shortest']} to "
        f"{counts['longest']}), {counts['learned'] / counts['tokens']:.0%} of them supervised; "
        f"before training the held-out loss is {counts['loss']:.4f}\n",
        flush=True,
    )


def write_rows(folder: Path, mix: str, samples: int) -> None:
    """Rows to learn and held-out ones, of letters and their answers, one after the other."""
    for path, name, count in ((LETTERS, "rows", samples), (HELD_OUT, "held_out", HELD_OUT_ROWS)):
        letters = [json.loads(line)["messages"] for line in path.read_text("utf-8").splitlines()]
        draw = random.Random(0)
        rows = []
        for _ in range(count):
            turns = draw.sample(letters, draw.choice(MIXES[mix]))
            rows.append({"messages": [message for turn in turns for message in turn]})
        text = "\n".join(json.dumps(row) for row in rows)
        (folder / f"{name}.jsonl").write_text(text + "\n", encoding="utf-8")


def measure(base: Path, work: Path, way: str, seed: int) -> dict[str, float]:
    """One training and what a neutral reader finds in its adapter."""
    output = work / "output"
    shutil.rmtree(output, ignore_errors=True)
    if way == "ours":
        said = call("ours", str(base), str(work), str(output), str(seed))
    else:
        said = call("trl", str(base), str(work), str(output), str(seed), way)
    found: dict[str, float] = json.loads(said)
    found["loss"] = json.loads(call("evaluate", str(base), str(work), str(output)))
    return found


def call(*arguments: str) -> str:
    """Run `child` in a process of its own; the last line of what it says."""
    return child_of("text_vs_trl", *arguments)


# --- in a process of its own ----------------------------------------------------------------------


def child(what: str, *arguments: str) -> None:
    """One piece of work; the last line of the output is its result."""
    work: dict[str, Callable[..., None]] = {
        "base": make_base, "tokens": tokens, "ours": ours, "trl": trl, "evaluate": evaluate,
    }  # fmt: skip
    work[what](*arguments)


def make_base(folder: str) -> None:
    """The .gguf file as a folder that transformers reads, in bfloat16."""
    import torch

    from lora_scripts.device import Compute
    from lora_scripts.models import causal_lm
    from lora_scripts.models.text_signature import read_text_signature

    found = read_text_signature(GGUF)
    base = causal_lm.load(found, Compute(torch.device("cpu"), "no"), own_dtype=True)
    causal_lm.save(base.model, base.tokenizer, Path(folder))


def encoded(base: str, work: str, name: str) -> list[tuple[list[int], list[bool]]]:
    """Ids of each row, and which are learned, as lora-scripts makes them."""
    from lora_scripts.data.chat import ChatFormat
    from lora_scripts.models import causal_lm
    from lora_scripts.models.text_signature import read_text_signature

    format = ChatFormat(causal_lm.load_tokenizer(read_text_signature(Path(base))))
    rows = []
    for line in (Path(work) / f"{name}.jsonl").read_text("utf-8").splitlines():
        (rendered,) = format.render(json.loads(line)["messages"])
        row = format.encode(rendered)
        rows.append((row.ids[:LONGEST].tolist(), row.supervised[:LONGEST].tolist()))
    return rows


def tokens(base: str, work: str) -> None:
    """What the rows hold, and the loss without any training."""
    rows = encoded(base, work, "rows")
    lengths = [len(ids) for ids, _ in rows]
    learned = sum(sum(marks[1:]) for _, marks in rows)
    loss = held_out_loss(base, work, None)
    print(
        json.dumps(
            {
                "tokens": sum(lengths),
                "learned": learned,
                "shortest": min(lengths),
                "longest": max(lengths),
                "loss": loss,
            }
        )
    )


def report(started: float, ended: float) -> None:
    """Print the result of a training."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": ended - started, "peak": peak}))


def ours(base: str, work: str, output: str, seed: str) -> None:
    """The whole of a lora-scripts run; its steps are timed."""
    from lora_scripts import pipeline
    from lora_scripts.training.learner import Learner

    keys = {
        "task_type": "text-generation", "base_model": base, "output_dir": output,
        "train_data_dir": f"{work}/rows.jsonl", "cache_dir": f"{work}/cache", "lora_rank": RANK,
        "lora_alpha": RANK, "epochs": 1, "batch_size": BATCH, "gradient_accumulation_steps": 1,
        "learning_rate": RATE, "lr_scheduler": "constant", "lr_warmup_steps": 0,
        "max_seq_length": LONGEST, "validation_split": 0, "seed": int(seed), "resume": "never",
    }  # fmt: skip
    config = Path(work) / "ours.yaml"
    config.write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in keys.items()), "utf-8")
    times: list[float] = []
    take = Learner.take

    def timed(*arguments: Any) -> Any:
        times.append(time.perf_counter())
        taken = take(*arguments)
        times.append(time.perf_counter())
        return taken

    Learner.take = timed  # type: ignore[method-assign]
    assert pipeline.run(config) == 0
    report(times[0], times[-1])


def trl(base: str, work: str, output: str, seed: str, way: str) -> None:
    """SFTTrainer on the same tokens."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": ids, "labels": [i if m else -100 for i, m in zip(ids, marks, strict=True)]}
        for ids, marks in encoded(base, work, "rows")
    ]
    settings: dict[str, Any] = {}
    if way != "trl":
        settings["gradient_checkpointing"] = False
    if way == "trl at its best":
        settings["model_init_kwargs"] = {"dtype": torch.bfloat16}
        settings["train_sampling_strategy"] = "group_by_length"
    if not torch.cuda.is_available():
        settings["use_cpu"] = True
    times: list[float] = []

    class Timed(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *arguments: Any, **more: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            times.append(time.perf_counter())

    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=output, num_train_epochs=1, per_device_train_batch_size=BATCH,
            learning_rate=RATE, lr_scheduler_type="constant", max_length=LONGEST, seed=int(seed),
            save_strategy="no", report_to=[], disable_tqdm=True, **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"),
        callbacks=[Timed()],
    )  # fmt: skip
    trainer.train()
    trainer.save_model(output)
    report(times[0], times[-1])


def evaluate(base: str, work: str, adapter: str) -> None:
    """The held-out loss of an adapter."""
    print(held_out_loss(base, work, adapter))


def held_out_loss(base: str, work: str, adapter: str | None) -> float:
    """Mean over the supervised tokens of the held-out rows, by transformers and PEFT, float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, marks in encoded(base, work, "held_out"):
            ids_BT = torch.tensor([ids])
            labels_BT = torch.where(torch.tensor([marks]), ids_BT, -100)
            number = int((labels_BT[:, 1:] != -100).sum())
            total += model(input_ids=ids_BT, labels=labels_BT).loss.item() * number
            count += number
    return total / count


if __name__ == "__main__":
    main()
