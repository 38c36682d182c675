"""Real shapes with random weights: seconds a step and peak memory of a whole run.

    python benchmarks/image_shapes.py [--families sd1 sd2 sdxl] [--steps 3] [--device auto]

Each row is a whole run in a process of its own: load, encode, train, export, reload. Batch 1, rank
16 on attention. Peak memory is the process's largest resident set (Linux, macOS), and on CUDA the
largest reserved memory besides. Random weights cost what trained ones cost.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_scripts.logs import quiet_libraries
from lora_scripts.models.kinds import Family
from lora_scripts.models.packaged import END, ZERO, clip_tokenizer, packaged_config

ROOT = Path(__file__).resolve().parent.parent
# resolution, precision, gradient checkpointing
ROWS: dict[Family, tuple[tuple[int, str, bool], ...]] = {
    "sd1": ((512, "auto", False), (512, "auto", True), (768, "auto", True)),
    "sd2": ((768, "auto", True),),
    "sdxl": ((1024, "auto", True),),
}
NAMES: dict[Family, str] = {"sd1": "SD1.5", "sd2": "SD2.1", "sdxl": "SDXL"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    quiet_libraries()
    print("| model | resolution | precision | checkpointing | s/step | peak memory |")
    print("|---|---|---|---|---|---|")
    for family in arguments.families:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_base(folder / "base", family)
            gc.collect()  # the parts refer to each other
            for line in ROWS[family]:
                figures = row(folder, *line, arguments)
                print(f"| {NAMES[family]} {figures}", flush=True)


def save_base(folder: Path, family: Family) -> None:
    """A diffusers folder of a family's exact shapes in float16, part by part."""
    torch.manual_seed(0)

    def half(cls: Any, part: str) -> Any:
        config = packaged_config(family, part)
        if part.startswith("text"):
            return cls(CLIPTextConfig(**config)).half()
        return cls.from_config(config).half()

    parts: dict[str, Any] = {
        "unet": half(UNet2DConditionModel, "unet"),
        "vae": half(AutoencoderKL, "vae"),
        "text_encoder": half(CLIPTextModel, "text_encoder"),
        "tokenizer": clip_tokenizer(ZERO if family == "sd2" else END),
    }
    schedule = packaged_config(family, "scheduler")
    if family == "sdxl":
        pipeline = StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=half(CLIPTextModelWithProjection, "text_encoder_2"),
            tokenizer_2=clip_tokenizer(ZERO),
            scheduler=EulerDiscreteScheduler.from_config(schedule),
            add_watermarker=False,
        )
    else:
        sampler = PNDMScheduler if family == "sd1" else DDIMScheduler
        pipeline = StableDiffusionPipeline(
            **parts,
            scheduler=sampler.from_config(schedule),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(str(folder))


def row(
    folder: Path,
    resolution: int,
    precision: str,
    checkpointing: bool,
    arguments: argparse.Namespace,
) -> str:
    """One run; its line of the table without the first cell."""
    data = folder / f"pictures-{resolution}"
    data.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (resolution, resolution, 3), np.uint8)
    Image.fromarray(noise).save(data / "a.png")
    (data / "metadata.csv").write_text("a.png,noise\n", encoding="utf-8")
    output = folder / f"output-{resolution}-{checkpointing}"
    keys = {
        "base_model": folder / "base",
        "train_data_dir": data,
        "output_dir": output,
        "cache_dir": folder / "cache",
        "resolution": resolution,
        "mixed_precision": precision,
        "gradient_checkpointing": str(checkpointing).lower(),
        "epochs": arguments.steps,
        "device": arguments.device,
    }
    config = folder / "run.yaml"
    config.write_text("\n".join(f"{k}: {v}" for k, v in keys.items()) + "\n", encoding="utf-8")
    # A child of a child, so that its largest resident set is not mixed with the other rows'.
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "-c", RUN, "train", "--config", str(config)],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    peak = int(done.stdout.splitlines()[-1]) * (1 if sys.platform == "darwin" else 1024)
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    times = [row["time"] for row in map(json.loads, lines) if "loss" in row]
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    seconds = (times[-1] - times[0]) / (len(times) - 1)
    reserved = record.get("cuda_peak_reserved_bytes")
    memory = f"{peak / 2**30:.2f} GiB" + (f", {reserved / 2**30:.2f} GiB CUDA" if reserved else "")
    return f"| {resolution} | {record['precision']} | {checkpointing} | {seconds:.2f} | {memory} |"


# `train.py`, with one forward pass in a measurement of the loss in place of 16: they are not timed.
RUN = """
from lora_scripts import cli
from lora_scripts.tasks import diffusion
diffusion.MEASURED_VIEWS = 1
cli.main()
"""
MEASURE = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


if __name__ == "__main__":
    main()
