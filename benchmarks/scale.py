"""What a data set's size costs: seconds and memory of checking, caching and training, at two sizes.

    python -m benchmarks.scale [--texts 100000 1000000] [--conversations 100000 300000]
                               [--images 1000 10000] [--traced] [--folder FOLDER]

Generated raw texts of about 60 characters, conversations of an exchange of that length, or pictures
of 64 × 64 pixels with captions, and toy models of the real classes. Each size is a process of its
own that goes the road of `train`: checking (`preflight`), caching (disk and memory foretold, model
loaded, data encoded), training (a micro-step, then a few optimizer steps of one epoch).

Memory is what the process has for itself: the anonymous pages (`RssAnon` of /proc/self/status, what
is swapped out included), looked at 50 times a second. Pages of mapped files are left out: the
system takes them back when it needs them. The slope is what the highest value of a phase grows by
for each row between the two sizes. Two runs of one size differ by some megabytes, which is nothing
for a million rows and much for ten thousand: with --traced what Python and NumPy allocate is
counted instead, which is exact and slower.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.children import last_line

SIZES = {
    "texts": (100_000, 1_000_000),
    "conversations": (100_000, 300_000),
    "images": (1_000, 10_000),
}
PHASES = ("checking", "caching", "training")
STEPS = 5
_MAKE = "from benchmarks import scale; scale.make()"
_MEASURE = "from benchmarks import scale; scale.measure()"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for kind, sizes in SIZES.items():
        parser.add_argument(f"--{kind}", type=int, nargs="*", default=sizes)
    parser.add_argument("--traced", action="store_true", help="count what Python allocates")
    parser.add_argument("--folder", type=Path, help="of the data; must have room for them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for kind in SIZES:
            if sizes := getattr(arguments, kind):
                print_table(
                    kind,
                    [measured(kind, size, Path(folder), traced=arguments.traced) for size in sizes],
                )


def measured(kind: str, size: int, folder: Path, *, traced: bool) -> dict[str, Any]:
    """The figures of one size, from a process of its own; another one has made the data."""
    path = folder / f"{kind}{size}" / "run.yaml"
    last_line(_MAKE, kind, str(size), str(path))
    found: dict[str, Any] = json.loads(last_line(_MEASURE, str(size), str(path), str(traced)))
    return found


def print_table(kind: str, found: list[dict[str, Any]]) -> None:
    """A row for each phase and size, and the slope of its peak."""
    print(f"\n| {kind} | phase | seconds | µs a row | peak, MB | bytes a row |")
    print("|---|---|---|---|---|---|")
    for phase in PHASES:
        for number, row in enumerate(found):
            slope = ""
            if number:
                before = found[number - 1]
                grown = row[phase]["peak"] - before[phase]["peak"]
                slope = f"{grown / (row['rows'] - before['rows']):.1f}"
            seconds, peak = row[phase]["seconds"], row[phase]["peak"] / 1e6
            each = f"{seconds / row['rows'] * 1e6:,.0f}" if phase != "training" else ""
            print(f"| {row['rows']:,} | {phase} | {seconds:.1f} | {each} | {peak:.1f} | {slope} |")


# --- in a process of its own ----------------------------------------------------------------------


def make() -> None:
    """Write data, toy model and config of a size."""
    kind, size, path = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    values = pictures(size, path.parent) if kind == "images" else texts(kind, size, path.parent)
    path.write_text(json.dumps(values), encoding="utf-8")


def measure() -> None:
    """Go the road of `train` with a config, print the figures."""
    from lora_scripts import config, pipeline, preflight
    from lora_scripts.logs import quiet_libraries

    size, path = int(sys.argv[1]), Path(sys.argv[2])
    if sys.argv[3] == "True":
        pipeline._import_libraries(config.read(path, []).checked())  # they are not to be counted
        tracemalloc.start()
    found: dict[str, Any] = {"rows": size}
    draft = config.read(path, [])
    with phase(found, "checking"):
        rows, problems = preflight.inputs(draft)
        preflight.refuse(problems, draft)
    settings = draft.checked()
    quiet_libraries()
    with phase(found, "caching"):
        from lora_scripts import device, disk, memory_check
        from lora_scripts.tasks import build

        compute = device.choose("cpu", "no")
        disk.check(settings, rows)
        memory_check.before(settings, rows, compute)
        task = build.build(settings, rows, compute)
        task.encode(lambda what, done, total: None)
    with phase(found, "training"):
        from lora_scripts import batch_size
        from lora_scripts.training import loop

        task.attach()
        batch_size.tried(task, settings, compute, may_shrink=False)
        settings.output_dir.mkdir(parents=True)
        loop.train(task, settings, compute, settings.output_dir, lambda path, place: [], None)
    print(json.dumps(found))


@contextmanager
def phase(found: dict[str, Any], name: str) -> Iterator[None]:
    """Seconds, and the most memory in bytes, of what is done within this context."""
    tracemalloc.reset_peak()
    ended, most = threading.Event(), [anonymous()]

    def watch() -> None:
        while not ended.wait(0.02):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - began
        ended.set()
        watcher.join()
    peak = max(most[0], anonymous())
    if tracemalloc.is_tracing():
        peak = tracemalloc.get_traced_memory()[1]
    found[name] = {"seconds": seconds, "peak": peak}


def anonymous() -> int:
    """Bytes of this process that are no pages of files, in memory or swapped out."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return sum(int(number) << 10 for number in re.findall(r"(?:RssAnon|VmSwap):\s+(\d+) kB", text))


