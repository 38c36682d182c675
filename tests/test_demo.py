"""What ships in assets/demo: small, real, readable by diffusers, and good to train on."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open

from lora_scripts import pipeline
from lora_scripts.config import load
from lora_scripts.data.records import read_images
from lora_scripts.device import Compute
from lora_scripts.models import sd
from lora_scripts.models.family import DrawRequest, Options
from lora_scripts.models.signature import read_signature
from tests import runs

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "assets" / "demo"


def test_the_model_is_small_and_in_fp16() -> None:
    files = [path for path in (DEMO / "model").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3
    for path in weights:
        with safe_open(path, framework="pt") as stored:
            assert {stored.get_tensor(key).dtype for key in stored.keys()} == {torch.float16}  # noqa: SIM118


def test_diffusers_loads_the_model_and_draws_with_it() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(str(DEMO / "model"), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    assert (config.prediction_type, config.timestep_spacing) == ("v_prediction", "trailing")
    assert config.rescale_betas_zero_snr and not config.clip_sample
    picture = pipe(
        "a drawing of a panda", num_inference_steps=20, guidance_scale=2.5,
        generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip
    light = torch.tensor(list(picture.convert("L").tobytes()))
    assert picture.size == (64, 64)
    assert (light > 230).float().mean() > 0.2  # white ground and face
    assert (light < 90).float().mean() > 0.05  # black ears and eyes


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_family_draws_what_diffusers_draws(precision: str) -> None:
    compute = Compute(torch.device("cpu"), precision)  # type: ignore[arg-type]
    family = sd.load(read_signature(DEMO / "model"), compute, Options())
    request = DrawRequest("a drawing of an apple", "", 2.5, 10, 64, 64, seed=3)
    drawn = torch.tensor(list(family.draw(request).tobytes())).float()
    pipe = StableDiffusionPipeline.from_pretrained(
        str(DEMO / "model"), dtype=torch.float32, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        request.prompt, num_inference_steps=10, guidance_scale=2.5,
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    difference = (drawn - torch.tensor(list(expected.tobytes())).float()).abs().mean()
    assert difference < (0.5 if precision == "no" else 12)


def test_the_data_are_80_stencils_and_40_other_names() -> None:
    records, problems = read_images(DEMO / "style_images", None)
    assert len(records) == 80 and not problems
    with (DEMO / "heldout.csv").open(encoding="utf-8", newline="") as stream:
        held_out = {row["file_name"] for row in csv.DictReader(stream)}
    assert len(held_out) == 40
    assert held_out.isdisjoint(record.name for record in records)
    for path in [*(record.file for record in records), *(DEMO / "heldout_images").glob("*.png")]:
        picture = Image.open(path).convert("RGB")
        assert picture.size == (64, 64)
        red, _, blue = (torch.tensor(list(band.tobytes())).int() for band in picture.split())
        assert (red - blue).abs().max() <= 8  # black and white


@pytest.mark.long
def test_the_demo_learns_in_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    prompts = load(Path("configs/demo_image.yaml")).sample_prompts
    quick = [{**prompt.model_dump(exclude_none=True), "steps": 3} for prompt in prompts]
    overrides = [
        f"output_dir={json.dumps(str(tmp_path / 'out'))}",
        f"cache_dir={json.dumps(str(tmp_path / 'cache'))}",
        "max_train_steps=16",
        "lr_warmup_steps=2",
        "sample_steps=16",
        f"sample_prompts={json.dumps(quick)}",
    ]
    assert pipeline.run(Path("configs/demo_image.yaml"), overrides) == pipeline.EXIT_DONE
    rows = [row for row in runs.metrics(tmp_path / "out") if "eval_loss" in row]
    assert rows[-1]["eval_loss"] < 0.9 * rows[0]["eval_loss"]
    assert len(list((tmp_path / "out" / "samples").glob("*.png"))) == 2 * len(prompts)
