"""A model written as one checkpoint in the original layout, read back by us and by diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from lora_scripts.errors import UserError
from lora_scripts.models import lora
from lora_scripts.models.header import read_header, read_metadata
from lora_scripts.models.original_file import write_single_file
from lora_scripts.models.signature import read_signature
from tests.models import ldm_facts as facts
from tests.models.ldm_facts import TOY, TOY_2, TOY_XL
from tests.models.ldm_toy import ldm_tensors, read_parts, sd2_tensors, sdxl_tensors, toy_modules

WIDTHS = {"sd1": TOY, "sd2": TOY_2, "sdxl": TOY_XL}
TENSORS: dict[str, Any] = {"sd1": ldm_tensors, "sd2": sd2_tensors, "sdxl": sdxl_tensors}
NONE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def load(path: Path) -> Any:
    return read_parts(read_signature(path), torch.float32)


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / f"{request.param}.safetensors"
    save_file(TENSORS[request.param](toy_modules(WIDTHS[request.param])), path)
    return path


def pipeline(parts: Any) -> Any:
    if "text_encoder_2" in parts:
        return StableDiffusionXLPipeline(**parts)
    return StableDiffusionPipeline(**parts, **NONE)


def test_a_file_comes_back_as_it_was_but_for_ema_copies(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "again.safetensors"
    write_single_file(path, load(source), like=read_signature(source))
    before, after = load_file(source), load_file(path)
    kept = {name for name in before if not name.startswith("model_ema.")}
    assert after.keys() == kept
    for name in kept:
        assert torch.equal(before[name], after[name]) and before[name].shape == after[name].shape
    assert [file.name for file in tmp_path.iterdir()] == ["again.safetensors"]


def test_a_folder_as_one_file_is_read_by_diffusers_and_by_us(source: Path, tmp_path: Path) -> None:
    """diffusers' `from_single_file` takes the configs of the folder; weights are equal."""
    parts, path = load(source), tmp_path / "one.safetensors"
    made = pipeline(parts)
    made.save_pretrained(tmp_path / "folder")
    write_single_file(path, parts, like=read_signature(tmp_path / "folder"))
    ours = load(path)
    theirs = type(made).from_single_file(
        str(path), config=str(tmp_path / "folder"), local_files_only=True, torch_dtype=torch.float32
    )
    for part, module in parts.items():
        if isinstance(module, torch.nn.Module):
            reread = getattr(theirs, part).state_dict()
            for name, tensor in module.state_dict().items():
                assert torch.equal(ours[part].state_dict()[name], tensor), name
                assert torch.equal(reread[name], tensor), name
    names = facts.weights(WIDTHS[source.stem])
    assert read_header(path).keys() <= names.keys()
    assert {name: info.shape for name, info in read_header(path).items()}.items() <= names.items()


def test_types_are_those_of_the_base(tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    save_file(sdxl_tensors(toy_modules(TOY_XL), torch.float16), half)
    parts = load(half)
    write_single_file(tmp_path / "as_base.safetensors", parts, like=read_signature(half))
    types = {info.dtype for info in read_header(tmp_path / "as_base.safetensors").values()}
    assert types == {"F16", "I64"}
    before, after = load_file(half), load_file(tmp_path / "as_base.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    write_single_file(
        tmp_path / "bf16.safetensors", parts, like=read_signature(half), dtype=torch.bfloat16
    )
    header = read_header(tmp_path / "bf16.safetensors")
    taken_over = {name for name, info in header.items() if info.dtype != "BF16"}
    assert taken_over == {facts.POSITION_IDS_XL, "conditioner.embedders.1.model.logit_scale"}
    pipeline(parts).to(torch.float16).save_pretrained(tmp_path / "folder", variant="fp16")
    found = read_signature(tmp_path / "folder")
    write_single_file(tmp_path / "of_folder.safetensors", load(half), like=found)
    header = read_header(tmp_path / "of_folder.safetensors")
    assert {info.dtype for info in header.values()} == {"F16"}


@pytest.mark.parametrize(
    ("family", "prediction", "zero_snr", "marks", "architecture"),
    [
        ("sd1", "epsilon", False, set(), "stable-diffusion-v1"),
        ("sd1", "v_prediction", True, {"v_pred", "ztsnr"}, "stable-diffusion-v1"),
        ("sd2", "epsilon", False, set(), "stable-diffusion-v2-512"),
        ("sd2", "v_prediction", False, set(), "stable-diffusion-v2-768-v"),
        ("sdxl", "v_prediction", False, {"v_pred"}, "stable-diffusion-xl-v1-base"),
    ],
)
def test_what_it_predicts_is_written_and_read(
    tmp_path: Path, family: str, prediction: str, zero_snr: bool, marks: set[str], architecture: str
) -> None:
    base, path = tmp_path / "base.safetensors", tmp_path / "written.safetensors"
    save_file(TENSORS[family](toy_modules(WIDTHS[family])), base)
    parts = load(base)
    parts["scheduler"] = DDIMScheduler(prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    write_single_file(path, parts, like=read_signature(base))
    assert read_header(path).keys() & {"v_pred", "ztsnr"} == marks
    metadata = read_metadata(path)
    assert metadata["modelspec.architecture"] == architecture
    assert metadata["modelspec.title"] == "written"
    said = read_signature(path).marks
    assert said.prediction == prediction and bool(said.zero_snr) == zero_snr
    assert load(path)["scheduler"].config.prediction_type == prediction


def test_nothing_is_overwritten_and_no_adapter_is_lost(tmp_path: Path) -> None:
    base, path = tmp_path / "base.safetensors", tmp_path / "written.safetensors"
    save_file(ldm_tensors(toy_modules()), base)
    parts, like = load(base), read_signature(base)
    before = base.read_bytes()
    with pytest.raises(UserError, match="is there already and is not overwritten"):
        write_single_file(base, parts, like=like)
    assert base.read_bytes() == before
    unet: UNet2DConditionModel = parts["unet"]
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    lora.attach(unet, [layer], rank=2, alpha=2, dropout=0, seed=0)
    with pytest.raises(ValueError, match="unet has adapters, as on down_blocks"):
        write_single_file(path, parts, like=like)
    assert not path.exists()
