"""The module names that AUTOMATIC1111 WebUI and ComfyUI match in a LoRA file.

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

- For SD 2.x and SDXL: the same files of A1111 (1.10) and ComfyUI (0.3.77). A1111 looks text encoder
  layers of OpenCLIP up under its own names, query, key and value in the module that holds all
  three. It knows one level structure, that of SD 1.x; SDXL's first upsampler stands elsewhere.

SD 1.5's UNet: four levels, two layers a level on the way down, three on the way up, attention on
the three wide levels. SD 2.1's is the same. SDXL's has three levels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

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


def a1111_target(key: str, family: str = "sd1") -> str | None:
    """The LDM module that A1111 looks for by a LoRA key, underscores for dots.

    Names under `model.` begin `diffusion_model_`, those of SD 1.x's text encoder `transformer_`.
    None where no rule of diffusers' or LDM's block names applies. `key` is the part before the
    first dot. A level of diffusers is three blocks of LDM, both ways.
    """
    if found := re.fullmatch(r"lora_te1_(text_model_encoder_layers_.+)", key):
        return f"0_transformer_{found[1]}"
    if found := re.fullmatch(r"lora_te2_text_model_encoder_layers_(\d+)_(.+)", key):
        return f"1_{_open_clip(found[1], found[2])}"
    if family == "sd2" and (found := re.fullmatch(r"lora_te_.+_layers_(\d+)_(.+)", key)):
        return _open_clip(found[1], found[2])
    if found := re.fullmatch(r"lora_te_text_model_encoder_layers_(\d+)_(.+)", key):
        return f"transformer_text_model_encoder_layers_{found[1]}_{found[2]}"
    if not key.startswith("lora_unet_"):
        return None
    target = _a1111_unet(key.removeprefix("lora_unet_"))
    return None if target is None else f"diffusion_model_{target}"


def _open_clip(block: str, layer: str) -> str:
    """Query, key and value are one module of OpenCLIP."""
    names = {"self_attn_out_proj": "attn_out_proj", "mlp_fc1": "mlp_c_fc", "mlp_fc2": "mlp_c_proj"}
    return f"model_transformer_resblocks_{block}_{names.get(layer, 'attn')}"


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


@dataclass(frozen=True)
class ComfyUnet:
    """ComfyUI's description of a UNet: residual blocks a level, transformer blocks of each place.

    `up` is read from its end, as ComfyUI does.
    """

    resnets: tuple[int, ...]
    down: tuple[int, ...]
    middle: int
    up: tuple[int, ...]


_SD = ComfyUnet((2, 2, 2, 2), (1, 1, 1, 1, 1, 1, 0, 0), 1, (*(1,) * 9, 0, 0, 0))
COMFY_UNETS = {
    "sd1": _SD,
    "sd2": _SD,
    "sdxl": ComfyUnet((2, 2, 2), (0, 0, 2, 2, 10, 10), 10, (0, 0, 0, 2, 2, 2, 10, 10, 10)),
}
COMFY_TEXTS = {
    "sd1": {"lora_te": 12},
    "sd2": {"lora_te": 24},
    "sdxl": {"lora_te1": 12, "lora_te2": 32},
}
_RESNET_PLACES = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
                  "conv_shortcut": "skip_connection"}  # fmt: skip


def comfy_unet(family: str) -> dict[str, str]:
    """Key -> LDM module, for every UNet layer that ComfyUI takes a LoRA for (and some that no
    model has: a shortcut in every residual block)."""
    unet = COMFY_UNETS[family]
    found: dict[str, str] = {}
    down, up = list(unet.down), list(unet.up)
    for level, count in enumerate(unet.resnets):
        first = 1 + (count + 1) * level
        for layer in range(count):
            block = f"input_blocks.{first + layer}"
            found |= _comfy_block(f"down_blocks.{level}", layer, block, down.pop(0))
        found[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + count}.0.op"
    found |= _comfy_transformer("mid_block.attentions.0", "middle_block.1", unet.middle)
    for layer in (0, 1):
        found |= _comfy_resnet(f"mid_block.resnets.{layer}", f"middle_block.{2 * layer}")
    for level, count in enumerate(reversed(unet.resnets)):
        for layer in range(count + 1):
            block = f"output_blocks.{(count + 1) * level + layer}"
            depth = up.pop()
            found |= _comfy_block(f"up_blocks.{level}", layer, block, depth)
            place = 2 if depth else 1
            found[f"up_blocks.{level}.upsamplers.0.conv"] = f"{block}.{place}.conv"
    return {f"lora_unet_{path.replace('.', '_')}": place for path, place in found.items()}


def _comfy_block(level: str, layer: int, block: str, depth: int) -> dict[str, str]:
    return _comfy_resnet(f"{level}.resnets.{layer}", f"{block}.0") | _comfy_transformer(
        f"{level}.attentions.{layer}", f"{block}.1", depth
    )


def _comfy_resnet(path: str, place: str) -> dict[str, str]:
    return {f"{path}.{name}": f"{place}.{inner}" for name, inner in _RESNET_PLACES.items()}


def _comfy_transformer(path: str, place: str, depth: int) -> dict[str, str]:
    blocks = [f"transformer_blocks.{n}.{layer}" for n in range(depth)
              for layer in ("ff.net.0.proj", "ff.net.2",
                            *(f"attn{a}.{x}" for a in (1, 2)
                              for x in ("to_q", "to_k", "to_v", "to_out.0")))]  # fmt: skip
    layers = ["proj_in", "proj_out", *blocks] if depth else []
    return {f"{path}.{layer}": f"{place}.{layer}" for layer in layers}


def comfy_texts(family: str) -> set[str]:
    """The text encoder keys that ComfyUI takes a LoRA for, under the names used here."""
    layers = [f"self_attn_{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    return {
        f"{prefix}_text_model_encoder_layers_{block}_{layer}"
        for prefix, count in COMFY_TEXTS[family].items()
        for block in range(count)
        for layer in (*layers, "mlp_fc1", "mlp_fc2")
    }
