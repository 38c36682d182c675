"""From a config to a loaded task: the one place that chooses what is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.data.rows import AnyRows
from lora_scripts.device import Compute
from lora_scripts.models import hub
from lora_scripts.models.family import ImageFamily, Options
from lora_scripts.models.signature import Signature, read_signature
from lora_scripts.models.text_signature import (
    UNWANTED,
    WANTED,
    TextSignature,
    read_text_signature,
)
from lora_scripts.schema import Config, ImageConfig, TextConfig

if TYPE_CHECKING:  # each task loads the libraries it needs
    from lora_scripts.models.causal_lm import CausalLM
    from lora_scripts.tasks.diffusion import DiffusionTask
    from lora_scripts.tasks.language import LanguageTask


def find_base(base_model: str) -> Signature:
    """Where an image model lies (fetched from the hub if it is not here) and what it is.

    Raises:
        UserError: if it is not to be had, or of a family this version does not train.
    """
    path = hub.local_path(base_model)
    return read_signature(hub.fetch(base_model) if path is None else path)


def find_text_base(base_model: str, *, with_code: bool = False) -> TextSignature:
    """Where a language model lies (fetched from the hub if it is not here) and what it is.

    `with_code` fetches the Python files that come with a model, too.

    Raises:
        UserError: if it is not to be had or cannot be taken.
    """
    path = hub.local_path(base_model)
    if path is None:
        wanted = (*WANTED, "*.py") if with_code else WANTED
        path = hub.fetch(base_model, wanted, UNWANTED)
    return read_text_signature(path)


def load_family(
    found: Signature, compute: Compute, options: Options | None = None, *, resting: bool = False
) -> ImageFamily:
    """Read an image model into memory; with `resting`, its encoders only while they are needed."""
    options = options or Options()
    match found.family:
        case "sd1" | "sd2":
            from lora_scripts.models import sd

            return sd.load(found, compute, options, resting=resting)
        case "sdxl":
            from lora_scripts.models import sdxl

            return sdxl.load(found, compute, options, resting=resting)


def options_of(config: ImageConfig) -> Options:
    """How the base model of a run is taken."""
    return Options(
        vae=config.vae,
        prediction_type=config.prediction_type,
        zero_terminal_snr=config.zero_terminal_snr,
        clip_skip=config.clip_skip,
        max_caption_tokens=config.max_caption_tokens,
    )


def load_text(config: TextConfig, compute: Compute) -> CausalLM:
    """Read a language model into memory, as a config says."""
    from lora_scripts.models import causal_lm

    found = find_text_base(config.base_model, with_code=config.trust_remote_code)
    return causal_lm.load(
        found,
        compute,
        trust_remote_code=config.trust_remote_code,
        quantization=config.quantization,
    )


def build(config: Config, rows: AnyRows, compute: Compute) -> DiffusionTask | LanguageTask:
    """The task of a config: model loaded, data dealt out; not yet encoded, no LoRA yet.

    `rows`: records of the config's kind, each with the dataset that it came from.
    """
    match config:
        case ImageConfig():
            from lora_scripts.data import images
            from lora_scripts.tasks.diffusion import DiffusionTask

            family = load_family(
                find_base(config.base_model), compute, options_of(config), resting=True
            )
            return DiffusionTask(config, family, images.gather(rows, config, family.pixel_multiple))
        case TextConfig():
            from lora_scripts.tasks.language import LanguageTask

            return LanguageTask(config, load_text(config, compute), rows)
