"""Encoders that rest between their visits give what those give that stay in memory."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lora_scripts.device import Compute
from lora_scripts.errors import WorkError
from lora_scripts.models import components, filling
from lora_scripts.models.family import DrawRequest, ImageFamily, Options
from lora_scripts.tasks import build
from tests import toys
from tests.models.ldm_facts import TOY, TOY_2, TOY_XL
from tests.models.ldm_toy import ldm_tensors, sd2_tensors, sdxl_tensors, toy_modules

CPU = Compute(torch.device("cpu"), "no")
FILES: dict[str, Any] = {
    "sd1": (ldm_tensors, TOY), "sd2": (sd2_tensors, TOY_2), "sdxl": (sdxl_tensors, TOY_XL),
}  # fmt: skip
REQUEST = DrawRequest("a cat", "blurry", 5.0, 2, 64, 64, 3)


@pytest.fixture(params=["folder", "file", "another VAE"])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(FILES))
def base(
    request: pytest.FixtureRequest, layout: str, bases: dict[str, Path], tmp_path: Path
) -> Path:
    if layout != "file":
        return bases[request.param]
    tensors, widths = FILES[request.param]
    path = tmp_path / f"{request.param}.safetensors"
    save_file(tensors(toy_modules(widths)), path)
    return path


@pytest.fixture
def options(layout: str, base: Path, tmp_path: Path) -> Options:
    if layout == "file":
        return Options(prediction_type="epsilon")  # a file does not say, and a toy knows nothing
    if layout == "folder":
        return Options()
    torch.manual_seed(7)
    like = components.read_part(toys.AutoencoderKL, base / "vae", None, torch.float32)
    other = toys.AutoencoderKL.from_config(like.config)
    other.save_pretrained(str(tmp_path / "vae"))
    return Options(vae=str(tmp_path / "vae"))


def load(base: Path, options: Options, *, resting: bool) -> Any:
    return build.load_family(build.find_base(str(base)), CPU, options, resting=resting)


def bytes_held(family: ImageFamily) -> dict[str, int]:
    """Of each encoder's weights, those that lie in memory."""
    modules = {"vae": family.vae, **family.adapted}  # type: ignore[attr-defined]
    return {
        name: sum(p.nbytes for p in module.parameters() if p.device.type != "meta")
        for name, module in modules.items()
        if name != "unet"
    }


