"""Another VAE: every layout that people have of one is read, and what does not fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_scripts.errors import UserError
from lora_scripts.models import hub, vae_file
from lora_scripts.models.signature import read_signature
from lora_scripts.models.vae_file import find_vae, load_vae
from lora_scripts.models.vae_signature import VaeSignature, read_vae
from tests.models.ldm_toy import ldm_tensors, read_parts, toy_modules

VAE = "first_stage_model."
NONE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@pytest.fixture(scope="module")
def vae() -> Any:
    return toy_modules()["vae"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "checkpoint.safetensors"
    save_file(ldm_tensors(toy_modules()), path)
    return path


@pytest.fixture(scope="module")
def original(checkpoint: Path) -> dict[str, Tensor]:
    """The VAE's tensors as in files such as vae-ft-mse-840000-ema-pruned.safetensors."""
    tensors = load_file(checkpoint)
    return {n.removeprefix(VAE): t for n, t in tensors.items() if n.startswith(VAE)}


def renamed(vae: AutoencoderKL, *, earlier: bool) -> dict[str, Tensor]:
    """diffusers' names; the attention's as before diffusers 0.18 or as now."""
    state = dict(vae.state_dict())
    if earlier:
        words = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value."}
        words[".to_out.0."] = ".proj_attn."
        for new, old in words.items():
            state = {name.replace(new, old): tensor for name, tensor in state.items()}
    return state


def made(kind: str, folder: Path, vae: Any, original: dict[str, Tensor], checkpoint: Path) -> Path:
    path = folder / "vae.safetensors"
    match kind:
        case "folder":
            vae.save_pretrained(folder)
            return folder
        case "fp16 folder":
            vae.save_pretrained(folder, variant="fp16")
            return folder
        case "pipeline":
            parts = read_parts(read_signature(checkpoint), torch.float32)
            StableDiffusionPipeline(**parts, **NONE).save_pretrained(folder)
            return folder
        case "checkpoint":
            return checkpoint
        case "original":
            save_file(
                original | {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.ones(())}, path
            )
        case "original, prefixed":
            save_file({f"{VAE}{name}": tensor for name, tensor in original.items()}, path)
        case _:
            save_file(renamed(vae, earlier=kind.endswith("earlier")), path)
    return path


KINDS = {
    "folder": "folder",
    "fp16 folder": "folder",
    "pipeline": "folder",
    "checkpoint": "original",
    "original": "original",
    "original, prefixed": "original",
    "diffusers": "renamed",
    "diffusers, earlier": "renamed",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_the_same_vae(
    tmp_path: Path, kind: str, vae: Any, original: dict[str, Tensor], checkpoint: Path
) -> None:
    path = made(kind, tmp_path, vae, original, checkpoint)
    assert read_vae(path).layout == KINDS[kind]
    loaded = load_vae(path, vae.config)
    assert not loaded.training and loaded.dtype == torch.float32
    assert loaded.config.scaling_factor == 0.18215
    state = loaded.state_dict()
    assert state.keys() == vae.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in vae.state_dict().items())


def test_the_scale_is_that_of_the_base_model(
    tmp_path: Path, vae: Any, original: dict[str, Tensor]
) -> None:
    xl = dict(vae.config) | {"scaling_factor": 0.13025}
    save_file(original, tmp_path / "sdxl_vae.safetensors")
    assert load_vae(tmp_path / "sdxl_vae.safetensors", xl).config.scaling_factor == 0.13025
    vae.save_pretrained(tmp_path / "folder")
    with pytest.raises(UserError, match=r"scaling_factor 0\.18215, the base model's 0\.13025"):
        load_vae(tmp_path / "folder", xl)
    config = json.loads((tmp_path / "folder" / "config.json").read_text(encoding="utf-8"))
    del config["scaling_factor"]
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_vae(tmp_path / "folder", xl).config.scaling_factor == 0.13025


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_other_latents_are_refused(
    tmp_path: Path, vae: Any, original: dict[str, Tensor], layout: str
) -> None:
    if layout == "folder":
        vae.save_pretrained(tmp_path)
        path = tmp_path
    else:
        path = tmp_path / "vae.safetensors"
        save_file(original, path)
    with pytest.raises(UserError, match="its latents have 4 channels, the base model's 16"):
        load_vae(path, dict(vae.config) | {"latent_channels": 16})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder.mid.attn_1.q.weight": None}, r"missing: encoder\.mid\.attn_1\.q\.weight"),
        ({"decoder.more.weight": torch.zeros(1)}, r"1 tensors unknown: decoder\.more\.weight"),
        ({"quant_conv.bias": torch.zeros(4)}, r"of a wrong shape: quant_conv\.bias \(4,\)"),
        ({"encoder.down.0.block.0.conv1.weight": None}, "it holds no VAE's encoder"),
    ],
)
def test_a_file_that_is_not_whole(
    tmp_path: Path,
    vae: Any,
    original: dict[str, Tensor],
    changes: dict[str, Tensor | None],
    said: str,
) -> None:
    tensors = original | changes
    path = tmp_path / "vae.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(UserError, match=said) as error:
        load_vae(path, vae.config)
    assert error.value.problems[0].where == str(path)


def test_what_is_no_vae(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(UserError) as error:
            read_vae(path)
        return error.value.problems[0].what

    assert "nothing is there" in refusal(tmp_path / "absent")
    assert "there is no config.json of a VAE" in refusal(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "some.safetensors")
    assert "to use a file in it, name the file" in refusal(tmp_path)
    assert "no VAE's encoder (1 tensors: a …)" in refusal(tmp_path / "some.safetensors")
    (tmp_path / "vae.pt").write_bytes(b"PK\x03\x04")
    assert "a .pt file is a Python pickle" in refusal(tmp_path / "vae.pt")
    assert "name the new file or folder as vae" in refusal(tmp_path / "vae.pt")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}', encoding="utf-8")
    assert "of the class AutoencoderTiny, no VAE" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}', encoding="utf-8")
    assert "there is only vae.pt, a Python pickle" in refusal(tmp_path)


def test_a_hub_id_is_fetched(tmp_path: Path, vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(*arguments: Any) -> Path:
        asked.append(arguments)
        return tmp_path

    vae.save_pretrained(tmp_path)
    monkeypatch.setattr(vae_file.hub, "fetch", fetch)
    assert find_vae("stabilityai/sd-vae-ft-mse") == VaeSignature(tmp_path, "folder")
    assert asked == [("stabilityai/sd-vae-ft-mse", hub.WANTED_OF_VAE, hub.UNWANTED)]


def test_no_heavy_library_is_needed_to_recognise_one() -> None:
    code = (
        "import sys, lora_scripts.models.vae_signature; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
