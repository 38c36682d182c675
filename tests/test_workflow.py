"""The workflow that the product promises, word for word, as a person types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_scripts.models.signature import read_signature
from tests import toys
from tests.models.ldm_facts import TOY
from tests.models.ldm_toy import ldm_tensors, read_parts, toy_modules

ROOT = Path(__file__).parent.parent
# Random weights tell nothing on pure noise, so the header says what the toy predicts.
EPSILON = {"modelspec.prediction_type": "epsilon"}

# Only the checkpoint's size differs from what a person has: it is a toy, in the same layout.
PROMISED = """\
train_data_dir: "./data/style_train"
metadata_path: "./data/style_train/metadata.csv"
base_model: "./models/Stable-diffusion/v1-5-pruned.safetensors"
lora_rank: 8
batch_size: 4
epochs: 10
learning_rate: 2e-4
output_dir: "./output/my_style_lora"
save_steps: 100
"""


def command(
    folder: Path, *arguments: str, encoding: str = "utf-8"
) -> subprocess.CompletedProcess[str]:
    """A command typed in `folder`, offline, on a console with this encoding."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": encoding},
        capture_output=True,
        encoding=encoding,
        timeout=280,
        check=False,
    )


@pytest.mark.long
def test_the_promised_workflow(tmp_path: Path) -> None:
    data = toys.save_pictures(tmp_path / "data" / "style_train", count=2, side=512)
    rows = (data / "metadata.csv").read_text(encoding="utf-8").splitlines()[1:]
    rows[0] = 'img00.png,"cyberpunk cityscape with neon lights"'
    (data / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    checkpoint = tmp_path / "models" / "Stable-diffusion" / "v1-5-pruned.safetensors"
    checkpoint.parent.mkdir(parents=True)
    # no attention among the 64 × 64 pixels of the first level, which would take minutes
    widths = replace(TOY, unet_depths=(0, 1, 1, 0))
    save_file(ldm_tensors(toy_modules(widths), w=widths), checkpoint, EPSILON)
    (tmp_path / "my_style.yaml").write_text(PROMISED, encoding="utf-8")

    done = command(tmp_path, str(ROOT / "train.py"), "--config", "my_style.yaml")

    assert done.returncode == 0, done.stdout + done.stderr
    output = tmp_path / "output" / "my_style_lora"
    stored = load_file(output / "pytorch_lora_weights.safetensors")
    assert stored["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha"] == 8
    assert all(len(t) == 8 for key, t in stored.items() if key.endswith("lora_down.weight"))
    assert {path.name for path in output.iterdir()} >= {
        "my_style_lora.safetensors", "config.yaml", "run.json", "metrics.jsonl", "run.log",
        "tensorboard", "README.md", "checkpoints",
    }  # fmt: skip
    assert "Warning: That is little" in done.stdout
    assert not done.stderr, "libraries chatter"
    assert "10 steps of up to 4 samples, ended by epochs" in done.stdout
    pipeline = StableDiffusionPipeline(
        **read_parts(read_signature(checkpoint), torch.float32),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(str(output))
    assert len(pipeline.get_list_adapters()["unet"]) == 1


def test_chinese_names_all_the_way_on_a_chinese_console(tmp_path: Path) -> None:
    base = toys.save_stable_diffusion(tmp_path / "模型" / "基础 模型")
    data = toys.save_pictures(tmp_path / "数据" / "水墨 风格", count=2)
    (data / "img00.png").rename(data / "山水.png")
    (data / "metadata.csv").write_text("山水.png,一幅山水画\nimg01.png,é €\n", encoding="utf-8")
    toys.write_config(
        tmp_path / "配置.yaml", base_model=str(base.relative_to(tmp_path)), resolution=64,
        train_data_dir="数据/水墨 风格", output_dir="输出/我的风格", epochs=1, batch_size=2,
        sample_prompts=["一座山"], trigger_word="水墨",
    )  # fmt: skip
    done = command(tmp_path, str(ROOT / "train.py"), "--config", "配置.yaml", encoding="gbk")
    assert done.returncode == 0, done.stdout + done.stderr
    output = tmp_path / "输出" / "我的风格"
    assert "<lora:我的风格:0.8>" in done.stdout
    with safe_open(output / "我的风格.safetensors", framework="pt") as stored:
        assert stored.metadata()["ss_output_name"] == "我的风格"
    assert "python train.py --config 配置.yaml" in (output / "README.md").read_text(
        encoding="utf-8"
    )


def test_sample_draws_the_base_beside_the_lora(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    from tests import runs

    _, output = runs.run(sd_folder, pictures, tmp_path, epochs=20, learning_rate=0.05)
    drawn = tmp_path / "drawn" / "grid.png"
    lora = str(output)
    done = command(
        tmp_path, "-m", "lora_scripts", "sample", "--base", str(sd_folder),
        "--lora", f"{lora}:0", "--lora", f"{output / 'toy.safetensors'}:1.0", "--compare",
        "--prompt", "a square", "--prompt", "a circle", "--seed", "3", "--steps", "3",
        "--width", "64", "--height", "64", "--output", str(drawn),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    grid = Image.open(drawn).convert("RGB")
    cell, margin = 192, 8
    line = grid.height - 2 * cell - margin
    top = line // 3 * 2
    cells = [
        grid.crop((margin + i * (cell + margin), top, i * (cell + margin) + cell, top + cell - 40))
        for i in range(3)
    ]
    base, zero, full = (cell.tobytes() for cell in cells)
    assert base == zero
    assert base != full


def test_sample_says_what_is_wrong(sd_folder: Path, tmp_path: Path) -> None:
    done = command(
        tmp_path, "-m", "lora_scripts", "sample", "--base", str(sd_folder), "--prompt", "a",
        "--lora", "nowhere/x.safetensors:0.5", "--lora", "x.ckpt", "--output", "x.jpg",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "3 problems:"
    assert "Traceback" not in done.stderr


def test_a_trained_run_says_what_it_is_made_of(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    from lora_scripts.config import load
    from tests import runs

    _, output = runs.run(sd_folder, pictures, tmp_path, trigger_word="zwx", validation_split=0.2)
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert record["steps"] == 6
    assert record["largest_difference_after_reload"] < 1e-5
    assert set(record["held_out_loss"]) == {"first", "last"}
    assert record["versions"]["torch"].startswith("2.")
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "<lora:toy:0.8>" in card and "`zwx`" in card and "1 held out" in card
    assert load(output / "config.yaml").model_dump() == load(tmp_path / "run.yaml").model_dump()
