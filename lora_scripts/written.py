"""What a run will write, in bytes: checkpoints and finished files from the layers' shapes alone.

Samples and logs are rough. Nothing is loaded, nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_scripts import belonging
from lora_scripts.belonging import Base
from lora_scripts.data.rows import AnyRows
from lora_scripts.models.signature import Signature
from lora_scripts.schema import Config, ImageConfig, TextConfig

if TYPE_CHECKING:
    import torch

BESIDE_LIMIT = 2  # checkpoints beside save_total_limit: the best, and one that is being written

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_HEADER = 150  # bytes of a file's header for a tensor
_PICTURE = 3  # bytes of a sample's pixel, in its PNG and in TensorBoard
_LOG_STEP = 600  # bytes of a step in metrics.jsonl and TensorBoard
_TOKEN = 5  # bytes of a token in the cache: its id, and whether it is learned
_LATENT = 8  # pixels of a side that one of a latent stands for
_CHANNELS = 4
_CLIP_TOKENS = 77  # of 75 tokens of a caption
_TOKENIZER = 20_000_000  # that of a .gguf file, written anew as tokenizer.json
_TABLES = 2 * 256 * 4  # of bitsandbytes' 8-bit states: shared in memory, a copy each in a file


@dataclass(frozen=True)
class Outlook:
    """What a run will write at most, in bytes.

    Attributes:
        checkpoint: One checkpoint.
        checkpoints: How many lie there at once, at most.
        made: How many are made.
        export: The finished files.
        beside: Samples, TensorBoard and metrics; roughly.
        cache: Encoded data.
    """

    checkpoint: int
    checkpoints: int
    made: int
    export: int
    beside: int
    cache: int

    @property
    def least(self) -> int:
        """Without this much room no LoRA comes out."""
        return self.checkpoint + self.export

    @property
    def output(self) -> int:
        """All that goes into the output folder."""
        return self.checkpoint * self.checkpoints + self.export + self.beside


def foresee(config: Config, rows: AnyRows, base: Base | None) -> Outlook | None:
    """What a run will write; None if the base model's layers are not known before it is fetched.

    Args:
        config: Checked.
        rows: As `preflight.inputs` gives them.
        base: As `belonging.find` gives it.
    """
    tensors = None if base is None else trained(config, base)
    if base is None or tensors is None:
        return None
    numbers = sum(tensor.numel() for tensor in tensors.values())
    header = len(tensors) * _HEADER
    ready = numbers * _BYTES[config.save_dtype] + header
    averages = 2 if config.ema_decay else 1
    training = 4 * averages * numbers + 4 * header + state_bytes(config.optimizer, tensors)
    steps = planned_steps(config, rows)
    made = saves(config, steps)
    return Outlook(
        checkpoint=training + ready,
        checkpoints=min(made, (config.save_total_limit or made) + BESIDE_LIMIT),
        made=made,
        export=ready * 2 if isinstance(config, ImageConfig) else ready + _tokenizer(base),
        beside=_samples(config, steps) + steps * _LOG_STEP,
        cache=_cache(config, rows, base),
    )


# --- what is trained ------------------------------------------------------------------------------


def trained(config: Config, base: Base) -> dict[str, torch.Tensor] | None:
    """All tensors that are trained, without their numbers (on the meta device), by name.

    None if only the model's own code knows the layers.
    """
    modules = belonging.modules_of(base)
    if modules is None:
        return None
    if isinstance(config, TextConfig):
        from lora_scripts.models import causal_lm

        targets = {"model": causal_lm.targets(modules["model"], config.lora_targets).adapted}
    else:
        from lora_scripts.models import unet

        if not config.train_text_encoder:
            modules = {"unet": modules["unet"]}
        targets = dict(unet.targets(modules, config.lora_targets))
    return {
        f"{part}.{path}{name}": tensor
        for part, paths in targets.items()
        for path in paths
        for name, tensor in _adapter(modules[part].get_submodule(path), config).items()
    }


def _adapter(layer: Any, config: Config) -> dict[str, torch.Tensor]:
    """The matrices of a layer's adapter, and DoRA's magnitudes."""
    import torch

    outputs, inputs = belonging.outputs_and_inputs(layer)
    kernel = tuple(layer.weight.shape[2:])
    rank = config.lora_rank
    shapes = {
        ".lora_A.weight": (rank, inputs, *kernel),
        ".lora_B.weight": (outputs, rank, *(1 for _ in kernel)),
    }
    if config.lora_type == "dora":
        shapes[".magnitude"] = (outputs,)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def state_bytes(optimizer: str, parameters: Mapping[str, torch.Tensor]) -> int:
    """What an optimizer keeps of trained tensors in a checkpoint, their headers left out."""
    from lora_scripts.memory import optimizers

    in_blocks = [t for t in parameters.values() if t.numel() >= optimizers.SMALLEST_IN_8_BITS]
    tables = len(in_blocks) * _TABLES if optimizer == "adamw8bit" else 0
    return sum(optimizers.state_bytes(optimizer, parameters)) + tables


# --- how much of it -------------------------------------------------------------------------------


def planned_steps(config: Config, rows: AnyRows) -> int:
    """About how many optimizer steps a run takes; raw texts in windows take more."""
    learned = [part for part in rows.parts if part[1].role != "validation"]
    views = sum(len(records) * float(data.weight) for records, data in learned)
    shown = views * (1 - config.validation_split)
    batch = 1 if config.batch_size == "auto" else config.batch_size
    steps = math.ceil(shown / (batch * config.gradient_accumulation_steps)) * config.epochs
    return max(1, min(steps, config.max_train_steps or steps))


def saves(config: Config, steps: int) -> int:
    """How many checkpoints are made: those that are due, the last one, the best one."""
    due = (steps - 1) // config.save_steps if config.save_steps else 0
    by_epoch = (config.epochs - 1) // config.save_every_epochs if config.save_every_epochs else 0
    best = 1 if config.validation_split else 0
    return due + by_epoch + 1 + best


def _samples(config: Config, steps: int) -> int:
    if not isinstance(config, ImageConfig):
        return 0
    rounds = 2 + (steps - 1) // config.sample_steps
    side = config.resolution
    pixels = sum((p.width or side) * (p.height or side) for p in config.sample_prompts)
    return rounds * pixels * _PICTURE


def _tokenizer(base: Base) -> int:
    """The tokenizer's files, which go into the finished folder of a text run."""
    if base.path.is_file():
        return _TOKENIZER
    return sum(f.stat().st_size for f in base.path.glob("tokenizer*") if f.is_file())


def _cache(config: Config, rows: AnyRows, base: Base) -> int:
    if isinstance(config, TextConfig):
        characters: int = sum(records.characters for records, _ in rows.parts)
        return characters * _TOKEN  # a token is at least a character
    assert isinstance(base, Signature)
    latents = prompts = 0
    if config.cache_latents is True or (config.cache_latents == "auto" and not config.random_crop):
        side = config.resolution / _LATENT
        latents = round(len(rows) * 2 * _CHANNELS * side * side * 4)  # mean and deviation, float32
        latents *= 2 if config.random_flip else 1
    if not (config.shuffle_tags or config.tag_dropout or config.train_text_encoder):
        tokens = _CLIP_TOKENS * config.max_caption_tokens // 75
        captions = (hash(text) for record, _ in rows for text in record.captions)
        hashes = np.sort(np.fromiter(captions, np.int64))
        different = int(np.count_nonzero(hashes[1:] != hashes[:-1])) + 2  # and the empty one
        prompts = different * tokens * base.cross_attention_dim * 4
    return latents + prompts
