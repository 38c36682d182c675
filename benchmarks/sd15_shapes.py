"""SD1.5's real shapes with random weights: seconds a step and peak memory of a whole run.

    python benchmarks/sd15_shapes.py [--steps 3] [--device auto]

Each row is `train.py` in a process of its own: load, encode, train, export, reload. Batch 1, rank
16 on attention. Peak memory is the process's largest resident set (Linux, macOS), and on CUDA the
largest reserved memory besides. Random weights cost what trained ones cost.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from lora_scripts.models.packaged import clip_tokenizer, packaged_config

ROOT = Path(__file__).resolve().parent.parent
ROWS = ((512, "auto", False), (512, "auto", True), (768, "auto", True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    print("| resolution | precision | checkpointing | s/step | peak memory |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_base(folder / "base")
        for resolution, precision, checkpointing in ROWS:
            print(row(folder, resolution, precision, checkpointing, arguments), flush=True)


def save_base(folder: Path) -> None:
    """A diffusers folder of SD1.5's exact shapes in float16."""
    torch.manual_seed(0)
    StableDiffusionPipeline(
        unet=UNet2DConditionModel.from_config(packaged_config("sd1", "unet")).half(),
        vae=AutoencoderKL.from_config(packaged_config("sd1", "vae")).half(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**packaged_config("sd1", "text_encoder"))).half(),
        tokenizer=clip_tokenizer(),
        scheduler=PNDMScheduler.from_config(packaged_config("sd1", "scheduler")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(str(folder))


def row(
    folder: Path,
    resolution: int,
    precision: str,
    checkpointing: bool,
    arguments: argparse.Namespace,
) -> str:
    """One run, one line of the table."""
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
        [sys.executable, "-c", MEASURE, str(ROOT / "train.py"), "--config", str(config)],
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


MEASURE = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


if __name__ == "__main__":
    main()
