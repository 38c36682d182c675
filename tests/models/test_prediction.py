"""What a model predicts: by the keys, by what its files say, by a trial; and zero terminal SNR."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from safetensors.torch import save_file

from lora_scripts.device import Compute
from lora_scripts.errors import UserError
from lora_scripts.models import latents, prediction, sd, sdxl
from lora_scripts.models.family import DrawRequest, ImageFamily, Options
from lora_scripts.models.prediction import Said
from lora_scripts.tasks import build
from tests import toys
from tests.models.ldm_toy import ldm_tensors, toy_modules

CPU = Compute(torch.device("cpu"), "no")
NOTHING = Said()
DEMO = Path("assets/demo/model")


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def silent(parts: Any, options: Options | None = None) -> ImageFamily:
    """A model whose files say nothing."""
    return sd.StableDiffusion("sd1", parts, CPU, options or Options(), NOTHING)


def test_the_demos_v_model_is_told_by_a_trial(log: pytest.LogCaptureFixture) -> None:
    parts = StableDiffusionPipeline.from_pretrained(str(DEMO)).components
    assert silent(parts).prediction == "v_prediction"
    assert "prediction_type: v_prediction, by a trial on pure noise" in log.text


def test_an_epsilon_model_is_told_by_a_trial() -> None:
    parts = toys.stable_diffusion_parts()
    unet: Any = parts["unet"]
    learn_to_name_the_noise(unet)
    assert silent(parts).prediction == "epsilon"


def test_an_sdxl_epsilon_model_is_told_by_a_trial() -> None:
    parts: Any = toys.sdxl_parts()
    learn_to_name_the_noise(
        parts["unet"],
        {"text_embeds": torch.zeros(8, toys.WIDTH_2), "time_ids": torch.full((8, 6), 64.0)},
    )
    family = sdxl.StableDiffusionXL(parts, CPU, Options(), NOTHING, zeros_for_empty=True)
    assert family.prediction == "epsilon"


def learn_to_name_the_noise(unet: UNet2DConditionModel, added: Any = None) -> None:
    """Train a toy until it returns what it was given at the last timestep."""
    torch.manual_seed(0)
    unet.requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=5e-3)
    for _ in range(60):
        noise_BCHW = torch.randn(8, 4, 8, 8)
        states_BSD = torch.randn(8, 7, unet.config.cross_attention_dim)
        output_BCHW = unet(noise_BCHW, 999, states_BSD, added_cond_kwargs=added).sample
        loss = (output_BCHW - noise_BCHW).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_model_that_tells_nothing_is_an_error_that_names_the_key() -> None:
    parts = toys.stable_diffusion_parts()
    with pytest.raises(UserError, match=r"prediction_type: found auto.*write prediction_type: eps"):
        silent(parts)
    assert silent(parts, Options(prediction_type="epsilon")).prediction == "epsilon"


def test_answers_to_noise_are_judged_by_what_they_would_mean() -> None:
    noise, other = torch.randn(2, 2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    picture = torch.nn.functional.avg_pool2d(other, 9, stride=1, padding=4) * 6
    assert prediction.judge(noise, noise + 0.1 * other) == "epsilon"
    assert prediction.judge(noise, 0.07 * noise - picture) == "v_prediction"
    assert prediction.judge(noise, -picture) == "v_prediction"
    assert prediction.judge(noise, other) is None
    assert prediction.judge(noise, 0.6 * noise - picture) is None
    assert prediction.judge(noise, torch.zeros_like(noise)) is None
    assert prediction.judge(noise, torch.full_like(noise, torch.nan)) is None


@pytest.mark.parametrize("told", ["epsilon", "v_prediction"])
def test_a_folders_config_is_believed(
    tmp_path: Path, told: str, log: pytest.LogCaptureFixture
) -> None:
    family = load(toys.save_stable_diffusion(tmp_path, prediction_type=told))
    assert family.prediction == told
    assert f"prediction_type: {told}, by scheduler/scheduler_config.json" in log.text


def test_a_key_wins_over_the_config_and_a_contradiction_is_told(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    base = toys.save_stable_diffusion(tmp_path)
    load(base, prediction_type="epsilon")
    assert not [record for record in log.records if record.levelname == "WARNING"]
    family = load(base, prediction_type="v_prediction")
    assert family.prediction == "v_prediction"
    assert (
        "v_prediction is taken, as told; but scheduler/scheduler_config.json says eps" in log.text
    )
    assert family.metadata()["modelspec.prediction_type"] == "v"


def test_zero_terminal_snr_rescales_the_schedule_as_the_paper_does(tmp_path: Path) -> None:
    base = toys.save_stable_diffusion(tmp_path)
    plain = load(base)
    scaled = load(base, prediction_type="v_prediction", zero_terminal_snr=True)
    betas = DDPMScheduler.from_config(plain.scheduler.config).betas
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    torch.testing.assert_close(scaled.alphas_cumprod_T, expected)
    assert plain.alphas_cumprod_T[-1].item() == pytest.approx(0.00466, abs=1e-5)
    assert scaled.alphas_cumprod_T[-1].item() == 0
    assert scaled.alphas_cumprod_T[0].item() == pytest.approx(0.99915, abs=1e-5)
    assert plain.metadata()["ss_zero_terminal_snr"] == "False"
    assert scaled.metadata()["ss_zero_terminal_snr"] == "True"


def test_a_sampler_that_cannot_begin_in_pure_noise_becomes_ddim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy's own PNDM cannot; drawn is what diffusers draws with that DDIM."""
    base = toys.save_stable_diffusion(tmp_path)
    family = load(base, prediction_type="v_prediction", zero_terminal_snr=True)
    pipeline = StableDiffusionPipeline.from_pretrained(str(base))
    pipeline.scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip
    expected = pipeline(
        "a cat", width=64, height=64, num_inference_steps=4, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3), output_type="latent",
    ).images  # fmt: skip
    drawn = []
    monkeypatch.setattr(latents, "decode", lambda vae, found: drawn.append(found))
    family.draw(DrawRequest("a cat", "", 4.0, 4, 64, 64, 3))
    torch.testing.assert_close(drawn[0], expected, rtol=1e-4, atol=1e-4)