# --- what is generated ----------------------------------------------------------------------------


def texts(kind: str, count: int, folder: Path) -> dict[str, Any]:
    """Short rows in made-up words, none like another, and a toy model: a config's keys."""
    from tests import text_toys

    folder.mkdir(parents=True)
    dice = random.Random(count)
    words = made_up_words(dice)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(count):
            asked, said = (" ".join(dice.choices(words, k=5)) for _ in range(2))
            turns = [{"role": "user", "content": f"{asked}?"},
                     {"role": "assistant", "content": f"{said}."}]  # fmt: skip
            row = {"messages": turns} if kind == "conversations" else {"text": f"{asked} {said}."}
            file.write(json.dumps(row) + "\n")
    base = text_toys.save_model(folder / "base")
    return {
        **common(base, folder / "rows.jsonl", folder),
        "task_type": "text-generation",
        "max_seq_length": 256,
        "validation_split": 0.001,
    }


def pictures(count: int, folder: Path) -> dict[str, Any]:
    """Pictures of noise with captions of their own, and a toy model: a config's keys."""
    import numpy as np
    from PIL import Image

    from tests import toys

    data = folder / "pictures"
    data.mkdir(parents=True)
    dice, noise = random.Random(count), np.random.default_rng(count)
    words = made_up_words(dice)
    lines = ["file_name,text"]
    for number in range(count):
        Image.fromarray(noise.integers(0, 256, (64, 64, 3), np.uint8)).save(
            data / f"{number:06d}.png"
        )
        lines.append(f"{number:06d}.png,{' '.join(dice.choices(words, k=3))}")
    (data / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    base = toys.save_stable_diffusion(folder / "base")
    return {**common(base, data, folder), "resolution": 64}


def made_up_words(dice: random.Random) -> list[str]:
    """Words of one to three syllables."""
    return [
        "".join(dice.choice("bcdfghklmnprstvw") + dice.choice("aeiou") for _ in range(length))
        for length in dice.choices((1, 2, 3), k=5000)
    ]


def common(base: Path, data: Path, folder: Path) -> dict[str, Any]:
    """The keys of both kinds."""
    return {
        "base_model": str(base),
        "train_data_dir": str(data),
        "output_dir": str(folder / "output"),
        "cache_dir": str(folder / "cache"),
        "batch_size": 4,
        "epochs": 1,
        "max_train_steps": STEPS,
        "lora_rank": 4,
        "device": "cpu",
        "mixed_precision": "no",
    }


if __name__ == "__main__":
    main()
