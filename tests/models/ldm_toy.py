"""Checkpoints in the original layout, written from real classes by the tests' own map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_scripts.models.original_names import PREFIXES
from lora_scripts.models.signature import Signature
from lora_scripts.models.single_file import Checkpoint
from tests.models import ldm_facts as facts
from tests.models.ldm_facts import TOY, Fact, Widths

Modules = dict[str, nn.Module]
HEAD = 64  # of text encoders and of UNets with linear projections


def toy_modules(w: Widths = TOY) -> Modules:
    """Real classes at these widths, no two tensors alike."""
    torch.manual_seed(0)
    modules: Modules = {"unet": _unet(w), "vae": _vae(w)}
    if w.text:
        modules["text_encoder"] = CLIPTextModel(_text_config(w, w.text, w.text_layers))
    if w.told:
        config = _text_config(w, w.open_clip, w.open_clip_layers, hidden_act="gelu")
        modules["text_encoder_2"] = CLIPTextModelWithProjection(config)
    elif w.open_clip:
        config = _text_config(w, w.open_clip, w.open_clip_layers - 1, hidden_act="gelu")
        modules["text_encoder"] = CLIPTextModel(config)
    for module in modules.values():
        module.requires_grad_(False).eval()
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return modules


def _unet(w: Widths) -> UNet2DConditionModel:
    widths = tuple(m * w.unet for m in w.unet_multipliers)
    attends = tuple(bool(depth) for depth in w.unet_depths)
    extra: dict[str, object] = {}
    if w.told:
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (w.told - w.open_clip) // 6,
            "projection_class_embeddings_input_dim": w.told,
            "transformer_layers_per_block": tuple(max(1, depth) for depth in w.unet_depths),
        }
    heads = tuple(max(1, width // HEAD) for width in widths)
    return UNet2DConditionModel(
        block_out_channels=widths,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
        cross_attention_dim=w.context,
        attention_head_dim=heads if w.linear else 8,
        use_linear_projection=w.linear,
        **extra,
    )


def _vae(w: Widths) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=tuple(m * w.vae for m in w.vae_multipliers),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=w.vae_layers,
    )


def _text_config(
    w: Widths, width: int, layers: int, hidden_act: str = "quick_gelu"
) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=w.vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // HEAD),
        hidden_act=hidden_act,
    )


def schedule() -> dict[str, Tensor]:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    known = {"betas": betas.float(), "alphas_cumprod": torch.cumprod(1 - betas, 0).float()}
    return {name: known.get(name, torch.zeros(1000)) for name in facts.SCHEDULE}


def part_tensors(
    modules: Modules, w: Widths = TOY, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The weights of all parts under their original names."""
    tensors = {}
    for part, facts_of_part in facts.parts(w).items():
        state = modules[part].state_dict()
        for fact in facts_of_part:
            tensors[fact.ldm] = _tensor(fact, state).to(dtype)
    return tensors


def _tensor(fact: Fact, state: Mapping[str, Tensor]) -> Tensor:
    if not fact.module:
        return torch.full(fact.shape, 0.5)
    if "*" in fact.module:
        return torch.cat([state[fact.module.replace("*", letter)] for letter in "qkv"])
    if fact.module.startswith("text_projection"):
        return state[fact.module].T.contiguous()
    return state[fact.module].reshape(fact.shape)


def ldm_tensors(
    modules: Modules, dtype: torch.dtype = torch.float32, w: Widths = TOY
) -> dict[str, Tensor]:
    """The whole v1-5-pruned file: weights, different EMA copies, position ids, schedule."""
    tensors = part_tensors(modules, w, dtype)
    for fact in facts.unet_facts(w):
        tensors[facts.ema_name(fact.ldm)] = tensors[fact.ldm] + 1
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["model_ema.num_updates"] = torch.tensor(1, dtype=torch.int32)
    tensors[facts.POSITION_IDS] = torch.arange(w.positions)[None]
    return tensors | schedule()


def sd2_tensors(modules: Modules) -> dict[str, Tensor]:
    """The whole v2-1_768-ema-pruned file."""
    return part_tensors(modules, facts.TOY_2) | schedule()


def sdxl_tensors(modules: Modules, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The whole sd_xl_base_1.0 file."""
    positions = torch.arange(facts.TOY_XL.positions)[None]
    return part_tensors(modules, facts.TOY_XL, dtype) | {facts.POSITION_IDS_XL: positions}


def read_parts(
    found: Signature, dtype: torch.dtype, encoder_dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """All parts of a checkpoint, as a pipeline takes them."""
    file = Checkpoint(found)
    weighted = {
        name: file.part(name, dtype if name == "unet" else encoder_dtype)
        for name in PREFIXES[found.family]
    }
    return weighted | file.others()
