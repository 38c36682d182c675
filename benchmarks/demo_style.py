"""Does the demo LoRA bring its style, and does it keep the content? Measured on unseen names.

    python scripts/demo_drawings.py draw
    python train.py --config configs/demo_image.yaml
    python benchmarks/demo_style.py [--lora output/demo_image] [--drawings build/drawings]

For the 40 names of `assets/demo/heldout.csv`, which the LoRA has not been trained on, and 4 seeds
each, it draws the base and the base with the LoRA, and prints

* style distance: Fréchet distance between colour and edge statistics of the pictures and of the
  real drawings of the style (in deviations over all drawings of six styles), and the mean
  probability that a classifier of six styles gives to another style. The classifier saw none of
  the 120 names of the LoRA's data;
* content: how often a concept classifier, trained on the other hands only, names the thing among
  120 names; beside it the same for real drawings of the style, which is as good as it gets;
* variety: the mean distance between pictures of different names, against that of real drawings.

Shapes: N pictures, H W height and width, C colours, F features.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lora_scripts.device import choose
from lora_scripts.logs import quiet_libraries
from lora_scripts.models import lora_file
from lora_scripts.models.family import DrawRequest, ImageFamily
from lora_scripts.tasks import build

SEEDS = (1, 2, 3, 4)
STEPS, GUIDANCE, SIDE = 25, 2.5, 64
STYLE = "stencil"
STYLE_EPOCHS, CONCEPT_STEPS, BATCH = 6, 1500, 64


@dataclass(frozen=True)
class Drawings:
    """Pictures (N, H, W, C, uint8) with the style and the name of each."""

    pixels_NHWC: np.ndarray
    styles: np.ndarray
    names: np.ndarray

    def where(self, mask: np.ndarray) -> Drawings:
        return Drawings(self.pixels_NHWC[mask], self.styles[mask], self.names[mask])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="assets/demo/model")
    parser.add_argument("--lora", type=Path, default=Path("output/demo_image"))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--drawings", type=Path, default=Path("build/drawings"))
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    quiet_libraries()
    started = time.time()

    drawings = read_drawings(arguments.drawings)
    held_out = read_captions(Path("assets/demo/heldout.csv"))
    trained = read_captions(Path("assets/demo/style_images/metadata.csv"))
    known = sorted({*held_out, *trained})
    real = drawings.where((drawings.styles == STYLE) & np.isin(drawings.names, list(held_out)))

    style_of = train_style_classifier(drawings.where(~np.isin(drawings.names, known)))
    others = drawings.where((drawings.styles != STYLE) & np.isin(drawings.names, known))
    name_of = train_concept_classifier(others, known)

    family = build.load_family(build.find_base(arguments.base), choose("auto", "auto"))
    sets = {"base": draw_all(family, held_out)}
    lora_file.put_on(family, [(arguments.lora, arguments.scale)])
    sets["base + LoRA"] = draw_all(family, held_out)
    sets["real drawings of the style"] = real
    scale_F = features(drawings.pixels_NHWC).std(axis=0)
    rows = {
        label: measure(pictures, real, style_of, name_of, known, scale_F)
        for label, pictures in sets.items()
    }
    report(rows, time.time() - started)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def read_drawings(folder: Path) -> Drawings:
    """All drawings that `scripts/demo_drawings.py draw` made."""
    from PIL import Image

    with (folder / "drawings.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    pixels = [np.asarray(Image.open(folder / row["file"]).convert("RGB")) for row in rows]
    return Drawings(
        np.stack(pixels),
        np.array([row["style"] for row in rows]),
        np.array([row["name"] for row in rows]),
    )


def read_captions(path: Path) -> dict[str, str]:
    """Name of the thing -> caption."""
    with path.open(encoding="utf-8", newline="") as stream:
        return {Path(row["file_name"]).stem: row["text"] for row in csv.DictReader(stream)}


def draw_all(family: ImageFamily, captions: dict[str, str]) -> Drawings:
    """Every caption at every seed."""
    pictures, names = [], []
    for name, caption in captions.items():
        for seed in SEEDS:
            request = DrawRequest(caption, "", GUIDANCE, STEPS, SIDE, SIDE, seed)
            pictures.append(np.asarray(family.draw(request)))
            names.append(name)
    return Drawings(np.stack(pictures), np.array(["drawn"] * len(names)), np.array(names))


def measure(
    pictures: Drawings,
    real: Drawings,
    style_of: nn.Module,
    name_of: nn.Module,
    known: list[str],
    scale_F: np.ndarray,
) -> dict[str, float]:
    """The figures of one set of pictures; `scale_F` is the unit of each statistic."""
    with torch.no_grad():
        style_NF = style_of(to_tensor(pictures.pixels_NHWC)).softmax(dim=1)
        name_NF = name_of(luminance(to_tensor(pictures.pixels_NHWC)))
    truth_N = torch.tensor([known.index(name) for name in pictures.names])
    top5_N5 = name_NF.topk(5, dim=1).indices
    return {
        "statistics_distance": frechet(
            features(pictures.pixels_NHWC), features(real.pixels_NHWC), scale_F
        ),
        "other_style_probability": 1 - style_NF[:, -1].mean().item(),
        "classified_as_style": (style_NF.argmax(dim=1) == style_NF.shape[1] - 1)
        .float()
        .mean()
        .item(),
        "named": (top5_N5[:, 0] == truth_N).float().mean().item(),
        "named_in_five": (top5_N5 == truth_N[:, None]).any(dim=1).float().mean().item(),
        "variety": variety(pictures),
    }


def report(rows: dict[str, dict[str, float]], seconds: float) -> None:
    """The figures as a Markdown table, and the ratios that the demo must reach."""
    keys = list(next(iter(rows.values())))
    print("| pictures | " + " | ".join(key.replace("_", " ") for key in keys) + " |")
    print("|---" * (len(keys) + 1) + "|")
    for label, figures in rows.items():
        print(f"| {label} | " + " | ".join(f"{figures[key]:.3f}" for key in keys) + " |")
    base, lora, real = rows.values()
    print()
    print(f"statistics distance, LoRA / base: {ratio(lora, base, 'statistics_distance'):.3f}")
    print(f"other style, LoRA / base: {ratio(lora, base, 'other_style_probability'):.3f}")
    print(f"named, LoRA / base: {ratio(lora, base, 'named'):.3f}")
    print(f"named, LoRA / real drawings of the style: {ratio(lora, real, 'named'):.3f}")
    print(f"variety, LoRA / real drawings of the style: {ratio(lora, real, 'variety'):.3f}")
    print(f"({seconds:.0f} s)")


def ratio(one: dict[str, float], other: dict[str, float], key: str) -> float:
    return one[key] / other[key]


# --- statistics ---------------------------------------------------------------------------------


def features(pixels_NHWC: np.ndarray) -> np.ndarray:
    """Colour and edge statistics, shape (N, 10): nothing in them says what is drawn."""
    rgb = pixels_NHWC.astype(np.float64) / 255
    high, low = rgb.max(axis=3), rgb.min(axis=3)
    saturation = (high - low) / np.maximum(high, 1e-6)
    light = rgb @ np.array([0.299, 0.587, 0.114])
    across = np.abs(np.diff(light, axis=2))[:, :-1]
    down = np.abs(np.diff(light, axis=1))[:, :, :-1]
    edge = np.hypot(across, down)

    def share(mask: np.ndarray) -> np.ndarray:
        return mask.mean(axis=(1, 2))

    return np.stack(
        [
            share(light < 0.2),
            share((light >= 0.2) & (light < 0.8)),
            share(light >= 0.8),
            (saturation * (high > 0.1)).mean(axis=(1, 2)),
            share((saturation > 0.25) & (high > 0.15)),
            light.std(axis=(1, 2)),
            edge.mean(axis=(1, 2)),
            share(edge > 0.5),
            share((edge > 0.03) & (edge < 0.3)),
            np.quantile(light.reshape(len(light), -1), 0.05, axis=1),
        ],
        axis=1,
    )


def frechet(found_NF: np.ndarray, real_NF: np.ndarray, scale_F: np.ndarray) -> float:
    """Fréchet distance of two Gaussians (Dowson & Landau 1982)."""
    one, other = found_NF / scale_F, real_NF / scale_F
    mean = np.square(one.mean(axis=0) - other.mean(axis=0)).sum()
    cov_one, cov_other = np.cov(one.T), np.cov(other.T)
    eigenvalues = np.linalg.eigvals(cov_one @ cov_other).real.clip(min=0)
    spread = np.trace(cov_one) + np.trace(cov_other) - 2 * np.sqrt(eigenvalues).sum()
    return float(np.sqrt(mean + max(spread, 0.0)))


def variety(pictures: Drawings) -> float:
    """Mean L2 distance of coarse (16×16) pictures between different names, in [0, 1] a pixel."""
    small = F.avg_pool2d(luminance(to_tensor(pictures.pixels_NHWC)), 4).flatten(1)
    distance_NN = torch.cdist(small, small) / small.shape[1] ** 0.5
    different = torch.tensor(pictures.names[:, None] != pictures.names[None, :])
    return distance_NN[different].mean().item()


# --- classifiers --------------------------------------------------------------------------------


def to_tensor(pixels_NHWC: np.ndarray) -> torch.Tensor:
    """uint8 NHWC -> float32 NCHW in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels_NHWC)).permute(0, 3, 1, 2).float() / 255


