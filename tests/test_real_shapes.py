"""SD1.5's real shapes with random weights: load, train, export, reload. Slow: `make test-slow`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lora_scripts.models.packaged import clip_tokenizer, packaged_config
from lora_scripts.tasks import diffusion
from tests import runs, toys


@pytest.fixture(scope="module")
def real_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of SD1.5's exact shapes, random weights in float16 (2.1 GB)."""
    from diffusers import PNDMScheduler

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "sd15"
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
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("resolution", [512, 768])
def test_sd15_at_real_size(
    real_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resolution: int
) -> None:
    monkeypatch.setattr(diffusion, "MEASURED_VIEWS", 2)
    data = toys.save_pictures(tmp_path / "data", count=2, side=resolution)
    code, output = runs.run(
        real_shapes, data, tmp_path,
        resolution=resolution, batch_size=1, epochs=1, mixed_precision="auto", max_train_steps=2,
        gradient_checkpointing=resolution > 512, learning_rate=1e-4,
    )  # fmt: skip
    assert code == 0
    rows = [row for row in runs.metrics(output) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert (output / "pytorch_lora_weights.safetensors").is_file()
