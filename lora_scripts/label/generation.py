"""What the captioners that write text have in common: loading, and generating by `Settings`.

Suffixes: B pictures (times beams), V vocabulary, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_scripts.device import Compute, choose
from lora_scripts.errors import user_error
from lora_scripts.label.settings import Settings
from lora_scripts.randomness import generator, seed_of

# What transformers raises on a folder that is damaged or holds another model.
_UNREADABLE = (
    ImportError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
)


def compute_on(device: str) -> Compute:
    """float32 on a CPU; on a card bf16, or fp16 where bf16 is not native.

    Raises:
        UserError: CUDA is asked for and not there.
    """
    plain = choose(device, "no")
    return plain if plain.device.type == "cpu" else choose(device, "auto")


def open_model(cls: Any, path: Path, compute: Compute) -> Any:
    """A transformers model of the class `cls`, all of it from the folder. No network, no pickle.

    Raises:
        UserError: The folder's weights are not those of this class.
    """
    try:
        model, found = cls.from_pretrained(
            path,
            dtype=compute.dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except _UNREADABLE as error:
        raise user_error(str(path), f"the weights cannot be loaded: {error}") from None
    missing = sorted(found["missing_keys"])
    if missing:
        what = (
            f"the weights of {len(missing)} parts of the model are not there, {missing[0]!r} the "
            "first of them: this folder holds another kind of model, or half of one"
        )
        raise user_error(str(path), what)
    return model.eval().to(compute.device)


def tensors(inputs: Any, compute: Compute) -> dict[str, torch.Tensor]:
    """A processor's output where the model is, its pixels in the precision of the weights."""
    return {
        name: value.to(compute.device, compute.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def arguments(
    settings: Settings, pictures: Sequence[Image.Image], *, max_new_tokens: int
) -> dict[str, Any]:
    """What `generate` of a transformers model is told; None is left to the model's own files.

    Args:
        settings: The user's.
        pictures: What is looked at, in the order of the batch.
        max_new_tokens: How long a caption may get where the user does not say.
    """
    told: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": settings.max_new_tokens or max_new_tokens,
    }
    if settings.temperature:
        told |= {"num_beams": 1, "logits_processor": [Draw(settings, pictures)]}
    elif settings.num_beams is not None:
        told["num_beams"] = settings.num_beams
    return told


class Draw:
    """Makes the likeliest token a drawn one, by noise that depends on the picture alone.

    The greatest of logits / temperature + Gumbel noise is a draw from the softmax of logits /
    temperature (Gumbel 1954; Maddison et al. 2014, "A* Sampling"). The noise of each token follows
    from the seed, the picture's pixels and the place in the caption, so that neither the batch nor
    a resumed run changes a caption.
    """

    def __init__(self, settings: Settings, pictures: Sequence[Image.Image]) -> None:
        assert settings.temperature
        self.temperature = settings.temperature
        self.top_p = 1.0 if settings.top_p is None else settings.top_p
        self.seeds = [seed_of(settings.seed, "caption", picture_hash(p)) for p in pictures]
        self.place = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits_BV = scores.float() / self.temperature
        logits_BV = likeliest(logits_BV, self.top_p)
        noise_BV = torch.stack([self._noise(seed, logits_BV.shape[1]) for seed in self.seeds])
        self.place += 1
        return logits_BV + noise_BV.to(logits_BV.device)

    def _noise(self, seed: int, vocabulary: int) -> torch.Tensor:
        """Gumbel noise, one number a token: -log E for E of the exponential distribution."""
        drawn_V = torch.empty(vocabulary, dtype=torch.float32)
        return -drawn_V.exponential_(generator=generator(seed, self.place)).log()


def likeliest(logits_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Logits with -inf for all but the likeliest tokens that together reach the probability.

    Nucleus sampling (Holtzman et al. 2019): of the tokens sorted by probability the shortest
    beginning whose sum is at least `top_p`.
    """
    if top_p >= 1:
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    probability_BV = sorted_BV.softmax(dim=-1)
    before_BV = probability_BV.cumsum(dim=-1) - probability_BV
    kept_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(-1, order_BV, before_BV < top_p)
    return logits_BV.masked_fill(~kept_BV, -torch.inf)


def picture_hash(picture: Image.Image) -> str:
    """A hash of size, mode and pixels."""
    digest = hashlib.blake2b(f"{picture.mode} {picture.size}".encode(), digest_size=16)
    digest.update(picture.tobytes())
    return digest.hexdigest()