def luminance(pixels_NCHW: torch.Tensor) -> torch.Tensor:
    """Shape (N, 1, H, W)."""
    weights_C = torch.tensor([0.299, 0.587, 0.114])
    return torch.einsum("nchw,c->nhw", pixels_NCHW, weights_C)[:, None]


def network(inputs: int, classes: int, width: int) -> nn.Module:
    """A small convolutional classifier of 64-pixel pictures."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, width, 5, stride=2, padding=2), nn.ReLU()]
    channels = width
    for level in range(3):
        out = width * 2**level
        for _ in range(2):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers,
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(channels * 4, classes),
    )


def train_style_classifier(drawings: Drawings) -> nn.Module:
    """Six styles, the LoRA's last, from drawings of names that are not in the LoRA's data."""
    styles = [*sorted(set(drawings.styles) - {STYLE}), STYLE]
    labels_N = torch.tensor([styles.index(style) for style in drawings.styles])
    steps = STYLE_EPOCHS * len(labels_N) // BATCH
    return fit(network(3, len(styles), 16), to_tensor(drawings.pixels_NHWC), labels_N, steps, moved)


def train_concept_classifier(drawings: Drawings, known: list[str]) -> nn.Module:
    """120 names from the five other hands; light only, and much disturbed, so that neither colour
    nor shading nor line is needed to know a thing."""
    labels_N = torch.tensor([known.index(name) for name in drawings.names])
    pictures_N1HW = luminance(to_tensor(drawings.pixels_NHWC))
    return fit(
        network(1, len(known), 24),
        pictures_N1HW,
        labels_N,
        CONCEPT_STEPS,
        lambda pixels: restyled(moved(pixels)),
    )


def fit(
    model: nn.Module,
    pictures_NCHW: torch.Tensor,
    labels_N: torch.Tensor,
    steps: int,
    disturb: Callable[[torch.Tensor], torch.Tensor],
) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(labels_N), (BATCH,))
        logits = model(disturb(pictures_NCHW[chosen]))
        loss = F.cross_entropy(logits, labels_N[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def moved(pixels_NCHW: torch.Tensor) -> torch.Tensor:
    """Each picture mirrored, turned, scaled and shifted a little, on white."""
    count = len(pixels_NCHW)
    angle = (torch.rand(count) - 0.5) * 0.5
    size = 0.85 + 0.4 * torch.rand(count)
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    shift = (torch.rand(count, 2) - 0.5) * 0.2
    turn = torch.stack(
        [
            torch.stack([angle.cos() * size * mirror, -angle.sin() * size, shift[:, 0]], dim=1),
            torch.stack([angle.sin() * size * mirror, angle.cos() * size, shift[:, 1]], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(turn, list(pixels_NCHW.shape), align_corners=False)
    return 1 - F.grid_sample(1 - pixels_NCHW, grid, align_corners=False)


def restyled(light_N1HW: torch.Tensor) -> torch.Tensor:
    """Each picture in another manner: as it is, flattened to black and white, as lines, as a
    silhouette with lines left out, or with other contrast."""
    manners = [
        light_N1HW,
        light_N1HW.pow(0.5 + torch.rand(len(light_N1HW), 1, 1, 1) * 2),
        threshold(light_N1HW, torch.rand(len(light_N1HW), 1, 1, 1) * 0.6 + 0.3),
        1 - edges(light_N1HW),
        threshold(light_N1HW, torch.full((1, 1, 1, 1), 0.93)) + edges(light_N1HW),
    ]
    choice = torch.randint(len(manners), (len(light_N1HW),))
    stacked = torch.stack(manners).clamp(0, 1)
    return stacked[choice, torch.arange(len(light_N1HW))]


def threshold(light_N1HW: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    return ((light_N1HW - level) * 12 + 0.5).clamp(0, 1)


def edges(light_N1HW: torch.Tensor) -> torch.Tensor:
    """Bright where the light changes."""
    widest = F.max_pool2d(light_N1HW, 3, 1, 1) + F.max_pool2d(-light_N1HW, 3, 1, 1)
    return (widest * 3).clamp(0, 1)


if __name__ == "__main__":
    main()
