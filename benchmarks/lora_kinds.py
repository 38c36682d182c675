"""Which kind of LoRA, which layers, which optimizer? The demo in eight ways, five seeds each.

    python scripts/demo_drawings.py draw
    python benchmarks/lora_kinds.py [--seeds 5] [--work build/lora_kinds]

Each way is `configs/demo_image.yaml` with the keys of `WAYS`, and nothing else, changed: the same
pictures, steps and batches. Of every LoRA it prints, as mean ± deviation over the seeds,

* style distance and other style: how far the 40 held-out names, drawn once each, are from real
  drawings of the style (by statistics, by a classifier; see demo_style.py), as a share of the
  base's distance: 0 is the style itself, 1 is nothing learned;
* named: the share of things that a classifier still names, as a share of the base's;
* seconds a training step, measured apart: short runs of all ways in turn, `--rounds` times, so that
  what else the machine does falls on all of them; and the size of the file.

It goes on where it stopped: finished runs and measured ones are kept below `--work`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import demo_style
import numpy as np
import torch
from demo_style import Drawings

from lora_scripts.device import choose
from lora_scripts.logs import quiet_libraries
from lora_scripts.models.family import DrawRequest, ImageFamily
from lora_scripts.tasks import build

CONFIG = "configs/demo_image.yaml"
BASE = "assets/demo/model"
QUIET = ["sample_prompts=[]", "save_steps=null", "eval_steps=100000", "cache_dir=build/cache"]
PACE_STEPS = 12
WAYS: dict[str, list[str]] = {
    "LoRA on attention (the demo)": [],
    "DoRA": ["lora_type=dora"],
    "rsLoRA": ["lora_type=rslora"],
    "linear layers": ["lora_targets=linear"],
    "all layers": ["lora_targets=all"],
    "with text encoder": ["train_text_encoder=true"],
    "Prodigy": ["optimizer=prodigy", "learning_rate=1.0"],
    "min-SNR 5": ["min_snr_gamma=5"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--drawings", type=Path, default=Path("build/drawings"))
    parser.add_argument("--work", type=Path, default=Path("build/lora_kinds"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), help="only these")
    arguments = parser.parse_args()
    ways = arguments.ways or list(WAYS)
    quiet_libraries()
    runs = [(way, seed) for seed in range(1, arguments.seeds + 1) for way in ways]
    for number, (way, seed) in enumerate(runs, start=1):
        print(f"{number} of {len(runs)}: {way}, seed {seed}", file=sys.stderr)
        train(folder_of(arguments.work, way, seed), way, seed)
    seconds = pace(arguments.work / "pace", ways, arguments.rounds)
    judge = Judge(arguments.drawings)
    base = judge.measured(arguments.work / "base.json", BASE, None)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for way, seed in runs:
        folder = folder_of(arguments.work, way, seed)
        figures = judge.measured(folder / "measured.json", BASE, folder)
        size = {"MB": (folder / "lora.safetensors").stat().st_size / 1e6}
        found[way].append({**shares(figures, base), **size})
    report(found, seconds, base)


def folder_of(work: Path, way: str, seed: int) -> Path:
    """Where a run lies."""
    plain = "".join(letter if letter.isalnum() else "_" for letter in way)
    return work / f"{plain}-{seed}"


def train(folder: Path, way: str, seed: int, *more: str) -> None:
    """One run by the command that everybody types; a finished one is left alone."""
    if (folder / "run.json").is_file():
        return
    overrides = [*QUIET, *WAYS[way], f"seed={seed}", f"output_dir={folder}", "output_name=lora"]
    command = [sys.executable, "train.py", "--config", CONFIG, *overrides, *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def pace(work: Path, ways: Sequence[str], rounds: int) -> dict[str, float]:
    """Seconds a step of each way: the least of the rounds' medians, taken in turn."""
    least: dict[str, float] = {}
    for number in range(rounds):
        for way in ways:
            folder = folder_of(work, way, number)
            shutil.rmtree(folder, ignore_errors=True)
            train(folder, way, 1, f"max_train_steps={PACE_STEPS}")
            rows = [json.loads(row) for row in (folder / "metrics.jsonl").open(encoding="utf-8")]
            times = [row["time"] for row in rows if "loss" in row]
            steps = [later - earlier for earlier, later in itertools.pairwise(times)]
            least[way] = min(statistics.median(steps), least.get(way, math.inf))
            print(f"pace, round {number + 1}: {way}: {least[way]:.3f} s", file=sys.stderr)
    return least