def test_a_sampler_that_can_is_kept_and_false_undoes_it(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    base = toys.save_sdxl(tmp_path, prediction_type="v_prediction", zero_snr=True)
    found = build.find_base(str(base))
    family: Any = sdxl.load(found, CPU, Options())
    assert isinstance(family.scheduler, EulerDiscreteScheduler)
    assert family.alphas_cumprod_T[-1].item() == 0
    assert "zero_terminal_snr: true, by scheduler/scheduler_config.json" in log.text
    undone: Any = sdxl.load(found, CPU, Options(zero_terminal_snr=False))
    assert undone.alphas_cumprod_T[-1].item() == pytest.approx(0.00466, abs=1e-5)
    assert "zero_terminal_snr: false is taken, as told; but" in log.text


def test_noise_prediction_with_zero_terminal_snr_is_refused_by_both_keys(tmp_path: Path) -> None:
    base = toys.save_stable_diffusion(tmp_path)
    with pytest.raises(UserError, match="zero_terminal_snr: found true with prediction_type eps"):
        load(base, zero_terminal_snr=True)


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, torch.Tensor]:
    """The tensors of a toy's single file; they say nothing of what it predicts."""
    return ldm_tensors(toy_modules())


def test_a_single_file_is_believed_by_its_marks(
    tmp_path: Path, checkpoint: dict[str, torch.Tensor], log: pytest.LogCaptureFixture
) -> None:
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(checkpoint | marks, tmp_path / "noobai.safetensors")
    family = load(tmp_path / "noobai.safetensors")
    assert family.prediction == "v_prediction"
    assert family.alphas_cumprod_T[-1].item() == 0
    assert isinstance(family.scheduler, DDIMScheduler)
    assert "prediction_type: v_prediction, by the file's tensor v_pred" in log.text
    assert "zero_terminal_snr: true, by the file's tensor ztsnr" in log.text


def test_a_single_file_is_believed_by_its_header_and_else_tried(
    tmp_path: Path, checkpoint: dict[str, torch.Tensor]
) -> None:
    told = {"modelspec.prediction_type": "epsilon"}
    save_file(checkpoint, tmp_path / "told.safetensors", metadata=told)
    family = load(tmp_path / "told.safetensors")
    assert family.prediction == "epsilon"
    assert family.alphas_cumprod_T[-1].item() > 0
    save_file(checkpoint, tmp_path / "silent.safetensors")
    with pytest.raises(UserError, match="prediction_type: found auto, but neither"):
        load(tmp_path / "silent.safetensors")


def load(base: Path, **options: Any) -> Any:
    return build.load_family(build.find_base(str(base)), CPU, Options(**options))