def test_at_rest_they_take_no_memory_and_awake_they_are_the_same(
    base: Path, options: Options
) -> None:
    staying, resting = (load(base, options, resting=resting) for resting in (False, True))
    whole = bytes_held(staying)
    assert all(whole.values())
    assert resting.image_encoder_id == staying.image_encoder_id
    assert resting.text_encoder_id == staying.text_encoder_id
    assert not any(bytes_held(resting).values())

    pixels_CHW = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for ours, theirs in zip(
        resting.encode_image(pixels_CHW), staying.encode_image(pixels_CHW), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    found, expected = (family.encode_prompt("a b c") for family in (resting, staying))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    torch.testing.assert_close(resting.probe(), staying.probe())
    assert not any(bytes_held(resting).values())

    pictures = [family.draw(REQUEST) for family in (resting, staying, resting)]
    assert pictures[0].tobytes() == pictures[1].tobytes() == pictures[2].tobytes()
    assert not any(bytes_held(resting).values())
    assert bytes_held(staying) == whole

    with resting.visiting("image"), resting.visiting("image"):
        pass  # the inner one must not send it to sleep
    with resting.visiting("image"):
        with resting.visiting("image"):
            pass
        assert bytes_held(resting)["vae"] == whole["vae"]
    resting.parts()
    assert bytes_held(resting) == whole


def test_a_visit_within_a_visit_moves_nothing(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load(bases["sdxl"], Options(), resting=True)
    with family.visiting("image"), family.visiting("text"):
        for module in (family.vae, family.text_encoder, family.text_encoder_2):
            monkeypatch.setattr(module, "to", None)
        assert family.encode_image(torch.zeros(3, 64, 64))[0].any()
        assert family.encode_prompt("a cat")["embedding"].any()
        monkeypatch.undo()
    assert not any(bytes_held(family).values())


def test_of_a_folder_only_the_tensors_are_read_again(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load(bases["sdxl"], Options(), resting=True)
    monkeypatch.setattr(components, "read_part", None)  # it is not asked
    assert family.encode_prompt("a cat")["embedding"].any()
    assert family.encode_image(torch.zeros(3, 64, 64))[0].any()


def test_a_vae_of_earlier_names_is_read_again_too(bases: dict[str, Path], tmp_path: Path) -> None:
    """Files that diffusers wrote before its version 0.18 have other names in the attention."""
    base = shutil.copytree(bases["sd1"], tmp_path / "base")
    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    earlier = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(file).items():
        new = name
        for now, before in earlier.items():
            new = new.replace(f".attentions.0.{now}.", f".attentions.0.{before}.")
        tensors[new] = tensor
    assert sum("proj_attn" in name for name in tensors) == 4
    save_file(tensors, file)
    pixels_CHW = torch.rand(3, 64, 64)
    found, expected = (
        load(folder, Options(), resting=resting).encode_image(pixels_CHW)[0]
        for folder, resting in ((base, True), (bases["sd1"], False))
    )
    torch.testing.assert_close(found, expected)


def test_where_two_files_hold_a_tensor_the_library_decides(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """transformers reads model.safetensors and passes over what diffusers would read."""
    base = shutil.copytree(bases["sd1"], tmp_path / "base")
    own = load_file(base / "text_encoder" / "model.safetensors")
    other = base / "text_encoder" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in own.items()}, other)
    found, expected = (
        load(folder, Options(), resting=True).encode_prompt("a cat")["embedding"]
        for folder in (base, bases["sd1"])
    )
    torch.testing.assert_close(found, expected)


def test_files_that_changed_meanwhile_are_not_read(
    base: Path, options: Options, tmp_path: Path
) -> None:
    """What was encoded before came from others."""
    copy = tmp_path / "copy" / base.name
    copy.parent.mkdir()
    if base.is_dir():
        shutil.copytree(base, copy)
    else:
        shutil.copy(base, copy)
    family = load(copy, options, resting=True)
    if options.vae is not None:
        touched = Path(options.vae) / "diffusion_pytorch_model.safetensors"
    else:
        touched = copy / "vae" / "diffusion_pytorch_model.safetensors" if copy.is_dir() else copy
    family.encode_image(torch.zeros(3, 64, 64))
    os.utime(touched, (0, 0))
    with pytest.raises(WorkError, match="these files have changed since the run began"):
        family.encode_image(torch.zeros(3, 64, 64))


def test_one_that_is_used_in_every_step_stays(bases: dict[str, Path]) -> None:
    family = load(bases["sdxl"], Options(), resting=True)
    family.keep_on_device("text")
    family.encode_prompt("a cat")
    held = bytes_held(family)
    assert held["text_encoder"] and held["text_encoder_2"] and not held["vae"]


def test_a_changed_text_encoder_is_asked_anew(bases: dict[str, Path]) -> None:
    """What it said while it rested is not what it says with a LoRA on it."""
    family = load(bases["sd1"], Options(), resting=True)
    before = family.draw(REQUEST)
    assert family.draw(REQUEST).tobytes() == before.tobytes()
    family.keep_on_device("text")
    for parameter in family.text_encoder.parameters():
        parameter.mul_(1.5)
    assert family.draw(REQUEST).tobytes() != before.tobytes()


def is_mapped(folder: Path) -> bool:
    """Whether files of a folder lie in this process's memory."""
    return str(folder) in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_a_unet_read_in_pieces_is_diffusers_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype
) -> None:
    torch.manual_seed(0)
    unet = toys.stable_diffusion_parts()["unet"].to(stored)
    unet.save_pretrained(str(tmp_path / "whole"))
    unet.save_pretrained(str(tmp_path / "shards"), max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    expected = UNet2DConditionModel.from_pretrained(str(tmp_path / "whole"), dtype=torch.bfloat16)
    monkeypatch.setattr(filling, "PIECE", 100_000)
    monkeypatch.setattr(components, "read_part", None)  # it is not asked
    for name in ("whole", "shards"):
        folder = tmp_path / name
        found = components.read_unet(UNet2DConditionModel, folder, None, torch.bfloat16)
        assert (
            found.config.items()
            >= {
                key: value for key, value in expected.config.items() if key != "_name_or_path"
            }.items()
        )
        assert not found.training
        tensors = found.state_dict()
        assert tensors.keys() == expected.state_dict().keys()
        for key, tensor in expected.state_dict().items():
            assert tensors[key].dtype == torch.bfloat16 and torch.equal(tensors[key], tensor)
        assert not is_mapped(folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_files_in_the_runs_precision_are_the_weights_themselves(tmp_path: Path) -> None:
    """Their pages are shared by all processes of a machine; no copy is made."""
    toys.stable_diffusion_parts()["unet"].save_pretrained(str(tmp_path))
    unet = components.read_unet(UNet2DConditionModel, tmp_path, None, torch.float32)
    assert is_mapped(tmp_path)
    del unet
