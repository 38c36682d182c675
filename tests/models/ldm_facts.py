"""What SD 1.x, 2.x and SDXL checkpoints in the original layout hold: names and shapes.

Facts, not code of anybody: the names follow from the classes of CompVis/stable-diffusion
(`UNetModel`, `AutoencoderKL`, `FrozenCLIPEmbedder`, `LitEma`, `DDPM.register_schedule`; commit
21f890f of 2022-11-16, v1-inference.yaml) and were compared in 2026-11, name by name and shape by
shape, with the lists of the published files in arenasys/stable-diffusion-webui-model-toolkit
(`components/UNET-v1-SD.txt`, `VAE-v1-SD.txt`, `CLIP-v1-SD.txt`, `UNET-v1-EMA.txt`): no difference.
`REAL_DIGEST` is the digest of that comparison. For SD 2.1 (v2-inference-v.yaml) and SDXL
(Stability-AI/generative-models, sd_xl_base.yaml) the same was done with `UNET-v2-SD.txt`,
`CLIP-v2-SD.txt`, `UNET-XL-SD.txt` and `CLIP-XL-SD.txt` there: no difference either.

All tensors of the real SD 1.5 file are float32, but position ids (int64) and num_updates (int32).
Every entry also names the tensor's place in the diffusers/transformers module, written down here
by hand from the two architectures, so that a test can write a checkpoint from real modules without
any of the converters that the package uses. Widths are parameters: `REAL` is the real file,
`TOY` one that is written and read in a moment (GroupNorm has 32 groups, so 32 is the least width).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Fact:
    """One tensor: its name in the file, its name in the module, its shape in the file."""

    ldm: str
    module: str
    shape: Shape


@dataclass(frozen=True)
class Widths:
    """Everything that may differ between two checkpoints.

    `unet_depths` are the transformer blocks of each level, `linear` is whether their projections
    are linear layers, `told` is the width of what SDXL's UNet is told beside the text. The text
    encoder is CLIP's; `open_clip` is the width of OpenCLIP's beside it or, where `text` is 0, in
    its place.
    """

    unet: int
    unet_multipliers: tuple[int, ...]
    unet_depths: tuple[int, ...]
    unet_layers: int
    vae: int
    vae_multipliers: tuple[int, ...]
    vae_layers: int
    latent: int
    text: int
    text_layers: int
    vocabulary: int
    positions: int
    linear: bool = False
    told: int = 0
    open_clip: int = 0
    open_clip_layers: int = 0

    @property
    def context(self) -> int:
        """Width of the text states."""
        return self.text + self.open_clip


REAL = Widths(
    unet=320,
    unet_multipliers=(1, 2, 4, 4),
    unet_depths=(1, 1, 1, 0),
    unet_layers=2,
    vae=128,
    vae_multipliers=(1, 2, 4, 4),
    vae_layers=2,
    latent=4,
    text=768,
    text_layers=12,
    vocabulary=49408,
    positions=77,
)

TOY = Widths(
    unet=32,
    unet_multipliers=(1, 2, 3, 3),
    unet_depths=(1, 1, 1, 0),
    unet_layers=2,
    vae=32,
    vae_multipliers=(1, 2, 3, 3),
    vae_layers=2,
    latent=4,
    text=64,
    text_layers=2,
    vocabulary=49408,
    positions=77,
)

REAL_2 = replace(REAL, linear=True, text=0, text_layers=0, open_clip=1024, open_clip_layers=24)
REAL_XL = replace(
    REAL,
    unet_multipliers=(1, 2, 4),
    unet_depths=(0, 2, 10),
    linear=True,
    told=2816,
    open_clip=1280,
    open_clip_layers=32,
)
TOY_2 = replace(TOY, linear=True, text=0, text_layers=0, open_clip=128, open_clip_layers=3)
TOY_XL = replace(
    TOY,
    unet_multipliers=(1, 2, 4),
    unet_depths=(0, 1, 2),
    linear=True,
    told=6 * 16 + 128,
    open_clip=128,
    open_clip_layers=2,
)

# Counts of the real v1-5-pruned file, 1831 tensors in all.
UNET_COUNT = 686
VAE_COUNT = 248
TEXT_COUNT = 197  # with position_ids
EMA_COUNT = 688  # 686 copies, decay, num_updates
SCHEDULE_COUNT = 12
REAL_DIGEST = "0e9c34f666271c57"
# Of v2-1_768-ema-pruned (no EMA copies) and sd_xl_base_1.0.
COUNT_2, DIGEST_2 = 1240, "220d19a766a6409c"
COUNT_XL, DIGEST_XL = 2515, "2086c2ba91745f92"

POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"

POSITION_IDS_XL = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"

SCHEDULE = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


def _affine(ldm: str, module: str, weight: Shape) -> Iterator[Fact]:
    """A layer with a weight of the given shape and a bias of its first size."""
    yield Fact(f"{ldm}.weight", f"{module}.weight", weight)
    yield Fact(f"{ldm}.bias", f"{module}.bias", weight[:1])


def _unet_resnet(ldm: str, module: str, c_in: int, c_out: int, c_time: int) -> Iterator[Fact]:
    yield from _affine(f"{ldm}.in_layers.0", f"{module}.norm1", (c_in,))
    yield from _affine(f"{ldm}.in_layers.2", f"{module}.conv1", (c_out, c_in, 3, 3))
    yield from _affine(f"{ldm}.emb_layers.1", f"{module}.time_emb_proj", (c_out, c_time))
    yield from _affine(f"{ldm}.out_layers.0", f"{module}.norm2", (c_out,))
    yield from _affine(f"{ldm}.out_layers.3", f"{module}.conv2", (c_out, c_out, 3, 3))
    if c_in != c_out:
        skip = (c_out, c_in, 1, 1)
        yield from _affine(f"{ldm}.skip_connection", f"{module}.conv_shortcut", skip)


def _unet_transformer(w: Widths, ldm: str, module: str, width: int, depth: int) -> Iterator[Fact]:
    projection = (width, width) if w.linear else (width, width, 1, 1)
    yield from _affine(f"{ldm}.norm", f"{module}.norm", (width,))
    yield from _affine(f"{ldm}.proj_in", f"{module}.proj_in", projection)
    yield from _affine(f"{ldm}.proj_out", f"{module}.proj_out", projection)
    for number in range(depth):
        block = f"transformer_blocks.{number}"
        yield from _unet_block(f"{ldm}.{block}", f"{module}.{block}", width, w.context)


def _unet_block(ldm: str, module: str, width: int, context: int) -> Iterator[Fact]:
    for norm in ("norm1", "norm2", "norm3"):
        yield from _affine(f"{ldm}.{norm}", f"{module}.{norm}", (width,))
    for attention, key_width in (("attn1", width), ("attn2", context)):
        for name, c_in in (("to_q", width), ("to_k", key_width), ("to_v", key_width)):
            tail = f"{attention}.{name}.weight"
            yield Fact(f"{ldm}.{tail}", f"{module}.{tail}", (width, c_in))
        tail = f"{attention}.to_out.0"
        yield from _affine(f"{ldm}.{tail}", f"{module}.{tail}", (width, width))
    for tail, shape in (
        ("ff.net.0.proj", (8 * width, width)),
        ("ff.net.2", (width, 4 * width)),
    ):
        yield from _affine(f"{ldm}.{tail}", f"{module}.{tail}", shape)


def _unet_down(w: Widths, prefix: str) -> Iterator[Fact]:
    number, width, time, levels = 1, w.unet, 4 * w.unet, len(w.unet_multipliers)
    for level, multiplier in enumerate(w.unet_multipliers):
        for layer in range(w.unet_layers):
            ldm, module = f"{prefix}input_blocks.{number}", f"down_blocks.{level}"
            c_out = multiplier * w.unet
            yield from _unet_resnet(f"{ldm}.0", f"{module}.resnets.{layer}", width, c_out, time)
            width = c_out
            if w.unet_depths[level]:
                yield from _unet_transformer(
                    w, f"{ldm}.1", f"{module}.attentions.{layer}", width, w.unet_depths[level]
                )
            number += 1
        if level < levels - 1:
            ldm, module = f"{prefix}input_blocks.{number}.0.op", f"down_blocks.{level}"
            yield from _affine(ldm, f"{module}.downsamplers.0.conv", (width, width, 3, 3))
            number += 1


def _unet_skips(w: Widths) -> list[int]:
    """Widths that the way down leaves for the way up, in the order they are made."""
    skips = [w.unet]
    for level, multiplier in enumerate(w.unet_multipliers):
        skips += [multiplier * w.unet] * w.unet_layers
        if level < len(w.unet_multipliers) - 1:
            skips.append(multiplier * w.unet)
    return skips


def _unet_up(w: Widths, prefix: str) -> Iterator[Fact]:
    skips, levels = _unet_skips(w), len(w.unet_multipliers)
    number, width, time = 0, w.unet_multipliers[-1] * w.unet, 4 * w.unet
    for up, level in enumerate(reversed(range(levels))):
        for layer in range(w.unet_layers + 1):
            ldm, module = f"{prefix}output_blocks.{number}", f"up_blocks.{up}"
            c_in, c_out = width + skips.pop(), w.unet_multipliers[level] * w.unet
            yield from _unet_resnet(f"{ldm}.0", f"{module}.resnets.{layer}", c_in, c_out, time)
            width = c_out
            if w.unet_depths[level]:
                yield from _unet_transformer(
                    w, f"{ldm}.1", f"{module}.attentions.{layer}", width, w.unet_depths[level]
                )
            if layer == w.unet_layers and level > 0:
                slot = 2 if w.unet_depths[level] else 1
                yield from _affine(
                    f"{ldm}.{slot}.conv", f"{module}.upsamplers.0.conv", (width, width, 3, 3)
                )
            number += 1


def unet_facts(w: Widths) -> list[Fact]:
    """The tensors of `model.diffusion_model.`; module names of `UNet2DConditionModel`.

    686 for SD 1.5 and 2.1, 1680 for SDXL.
    """
    p, time, deepest = "model.diffusion_model.", 4 * w.unet, w.unet_multipliers[-1] * w.unet
    facts = [
        *_affine(f"{p}time_embed.0", "time_embedding.linear_1", (time, w.unet)),
        *_affine(f"{p}time_embed.2", "time_embedding.linear_2", (time, time)),
        *_affine(f"{p}input_blocks.0.0", "conv_in", (w.unet, w.latent, 3, 3)),
        *_unet_down(w, p),
    ]
    if w.told:
        facts += _affine(f"{p}label_emb.0.0", "add_embedding.linear_1", (time, w.told))
        facts += _affine(f"{p}label_emb.0.2", "add_embedding.linear_2", (time, time))
    middle = f"{p}middle_block"
    facts += _unet_resnet(f"{middle}.0", "mid_block.resnets.0", deepest, deepest, time)
    depth = max(1, w.unet_depths[-1])
    facts += _unet_transformer(w, f"{middle}.1", "mid_block.attentions.0", deepest, depth)
    facts += _unet_resnet(f"{middle}.2", "mid_block.resnets.1", deepest, deepest, time)
    facts += _unet_up(w, p)
    facts += _affine(f"{p}out.0", "conv_norm_out", (w.unet,))
    facts += _affine(f"{p}out.2", "conv_out", (w.latent, w.unet, 3, 3))
    return facts


def _vae_resnet(ldm: str, module: str, c_in: int, c_out: int) -> Iterator[Fact]:
    yield from _affine(f"{ldm}.norm1", f"{module}.norm1", (c_in,))
    yield from _affine(f"{ldm}.conv1", f"{module}.conv1", (c_out, c_in, 3, 3))
    yield from _affine(f"{ldm}.norm2", f"{module}.norm2", (c_out,))
    yield from _affine(f"{ldm}.conv2", f"{module}.conv2", (c_out, c_out, 3, 3))
    if c_in != c_out:
        yield from _affine(f"{ldm}.nin_shortcut", f"{module}.conv_shortcut", (c_out, c_in, 1, 1))


def _vae_middle(ldm: str, module: str, width: int) -> Iterator[Fact]:
    """Two resnets around an attention whose projections are 1x1 convolutions in the file."""
    yield from _vae_resnet(f"{ldm}.block_1", f"{module}.resnets.0", width, width)
    attention = f"{module}.attentions.0"
    yield from _affine(f"{ldm}.attn_1.norm", f"{attention}.group_norm", (width,))
    for theirs, ours in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        yield from _affine(f"{ldm}.attn_1.{theirs}", f"{attention}.{ours}", (width, width, 1, 1))
    yield from _vae_resnet(f"{ldm}.block_2", f"{module}.resnets.1", width, width)


def _vae_encoder(w: Widths, prefix: str) -> Iterator[Fact]:
    width, levels = w.vae, len(w.vae_multipliers)
    yield from _affine(f"{prefix}conv_in", "encoder.conv_in", (w.vae, 3, 3, 3))
    for level, multiplier in enumerate(w.vae_multipliers):
        ldm, module = f"{prefix}down.{level}", f"encoder.down_blocks.{level}"
        for layer in range(w.vae_layers):
            c_out = multiplier * w.vae
            yield from _vae_resnet(
                f"{ldm}.block.{layer}", f"{module}.resnets.{layer}", width, c_out
            )
            width = c_out
        if level < levels - 1:
            yield from _affine(
                f"{ldm}.downsample.conv", f"{module}.downsamplers.0.conv", (width, width, 3, 3)
            )
    yield from _vae_middle(f"{prefix}mid", "encoder.mid_block", width)
    yield from _affine(f"{prefix}norm_out", "encoder.conv_norm_out", (width,))
    yield from _affine(f"{prefix}conv_out", "encoder.conv_out", (2 * w.latent, width, 3, 3))


def _vae_decoder(w: Widths, prefix: str) -> Iterator[Fact]:
    """LDM numbers the decoder's levels from the picture (0), diffusers from the latents."""
    width, levels = w.vae_multipliers[-1] * w.vae, len(w.vae_multipliers)
    yield from _affine(f"{prefix}conv_in", "decoder.conv_in", (width, w.latent, 3, 3))
    yield from _vae_middle(f"{prefix}mid", "decoder.mid_block", width)
    for up, level in enumerate(reversed(range(levels))):
        ldm, module = f"{prefix}up.{level}", f"decoder.up_blocks.{up}"
        for layer in range(w.vae_layers + 1):
            c_out = w.vae_multipliers[level] * w.vae
            yield from _vae_resnet(
                f"{ldm}.block.{layer}", f"{module}.resnets.{layer}", width, c_out
            )
            width = c_out
        if level > 0:
            yield from _affine(
                f"{ldm}.upsample.conv", f"{module}.upsamplers.0.conv", (width, width, 3, 3)
            )
    yield from _affine(f"{prefix}norm_out", "decoder.conv_norm_out", (width,))
    yield from _affine(f"{prefix}conv_out", "decoder.conv_out", (3, width, 3, 3))


