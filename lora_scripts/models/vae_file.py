"""Another VAE in place of the base model's: the key `vae`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from lora_scripts.errors import user_error
from lora_scripts.models import hub, original_names, shapes
from lora_scripts.models.components import read_part
from lora_scripts.models.filling import check, fill
from lora_scripts.models.header import TensorInfo, read_header
from lora_scripts.models.json_file import read_json
from lora_scripts.models.original_names import Source
from lora_scripts.models.vae_signature import VaeSignature, read_vae

# What files of a VAE carry beside it: its training's loss and copies.
_SET_ASIDE = re.compile(r"loss\..+|model_ema\..+")
# Names of attention layers in files that diffusers wrote before its version 0.18.
_EARLIER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_ATTENTION = re.compile(r"(.+\.attentions\.0\.)(to_[qkv]|to_out\.0)(\.\w+)")


def find_vae(vae: str) -> VaeSignature:
    """What the key `vae` names; a hub id is fetched.

    Raises:
        UserError: if it is not to be had or cannot be taken.
    """
    path = hub.local_path(vae)
    if path is None:
        path = hub.fetch(vae, hub.WANTED_OF_VAE, hub.UNWANTED)
    return read_vae(path)


def load_vae(path: Path, like: Mapping[str, Any]) -> AutoencoderKL:
    """A VAE in float32 on the CPU, in evaluation mode, that fits the base model.

    Latents are scaled as the base model's, which its UNet was trained on: a lone file does not tell
    its scale, and a folder's must be the same.

    Args:
        path: As for `read_vae`.
        like: The config of the base model's own VAE.

    Raises:
        UserError: if there is no whole VAE, or one of another family: other latent channels, or
            another scale.
    """
    found = read_vae(path)
    vae = _from_folder(found, like) if found.layout == "folder" else _from_file(found, like)
    channels = vae.config.latent_channels
    if channels != like["latent_channels"]:
        what = f"its latents have {channels} channels, the base model's {like['latent_channels']}"
        raise user_error(str(path), f"{what}; name a VAE of the base model's family")
    return vae.eval()


def _from_folder(found: VaeSignature, like: Mapping[str, Any]) -> AutoencoderKL:
    said = read_json(found.path / "config.json").get("scaling_factor")
    if said not in (None, like["scaling_factor"]):
        what = f"its config says scaling_factor {said}, the base model's {like['scaling_factor']}"
        raise user_error(str(found.path), f"{what}; name a VAE of the base model's family")
    vae: AutoencoderKL = read_part(AutoencoderKL, found.path, found.variant, torch.float32)
    vae.register_to_config(scaling_factor=like["scaling_factor"])
    return vae


def _from_file(found: VaeSignature, like: Mapping[str, Any]) -> AutoencoderKL:
    own = {
        name: info
        for name, info in read_header(found.path).items()
        if name.startswith(found.prefix)
        and not _SET_ASIDE.fullmatch(name.removeprefix(found.prefix))
    }
    header, renamed = shapes.without(own, found.prefix), found.layout == "renamed"
    base = {key: value for key, value in like.items() if not key.startswith("_")}
    config = shapes.vae_config(found.path, header, base, renamed=renamed)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    where = _places(found, vae, own)
    check(found.path, vae, own, where, "a VAE (AutoencoderKL)")
    fill(vae, found.path, where, torch.float32)
    return vae


def _places(
    found: VaeSignature, vae: AutoencoderKL, header: Mapping[str, TensorInfo]
) -> dict[str, Source]:
    def place(name: str) -> Source:
        if found.layout == "original":
            return Source(found.prefix + original_names.vae(name, vae.config).name)
        if name not in header and (match := _ATTENTION.fullmatch(name)):
            return Source(match[1] + _EARLIER[match[2]] + match[3])
        return Source(name)

    return {name: place(name) for name in vae.state_dict()}
