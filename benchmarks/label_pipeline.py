"""How fast and how large is labelling's pipeline, without what a captioner costs?

    python benchmarks/label_pipeline.py [--count 10000] [--folder build/label_pipeline]

Generates a folder of pictures (`generated_folder.py`) and labels it with a captioner that only
names the mean colour: what is measured is listing, decoding, keeping every batch on the disk and
writing the captions file. Each run is a process of its own; its peak memory is what the system
counted for it. Prints lines of a Markdown table: the labelling, the same command once more (there
is nothing left to do), and the page of thumbnails.
"""

from __future__ import annotations

import argparse
import logging
import resource
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from generated_folder import generate
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def name_colours(images: Sequence[Image.Image]) -> list[str]:
    """A caption from the mean colour of each picture."""
    means = [image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) for image in images]
    return [f"a picture of the colour {red} {green} {blue}" for red, green, blue in means]


def label(
    folder: Path, review: Path | None, overwrite: bool, result: SimpleQueue[tuple[float, float]]
) -> None:
    """Label a folder; puts seconds and the peak of memory in MiB."""
    from lora_scripts.label import plan, run
    from lora_scripts.label.request import LabelRequest

    logging.basicConfig(level=logging.WARNING)
    request = LabelRequest(folder, model="demo", overwrite=overwrite, review=review)
    began = time.perf_counter()
    unreadable = run.label(plan.prepare(request), lambda: name_colours)
    assert not unreadable
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result.put((seconds, peak))


def measured(folder: Path, review: Path | None, *, overwrite: bool) -> tuple[float, float]:
    """Seconds and peak MiB of a labelling in a process of its own."""
    context = get_context("spawn")
    result: SimpleQueue[tuple[float, float]] = context.SimpleQueue()
    process = context.Process(target=label, args=(folder, review, overwrite, result))
    process.start()
    process.join()
    assert process.exitcode == 0
    return result.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "label_pipeline")
    arguments = parser.parse_args()
    folder = generate(arguments.folder / f"images-{arguments.count}", arguments.count)
    page = arguments.folder / "review.html"
    print(f"| {arguments.count:,} images | time | images/s | peak memory |")
    print("|---|---|---|---|")
    for what, review, overwrite in (
        ("labelling", None, True),
        ("the same command again", None, False),
        ("the page of thumbnails", page, False),
    ):
        seconds, peak = measured(folder, review, overwrite=overwrite)
        rate = arguments.count / seconds
        print(f"| {what} | {seconds:.1f} s | {rate:,.0f} | {peak:.0f} MiB |", flush=True)
    print(f"\nThe page has {page.stat().st_size / 1e6:.1f} MB.")


if __name__ == "__main__":
    sys.exit(main())
