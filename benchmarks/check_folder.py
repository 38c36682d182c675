"""Time and peak memory of `lora-scripts check` on a folder of many pictures: the first, the second.

    python benchmarks/check_folder.py FOLDER [--count 10000]

FOLDER is filled with generated pictures (generated_folder.py) and a metadata.csv, and the memory of
an earlier check there is removed. Each check is a process of its own, as it is typed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from generated_folder import generate

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """\
base_model: someone/a-model
train_data_dir: {folder}
output_dir: {work}/output
cache_dir: {work}/cache
resolution: 256
"""
COLOURS = ("red", "green", "blue", "grey", "golden")
THINGS = ("house", "boat", "bridge", "lamp", "tree", "hill", "cloud")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    config = prepare(folder, arguments.count)
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{arguments.count:,} pictures, {megabytes:,.0f} MB, {os.cpu_count()} cores")
    for name in ("first", "second"):
        seconds, peak, warnings = checked(config)
        print(f"{name} check: {seconds:6.1f} s, peak {peak:,.0f} MB, {warnings} warnings")


def prepare(folder: Path, count: int) -> Path:
    """Pictures with captions, and a config for them; no memory of them."""
    generate(folder, count)
    rows = [
        f'{path.name},"a {COLOURS[n % 5]} {THINGS[n % 7]}, drawing {n}, soft light"'
        for n, path in enumerate(sorted(folder.glob("*.[pj][np]g")))
    ]
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    work = folder.with_name(f"{folder.name}_check")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    config = work / "check.yaml"
    config.write_text(CONFIG.format(folder=folder, work=work), encoding="utf-8")
    return config


def checked(config: Path) -> tuple[float, float, int]:
    """Seconds, megabytes at the peak, and warnings of one check in a process of its own."""
    command = [sys.executable, "-m", "lora_scripts", "check", "--config", str(config), "--json"]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    assert os.waitstatus_to_exitcode(status) == 0, said.decode("utf-8")
    return seconds, peak_megabytes(usage), len(json.loads(said)["warnings"])


def peak_megabytes(usage: resource.struct_rusage) -> float:
    """Linux counts in KiB, macOS in bytes."""
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3 / 1.024)


if __name__ == "__main__":
    main()