def vae_facts(w: Widths) -> list[Fact]:
    """The 248 tensors of `first_stage_model.`; module names of `AutoencoderKL`."""
    p, moments = "first_stage_model.", 2 * w.latent
    return [
        *_vae_encoder(w, f"{p}encoder."),
        *_vae_decoder(w, f"{p}decoder."),
        *_affine(f"{p}quant_conv", "quant_conv", (moments, moments, 1, 1)),
        *_affine(f"{p}post_quant_conv", "post_quant_conv", (w.latent, w.latent, 1, 1)),
    ]


def text_facts(w: Widths) -> list[Fact]:
    """The 196 weights of the CLIP text encoder; module names of a flattened `CLIPTextModel`."""
    place = "conditioner.embedders.0" if w.told else "cond_stage_model"
    p, width = f"{place}.transformer.text_model.", w.text
    tokens, positions = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
    facts = [
        Fact(p + tokens, tokens, (w.vocabulary, width)),
        Fact(p + positions, positions, (w.positions, width)),
    ]
    for layer in range(w.text_layers):
        base = f"encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tail = f"{base}.self_attn.{name}"
            facts += _affine(p + tail, tail, (width, width))
        for name, shape in (
            ("layer_norm1", (width,)),
            ("mlp.fc1", (4 * width, width)),
            ("mlp.fc2", (width, 4 * width)),
            ("layer_norm2", (width,)),
        ):
            facts += _affine(f"{p}{base}.{name}", f"{base}.{name}", shape)
    facts += _affine(f"{p}final_layer_norm", "final_layer_norm", (width,))
    return facts


