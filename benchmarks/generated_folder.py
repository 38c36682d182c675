"""A folder of many small pictures, each another, made in seconds: for measuring what reads folders.

    python benchmarks/generated_folder.py FOLDER [--count 10000]

PNG and JPEG by turns, landscape, square and portrait, 192 to 320 pixels: gradients with a few
shapes and some grain, so that files are as hard to decode as pictures are, 40 KB on average.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZES = ((320, 240), (256, 256), (224, 320), (192, 192))  # (width, height)


def generate(folder: Path, count: int, workers: int | None = None) -> Path:
    """Fill `folder` with pictures `00000.png`, `00001.jpg` …; those that are there are left."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(partial(_save, folder), range(count), chunksize=64))
    return folder


def picture(number: int) -> Image.Image:
    """The picture of this number, a function of it alone."""
    random = np.random.default_rng(number)
    width, height = SIZES[number % len(SIZES)]
    corners = Image.fromarray(random.integers(0, 256, (2, 3, 3), np.uint8))
    image = corners.resize((width, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        left, right = sorted(int(x) for x in random.integers(0, width, 2))
        top, bottom = sorted(int(y) for y in random.integers(0, height, 2))
        colour = tuple(int(level) for level in random.integers(0, 256, 3))
        draw.ellipse((left, top, right + 1, bottom + 1), fill=colour)
    grain_HW = random.integers(-3, 4, (height, width), np.int16)
    pixels_HWC = np.asarray(image).astype(np.int16) + grain_HW[:, :, None]
    return Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8))


def _save(folder: Path, number: int) -> None:
    suffix = "png" if number % 2 == 0 else "jpg"
    path = folder / f"{number:05d}.{suffix}"
    if not path.exists():
        options = {"compress_level": 1} if suffix == "png" else {"quality": 85}
        picture(number).save(path, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    arguments = parser.parse_args()
    generate(arguments.folder, arguments.count)


if __name__ == "__main__":
    main()
