"""How long a command takes to answer, and a run to its first step.

    python -m benchmarks.startup [--rounds 5]

Each measurement is a process of its own, as it is typed; the figure is the median. A run counts
from the command to its first row of metrics.jsonl with a loss, which is written when the first step
is done, and is then ended: the demo once with everything to encode, once with the cache filled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from lora_scripts.run_files import METRICS

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 120.0  # seconds for a first step
DEMO = "configs/demo_image.yaml"
COMMANDS = {
    "`python train.py --help`": ("train.py", "--help"),
    "`lora-scripts --help`": ("-m", "lora_scripts", "--help"),
    "`python tools/auto_label.py --help`": ("tools/auto_label.py", "--help"),
    "`python train.py --config` of a file with mistakes": ("train.py", "--config", "broken.yaml"),
}
BROKEN = 'base_model: "assets/demo/model"\nlora_rnk: 8\nlearning_rate: fast\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print("| command | seconds, median | least – most |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "broken.yaml").write_text(BROKEN, encoding="utf-8")
        for what, arguments in COMMANDS.items():
            typed = [str(folder / a) if a == "broken.yaml" else a for a in arguments]
            report(what, rounds, lambda number, typed=typed: answered(*typed))
        report(
            "the demo to its first step", rounds,
            lambda number: to_first_step(folder / f"cold{number}", folder / f"cache{number}"),
        )  # fmt: skip
        report(
            "the same, encoded before", rounds,
            lambda number: to_first_step(folder / f"warm{number}", folder / "cache0"),
        )  # fmt: skip


def report(what: str, rounds: int, measure: Callable[[int], float]) -> None:
    """A row of the table."""
    times = [measure(number) for number in range(rounds)]
    print(f"| {what} | {median(times):.2f} | {min(times):.2f} – {max(times):.2f} |", flush=True)


def answered(*arguments: str) -> float:
    """Seconds of a command to its end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=False)
    return time.perf_counter() - began


def to_first_step(output: Path, cache: Path) -> float:
    """Seconds of the demo from the command until its first step is done.

    Raises:
        SystemExit: with what it said, if it ends before.
    """
    command = [sys.executable, "train.py", "--config", DEMO]
    command += [f"output_dir={output}", f"cache_dir={cache}"]
    began = time.time()
    with (output.parent / f"{output.name}.txt").open("w+", encoding="utf-8") as said:
        run = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=said, stderr=said
        )
        try:
            while (ended := first_step(output / METRICS)) is None:
                if run.poll() is not None or time.time() - began > PATIENCE:
                    said.seek(0)
                    raise SystemExit(said.read())
                time.sleep(0.05)
        finally:
            run.kill()
            run.wait()
    return ended - began


def first_step(metrics: Path) -> float | None:
    """When the first step was done, if it is."""
    if not metrics.is_file():
        return None
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    return next((float(row["time"]) for row in rows if "loss" in row), None)


if __name__ == "__main__":
    main()