def open_clip_facts(w: Widths) -> list[Fact]:
    """The weights of an OpenCLIP text encoder, its unused last layer (SD 2.x) among them.

    294 for SD 2.1, 390 for SDXL, both with logit_scale. Where no tensor of a `CLIPTextModel` is
    alike, `module` is "": logit_scale, SD 2.x's projection and last layer. A tensor of query, key
    and value has the module's name with `*` for the letter; `text_projection` is transposed.
    """
    p = "conditioner.embedders.1.model." if w.told else "cond_stage_model.model."
    width, level = w.open_clip, "text_model." if w.told else ""
    facts = [
        Fact(f"{p}token_embedding.weight", "embeddings.token_embedding.weight",
             (w.vocabulary, width)),
        Fact(f"{p}positional_embedding", "embeddings.position_embedding.weight",
             (w.positions, width)),
    ]  # fmt: skip
    for layer in range(w.open_clip_layers):
        ldm, module = f"{p}transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        facts += [
            Fact(f"{ldm}.attn.in_proj_{leaf}", f"{module}.self_attn.*_proj.{leaf}", shape)
            for leaf, shape in (("weight", (3 * width, width)), ("bias", (3 * width,)))
        ]
        for theirs, ours, shape in (
            ("attn.out_proj", "self_attn.out_proj", (width, width)),
            ("ln_1", "layer_norm1", (width,)),
            ("ln_2", "layer_norm2", (width,)),
            ("mlp.c_fc", "mlp.fc1", (4 * width, width)),
            ("mlp.c_proj", "mlp.fc2", (width, 4 * width)),
        ):
            facts += _affine(f"{ldm}.{theirs}", f"{module}.{ours}", shape)
    facts += _affine(f"{p}ln_final", "final_layer_norm", (width,))
    facts = [replace(fact, module=level + fact.module) for fact in facts]
    if not w.told:
        last = f"encoder.layers.{w.open_clip_layers - 1}."
        facts = [replace(f, module="") if f.module.startswith(last) else f for f in facts]
    projection = "text_projection.weight" if w.told else ""
    facts.append(Fact(f"{p}text_projection", projection, (width, width)))
    facts.append(Fact(f"{p}logit_scale", "", ()))
    return facts