class Judge:
    """The classifiers and the real drawings; made when the first picture is to be judged."""

    def __init__(self, drawings: Path) -> None:
        self.drawings = drawings
        self._ready: dict[str, Any] = {}

    def measured(self, note: Path, base: str, lora: Path | None) -> dict[str, float]:
        """The figures of a base with or without a LoRA, from an earlier call if there was one."""
        if not note.is_file():
            figures = self._measure(draw(base, lora, self._parts()["held_out"]))
            note.write_text(json.dumps(figures), encoding="utf-8")
        figures = json.loads(note.read_text(encoding="utf-8"))
        return {name: float(value) for name, value in figures.items()}

    def _measure(self, pictures: Drawings) -> dict[str, float]:
        parts = self._parts()
        names = ("real", "style_of", "name_of", "known", "scale_F")
        return demo_style.measure(pictures, *(parts[name] for name in names))

    def _parts(self) -> dict[str, Any]:
        if not self._ready:
            torch.manual_seed(0)
            drawings = demo_style.read_drawings(self.drawings)
            held_out = demo_style.read_captions(Path("assets/demo/heldout.csv"))
            trained = demo_style.read_captions(Path("assets/demo/style_images/metadata.csv"))
            known = sorted({*held_out, *trained})
            ours = np.isin(drawings.names, known)
            is_style = drawings.styles == demo_style.STYLE
            self._ready = {
                "held_out": held_out,
                "known": known,
                "real": drawings.where(is_style & np.isin(drawings.names, list(held_out))),
                "style_of": demo_style.train_style_classifier(drawings.where(~ours)),
                "name_of": demo_style.train_concept_classifier(
                    drawings.where(~is_style & ours), known
                ),
                "scale_F": demo_style.features(drawings.pixels_NHWC).std(axis=0),
            }
        return self._ready


def draw(base: str, lora: Path | None, captions: dict[str, str]) -> Drawings:
    """Each caption once, with a seed of its own."""
    family: ImageFamily = build.load_family(build.find_base(base), choose("auto", "auto"))
    if lora is not None:
        family.load_file(lora)
    pictures = []
    for seed, caption in enumerate(captions.values()):
        side = demo_style.SIDE
        request = DrawRequest(caption, "", demo_style.GUIDANCE, demo_style.STEPS, side, side, seed)
        pictures.append(np.asarray(family.draw(request)))
    return Drawings(np.stack(pictures), np.array(["drawn"] * len(captions)), np.array([*captions]))


def shares(figures: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    """The figures of a LoRA as shares of the base's."""
    return {
        "style distance": figures["statistics_distance"] / base["statistics_distance"],
        "other style": figures["other_style_probability"] / base["other_style_probability"],
        "named": figures["named"] / base["named"],
    }


def report(
    found: dict[str, list[dict[str, float]]], seconds: dict[str, float], base: dict[str, float]
) -> None:
    """A Markdown table, a row a way; the time of the first way is 1."""
    columns = list(next(iter(found.values()))[0])
    print("| way | " + " | ".join(columns) + " | s/step | time |")
    print("|---" * (len(columns) + 3) + "|")
    first = next(iter(seconds.values()))
    for way, rows in found.items():
        cells = []
        for column in columns:
            values = [row[column] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            mean = statistics.mean(values)
            cells.append(f"{mean:.2f}" if column == "MB" else f"{mean:.3f} ± {spread:.3f}")
        time_cells = f"{seconds[way]:.2f} | {seconds[way] / first:.2f}"
        print(f"| {way}, {len(rows)} seeds | " + " | ".join(cells) + f" | {time_cells} |")
    print()
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in base.items())
    print(f"The base: {shown}. {time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads.")


if __name__ == "__main__":
    main()
