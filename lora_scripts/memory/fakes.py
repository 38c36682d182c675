"""The real classes of a base model with tensors that have shapes and take no memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_scripts.device import Compute
from lora_scripts.logs import silent
from lora_scripts.models import causal_lm, filling, header, lora
from lora_scripts.models.family import Options
from lora_scripts.models.json_file import read_json
from lora_scripts.models.signature import Signature, weight_files
from lora_scripts.randomness import seed_of
from lora_scripts.schema import ImageConfig, TextConfig
from lora_scripts.tasks import build

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lora_scripts.models.family import ImageFamily

ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Files:
    """The weights of a part as they lie on the disk, mapped while they are read.

    `dtype`: of the largest tensor; None where it is none of the usual ones.
    """

    bytes: int
    dtype: torch.dtype | None


@dataclass(frozen=True)
class FakeImages:
    """An image model with its LoRA on: the family as the run has it, and its files by part."""

    family: ImageFamily
    parts: Mapping[str, nn.Module]  # in the order in which they are read
    files: Mapping[str, Files]


@dataclass(frozen=True)
class FakeText:
    """A language model with its LoRA on. `packed`: whether its rows are laid end to end."""

    model: Any
    files: Files
    layout: str
    packed: bool


def images(config: ImageConfig, compute: Compute) -> FakeImages:
    """The base of an image run, adapters attached.

    Raises:
        UserError: if it cannot be taken.
    """
    found = build.find_base(config.base_model)
    with torch.device("meta"):
        parts = _empty_parts(found, compute.dtype)
        family = _family(found, parts, compute, config)
        targets = family.targets(config.lora_targets)
        adapted = family.adapted if config.train_text_encoder else _first(family.adapted)
        for component, module in adapted.items():
            _attach(component, module, targets[component], config)
    if config.gradient_checkpointing:
        family.checkpoint_gradients()
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    return FakeImages(family, modules, _files_of(found, modules))


def text(config: TextConfig, compute: Compute) -> FakeText:
    """The base of a text run, adapters attached.

    Raises:
        UserError: if it cannot be taken.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    found = build.find_text_base(config.base_model, with_code=config.trust_remote_code)
    if config.trust_remote_code and found.layout == "transformers":
        settings = AutoConfig.from_pretrained(found.path, trust_remote_code=True)
    else:
        settings = causal_lm.load_config(found)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            settings, dtype=compute.dtype, trust_remote_code=config.trust_remote_code
        )
        _attach("model", model, causal_lm.targets(model, config.lora_targets).adapted, config)
    if config.gradient_checkpointing:
        causal_lm.checkpoint_gradients(model)
    packed = config.packing and _may_pack(model)
    files = Files(sum(path.stat().st_size for path in found.weights), _dtype_of(found.weights))
    return FakeText(model, files, found.layout, packed)


def _may_pack(model: Any) -> bool:
    """Whether rows may be laid end to end, as far as the config tells; the run tries it, too."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return kinds <= ATTENDING and bool(model._supports_attention_backend)


def pretend(modules: Iterable[nn.Module], mode: FakeTensorMode) -> None:
    """Move modules from the meta device to what looks like a CPU with memory.

    Operations choose their kernels, and autocast its types, by the device that a tensor names.
    """
    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the old ones, kept for their ids

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in known:
            with mode:
                made = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
                )
            is_weight = isinstance(tensor, nn.Parameter)
            made = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_weight else made
            known[id(tensor)] = made, tensor
        return known[id(tensor)][0]

    for module in {id(m): m for whole in modules for m in whole.modules()}.values():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]


def _attach(
    component: str, module: nn.Module, targets: Any, config: ImageConfig | TextConfig
) -> None:
    lora.attach(
        module,
        targets,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        seed=seed_of(config.seed, "lora", component),
        kind=config.lora_type,
    )


def _first(adapted: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    denoiser, *_ = adapted
    return {denoiser: adapted[denoiser]}


# --- image models ---------------------------------------------------------------------------------


def _family(
    found: Signature, parts: Mapping[str, Any], compute: Compute, config: ImageConfig
) -> ImageFamily:
    """The family around empty parts. What it predicts does not matter to its memory."""
    from lora_scripts.models import prediction, sd, sdxl

    nowhere = Compute(torch.device("meta"), compute.precision)
    options = Options(clip_skip=config.clip_skip, max_caption_tokens=config.max_caption_tokens)
    said = prediction.Said("epsilon")
    given: Any = parts
    with silent():  # what it predicts is said by the run
        match found.family:
            case "sd1" | "sd2" as name:
                return sd.StableDiffusion(name, given, nowhere, options, said)
            case "sdxl":
                return sdxl.StableDiffusionXL(given, nowhere, options, said, zeros_for_empty=True)


def _empty_parts(found: Signature, dtype: torch.dtype) -> dict[str, Any]:
    """A pipeline's modules on the meta device in the precision that they are held in."""
    from diffusers import DDPMScheduler

    modules = _of_folder(found.path) if found.layout == "diffusers" else _of_file(found)
    modules["unet"] = modules["unet"].to(dtype)
    with torch.device("cpu"):
        scheduler = DDPMScheduler()
    return {**modules, "scheduler": scheduler, "tokenizer": None, "tokenizer_2": None}


def _of_folder(path: Path) -> dict[str, nn.Module]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def text_encoder(cls: Any, name: str) -> Any:
        return cls(CLIPTextConfig(**read_json(path / name / "config.json")))

    modules: dict[str, nn.Module] = {
        "unet": UNet2DConditionModel.from_config(read_json(path / "unet" / "config.json")),
        "vae": AutoencoderKL.from_config(read_json(path / "vae" / "config.json")),
        "text_encoder": text_encoder(CLIPTextModel, "text_encoder"),
    }
    if (path / "text_encoder_2").is_dir():
        modules["text_encoder_2"] = text_encoder(CLIPTextModelWithProjection, "text_encoder_2")
    return modules


def _of_file(found: Signature) -> dict[str, nn.Module]:
    from lora_scripts.models import single_file

    return single_file.empty_modules(found)


def _files_of(found: Signature, modules: Mapping[str, nn.Module]) -> dict[str, Files]:
    """Of a single file each tensor is copied, and a piece is mapped at a time."""
    if found.layout == "ldm":
        return dict.fromkeys(modules, Files(min(found.path.stat().st_size, filling.PIECE), None))
    paths = {name: weight_files(found.path / name, found.variant) for name in modules}
    return {
        name: Files(sum(path.stat().st_size for path in own), _dtype_of(own))
        for name, own in paths.items()
    }


def _dtype_of(paths: list[Path]) -> torch.dtype | None:
    """The type of the largest tensor of a part's first file."""
    if paths[0].suffix != ".safetensors":
        return None
    tensors = header.read_header(paths[0]).values()
    largest = max(tensors, key=lambda info: _count(info.shape))
    return filling.STORED.get(largest.dtype)


def _count(shape: tuple[int, ...]) -> int:
    numbers = 1
    for side in shape:
        numbers *= side
    return numbers