def parts(w: Widths) -> dict[str, list[Fact]]:
    """The facts of every part of a checkpoint, under diffusers' names."""
    found = {"unet": unet_facts(w), "vae": vae_facts(w)}
    if w.text:
        found["text_encoder"] = text_facts(w)
    if w.open_clip:
        found["text_encoder_2" if w.told else "text_encoder"] = open_clip_facts(w)
    return found


def published_2() -> dict[str, Shape]:
    """Name and shape of every tensor of v2-1_768-ema-pruned."""
    return weights(REAL_2) | {name: (1000,) for name in SCHEDULE}


def published_xl() -> dict[str, Shape]:
    """Name and shape of every tensor of sd_xl_base_1.0."""
    return weights(REAL_XL) | {POSITION_IDS_XL: (1, 77)}


def weights(w: Widths) -> dict[str, Shape]:
    """Name and shape of the parts' tensors."""
    return {fact.ldm: fact.shape for facts in parts(w).values() for fact in facts}


def ema_name(ldm: str) -> str:
    """`LitEma` keeps a copy of each weight of `model` under its name without the dots."""
    return "model_ema." + ldm.removeprefix("model.").replace(".", "")


def extras(w: Widths) -> dict[str, Shape]:
    """What the full file holds beside the weights: position ids, EMA copies, schedule."""
    facts: dict[str, Shape] = {POSITION_IDS: (1, w.positions)}
    facts |= {ema_name(fact.ldm): fact.shape for fact in unet_facts(w)}
    facts |= {"model_ema.decay": (), "model_ema.num_updates": ()}
    facts |= {name: (1000,) for name in SCHEDULE}
    return facts


def whole_file(w: Widths) -> dict[str, Shape]:
    """Name and shape of every tensor of a v1-5-pruned checkpoint at these widths."""
    return weights(w) | extras(w)


def digest(shapes: dict[str, Shape]) -> str:
    """A short digest of names and shapes, in the order of the names."""
    lines = "".join(f"{name} {list(shapes[name])}\n" for name in sorted(shapes))
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()[:16]


def write_zeros(
    path: Path,
    shapes: Mapping[str, Shape],
    filled: Mapping[str, bytes] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A whole .safetensors file of fp16 zeros, sparse on disk, but for the tensors in `filled`."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode("utf-8")
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
        for name, content in (filled or {}).items():
            file.seek(8 + len(header) + entries[name]["data_offsets"][0])
            file.write(content)
    return path
