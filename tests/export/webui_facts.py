"""The module names that AUTOMATIC1111 WebUI and ComfyUI match in a LoRA file for SD 1.5.

Facts, read from the programs' sources in 2026-11 and written down in our own words:

- AUTOMATIC1111/stable-diffusion-webui, `extensions-builtin/Lora/networks.py` and `network_lora.py`
  (commits 873edba of 2023-08 and later ones, whose rules for SD 1.x are the same). The part of a
  key before its first dot is rewritten from diffusers' block names to the names of the LDM module
  tree with dots turned to underscores, and looked up there. Only Linear, Conv2d and
  MultiheadAttention take a LoRA. A text encoder key keeps its `text_model`. What does not match is
  tried once more with `lora_unet` replaced by `diffusion_model`: LDM block names load as they are.
- Comfy-Org/ComfyUI, `comfy/lora.py` (`model_lora_keys_unet`, `model_lora_keys_clip`; commit
  ec93dca) and `comfy/utils.py` (`unet_to_diffusers`): `lora_unet_` and the diffusers path of every
  weight of the UNet, underscores for dots; `lora_te_text_model_encoder_layers_` for the six linear
  layers of each of CLIP's blocks; nothing else of the text encoder in this naming.
- arenasys/stable-diffusion-webui-model-toolkit, `components/LoRA-v1A-UNET.txt` and
  `LoRA-v1-CLIP.txt` (commit e19dd46): keys of published files, 192 and 72 modules, every one of
  them in these sets.

SD 1.5's UNet: four levels, two layers a level on the way down, three on the way up, attention on
the three wide levels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_ATTENTION = [
    f"attn{number}_{layer}" for number in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out_0")
]
_FEED_FORWARD = ["ff_net_0_proj", "ff_net_2"]
_RESNET = ["conv1", "conv2", "time_emb_proj"]


def _transformers() -> Iterator[str]:
    """The 16 transformers: 6 on the way down, 1 in the middle, 9 on the way up."""
    for level in (0, 1, 2):
        yield from (f"lora_unet_down_blocks_{level}_attentions_{layer}" for layer in (0, 1))
    yield "lora_unet_mid_block_attentions_0"
    for level in (1, 2, 3):
        yield from (f"lora_unet_up_blocks_{level}_attentions_{layer}" for layer in (0, 1, 2))


def _resnets() -> Iterator[tuple[str, bool]]:
    """The 22 residual blocks, and whether the width changes in them (a shortcut convolution)."""
    for level in (0, 1, 2, 3):
        for layer in (0, 1):
            widens = layer == 0 and level in (1, 2)
            yield f"lora_unet_down_blocks_{level}_resnets_{layer}", widens
    yield from ((f"lora_unet_mid_block_resnets_{layer}", False) for layer in (0, 1))
    for level in (0, 1, 2, 3):
        yield from ((f"lora_unet_up_blocks_{level}_resnets_{layer}", True) for layer in (0, 1, 2))


def unet_attention_modules() -> set[str]:
    """Query, key, value and output of self- and cross-attention: 16 transformers x 8 = 128."""
    return {
        f"{transformer}_transformer_blocks_0_{layer}"
        for transformer in _transformers()
        for layer in _ATTENTION
    }


def unet_all_modules() -> set[str]:
    """Every linear layer and convolution of the UNet: 282.

    sd-scripts adapts 278 of them; conv_in, conv_out and the two of the time embedding match too.
    """
    names = unet_attention_modules()
    for transformer in _transformers():
        names |= {f"{transformer}_{layer}" for layer in ("proj_in", "proj_out")}
        names |= {f"{transformer}_transformer_blocks_0_{layer}" for layer in _FEED_FORWARD}
    for resnet, widens in _resnets():
        names |= {f"{resnet}_{layer}" for layer in _RESNET}
        names |= {f"{resnet}_conv_shortcut"} if widens else set()
    names |= {f"lora_unet_down_blocks_{level}_downsamplers_0_conv" for level in (0, 1, 2)}
    names |= {f"lora_unet_up_blocks_{level}_upsamplers_0_conv" for level in (0, 1, 2)}
    ends = ("conv_in", "conv_out", "time_embedding_linear_1", "time_embedding_linear_2")
    return names | {f"lora_unet_{end}" for end in ends}


def text_encoder_modules() -> set[str]:
    """The six linear layers of each of CLIP-L's 12 blocks: 72."""
    layers = [f"self_attn_{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    return {
        f"lora_te_text_model_encoder_layers_{block}_{layer}"
        for block in range(12)
        for layer in (*layers, "mlp_fc1", "mlp_fc2")
    }


_A1111_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def a1111_target(key: str) -> str | None:
    """The LDM module that A1111 finds for a LoRA key on SD 1.x, underscores for dots.

    Names under `model.` begin `diffusion_model_`, those of the text encoder `transformer_`. None
    where no rule of diffusers' or LDM's block names applies. `key` is the part before the first
    dot. A level of diffusers is three blocks of LDM, both ways.
    """
    if found := re.fullmatch(r"lora_te_text_model_encoder_layers_(\d+)_(.+)", key):
        return f"transformer_text_model_encoder_layers_{found[1]}_{found[2]}"
    if not key.startswith("lora_unet_"):
        return None
    target = _a1111_unet(key.removeprefix("lora_unet_"))
    return None if target is None else f"diffusion_model_{target}"


def _a1111_unet(name: str) -> str | None:
    fixed = {
        "conv_in": "input_blocks_0_0",
        "conv_out": "out_2",
        "time_embedding_linear_1": "time_embed_0",
        "time_embedding_linear_2": "time_embed_2",
    }
    if name in fixed:
        return fixed[name]
    if found := re.fullmatch(r"(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", name):
        way, level, kind, layer, rest = found.groups()
        number = 3 * int(level) + int(layer)
        block = f"input_blocks_{number + 1}" if way == "down" else f"output_blocks_{number}"
        return f"{block}_{_a1111_inner(kind, rest)}"
    if found := re.fullmatch(r"mid_block_(attentions|resnets)_(\d+)_(.+)", name):
        kind, layer, rest = found.groups()
        place = 1 if kind == "attentions" else 2 * int(layer)
        return f"middle_block_{place}_{_a1111_inner(kind, rest)[2:]}"
    if found := re.fullmatch(r"down_blocks_(\d+)_downsamplers_0_conv", name):
        return f"input_blocks_{3 * int(found[1]) + 3}_0_op"
    if found := re.fullmatch(r"up_blocks_(\d+)_upsamplers_0_conv", name):
        return f"output_blocks_{3 * int(found[1]) + 2}_{1 if found[1] == '0' else 2}_conv"
    ldm = ("input_blocks_", "middle_block_", "output_blocks_", "time_embed_", "out_")
    return name if name.startswith(ldm) else None


def _a1111_inner(kind: str, rest: str) -> str:
    """Within an LDM block the residual block comes first (0), the transformer second (1)."""
    return f"1_{rest}" if kind == "attentions" else f"0_{_A1111_RESNET.get(rest, rest)}"
