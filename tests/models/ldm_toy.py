"""A checkpoint in the original layout, written from real classes by the tests' own map."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from tests.models import ldm_facts as facts
from tests.models.ldm_facts import TOY

Modules = dict[str, nn.Module]
FACTS = {
    "unet": facts.unet_facts(TOY),
    "vae": facts.vae_facts(TOY),
    "text_encoder": facts.text_facts(TOY),
}


def toy_modules() -> Modules:
    """Real classes at the widths of `TOY`, no two tensors alike."""
    torch.manual_seed(0)
    unet_widths = tuple(m * TOY.unet for m in TOY.unet_multipliers)
    modules: Modules = {
        "unet": UNet2DConditionModel(
            block_out_channels=unet_widths, cross_attention_dim=TOY.text, attention_head_dim=8
        ),
        "vae": AutoencoderKL(
            block_out_channels=tuple(m * TOY.vae for m in TOY.vae_multipliers),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=TOY.vae_layers,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=TOY.vocabulary,
                hidden_size=TOY.text,
                intermediate_size=4 * TOY.text,
                num_hidden_layers=TOY.text_layers,
                num_attention_heads=1,
            )
        ),
    }
    for module in modules.values():
        module.requires_grad_(False).eval()
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return modules


def schedule() -> dict[str, Tensor]:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    known = {"betas": betas.float(), "alphas_cumprod": torch.cumprod(1 - betas, 0).float()}
    return {name: known.get(name, torch.zeros(1000)) for name in facts.SCHEDULE}


def ldm_tensors(modules: Modules, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The whole v1-5-pruned file: weights, different EMA copies, position ids, schedule."""
    tensors = {}
    for part, module in modules.items():
        state = module.state_dict()
        assert sorted(state) == sorted(fact.module for fact in FACTS[part])
        for fact in FACTS[part]:
            tensors[fact.ldm] = state[fact.module].reshape(fact.shape).to(dtype)
    for fact in FACTS["unet"]:
        tensors[facts.ema_name(fact.ldm)] = tensors[fact.ldm] + 1
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["model_ema.num_updates"] = torch.tensor(1, dtype=torch.int32)
    tensors[facts.POSITION_IDS] = torch.arange(TOY.positions)[None]
    return tensors | schedule()
