"""Every tensor of the real SD 1.5, 2.1 and SDXL where diffusers' converters find it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_scripts.models import original_names, unet
from lora_scripts.models.kinds import Family
from lora_scripts.models.original_names import Source, places, unet_path
from lora_scripts.models.packaged import packaged_config
from tests.models import ldm_facts as facts

WIDTHS = {"sd1": facts.REAL, "sd2": facts.REAL_2, "sdxl": facts.REAL_XL}
FAMILIES: tuple[Family, ...] = ("sd1", "sd2", "sdxl")


def real(family: Family, part: str) -> Any:
    """A part at its real size on the meta device."""
    config = packaged_config(family, part)
    with torch.device("meta"):
        match part:
            case "unet":
                return UNet2DConditionModel(**config)
            case "vae":
                return AutoencoderKL(**config)
            case "text_encoder":
                return CLIPTextModel(CLIPTextConfig(**config))
            case _:
                return CLIPTextModelWithProjection(CLIPTextConfig(**config))


def places_of(family: Family, part: str, module: nn.Module) -> dict[str, Source]:
    config = {} if part.startswith("text") else module.config
    return places(family, part, module.state_dict(), config, "text_model.")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_unet_and_vae_as_diffusers_finds_them(family: Family, part: str) -> None:
    module = real(family, part)
    convert = {"unet": convert_ldm_unet_checkpoint, "vae": convert_ldm_vae_checkpoint}[part]
    shapes = {fact.ldm: fact.shape for fact in facts.parts(WIDTHS[family])[part]}
    named = {name: _Named(shape, name) for name, shape in shapes.items()}
    converted = convert(dict(named), dict(module.config))
    found = {name: Source(tensor.name) for name, tensor in converted.items()}
    assert places_of(family, part, module) == found
    assert {source.name for source in found.values()} == shapes.keys()


class _Named:
    """As much of a tensor as the converters of UNet and VAE touch, that keeps its name."""

    def __init__(self, shape: tuple[int, ...], name: str) -> None:
        self.shape, self.name, self.ndim = shape, name, len(shape)

    def __getitem__(self, _: object) -> _Named:
        return self


@pytest.mark.parametrize(("family", "part"), [("sd1", "text_encoder"), ("sdxl", "text_encoder")])
def test_clip_as_diffusers_finds_it(family: Family, part: str) -> None:
    found = {fact.ldm: fact.ldm for fact in facts.parts(WIDTHS[family])[part]}
    converted = convert_ldm_clip_checkpoint(found)
    module = real(family, part)
    assert places_of(family, part, module) == {
        name.removeprefix("text_model."): Source(ldm) for name, ldm in converted.items()
    }
    assert len(module.state_dict()) == 196


@pytest.mark.parametrize(("family", "part"), [("sd2", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_open_clip_as_diffusers_puts_it_together(family: Family, part: str) -> None:
    """Real names and real depths, narrow; every row of the file has a number of its own."""
    module, width = real(family, part), 4
    prefix = original_names.PREFIXES[family][part]
    file, start = {}, 0
    for fact in facts.open_clip_facts(WIDTHS[family]):
        rows = 3 * width if "in_proj" in fact.ldm else width
        shape = (rows, width) if len(fact.shape) == 2 else (rows,)
        file[fact.ldm] = torch.arange(start, start + math.prod(shape)).reshape(shape)
        start += math.prod(shape)
    converted = convert_open_clip_checkpoint(module, dict(file), prefix)
    if family == "sd2":
        converted = {name.removeprefix("text_model."): t for name, t in converted.items()}
    where = places_of(family, part, module)
    assert where.keys() == converted.keys()
    for name, source in where.items():
        tensor = file[source.name]
        if source.third is not None:
            tensor = tensor[source.third * width : (source.third + 1) * width]
        assert torch.equal(tensor.T if source.transposed else tensor, converted[name]), name
    assert len(where) == {"sd2": 372, "sdxl": 517}[family]


def test_layers_by_hand() -> None:
    """A few known names, written down from the two programs' sources."""
    sd15, xl = packaged_config("sd1", "unet"), packaged_config("sdxl", "unet")
    block = "transformer_blocks.0.attn1.to_q"
    for config, path, original in (
        (sd15, f"down_blocks.1.attentions.0.{block}", f"input_blocks.4.1.{block}"),
        (sd15, f"mid_block.attentions.0.{block}", f"middle_block.1.{block}"),
        (sd15, f"up_blocks.3.attentions.2.{block}", f"output_blocks.11.1.{block}"),
        (sd15, "up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        (sd15, "up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        (sd15, "down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        (xl, f"down_blocks.1.attentions.0.{block}", f"input_blocks.4.1.{block}"),
        (xl, f"up_blocks.0.attentions.2.{block}", f"output_blocks.2.1.{block}"),
        (xl, "up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        (xl, "mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        (xl, "down_blocks.2.resnets.0.conv_shortcut", "input_blocks.7.0.skip_connection"),
        (xl, "add_embedding.linear_2", "label_emb.0.2"),
        (xl, "conv_out", "out.2"),
    ):
        assert unet_path(path, config) == original


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_that_a_lora_can_sit_on_has_an_original_name(family: Family) -> None:
    module = real(family, "unet")
    paths = unet.adaptable("unet", module)
    named = {unet_path(path, module.config) for path in paths}
    assert len(named) == len(paths) == {"sd1": 278, "sd2": 278, "sdxl": 788}[family]
    weights = {fact.ldm for fact in facts.unet_facts(WIDTHS[family])}
    assert {f"model.diffusion_model.{name}.weight" for name in named} <= weights


@pytest.mark.parametrize("path", ["down_blocks.0.motion_modules.0.proj_in", "encoder_hid_proj"])
def test_a_layer_that_the_original_lacks(path: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"the original UNet has no layer like {path}")):
        unet_path(path, packaged_config("sd1", "unet"))


def test_a_text_tensor_that_open_clip_lacks() -> None:
    with pytest.raises(ValueError, match=r"no tensor like encoder\.layers\.0\.mlp\.fc3\.weight"):
        original_names.open_clip("encoder.layers.0.mlp.fc3.weight")
