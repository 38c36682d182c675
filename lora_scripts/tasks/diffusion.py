"""Text-to-image: pictures and captions become batches, batches a loss on a family's denoiser.

Tensor suffixes: B batch, C channels, H height, W width (latent), T training timesteps.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import nn
from torch.nn import functional

from lora_scripts.data import cache
from lora_scripts.data.images import Gathered
from lora_scripts.data.pictures import Picture
from lora_scripts.data.views import PictureSet
from lora_scripts.device import Compute
from lora_scripts.errors import Problem, UserError, user_error
from lora_scripts.files import file_hash
from lora_scripts.models import lora, lora_file, sharding
from lora_scripts.models.family import Conditioning, DrawRequest, ImageFamily
from lora_scripts.randomness import generator, seed_of
from lora_scripts.schema import ImageConfig, SamplePrompt
from lora_scripts.tasks import image_metadata
from lora_scripts.tasks.going_on import noted, start_from
from lora_scripts.tasks.image_views import Progress, ViewReader, parts_of
from lora_scripts.tasks.noising import diffuse, min_snr_weight
from lora_scripts.tasks.task import Batch, Indices, Key, Loss

MEASURED_VIEWS = 16  # forward passes of one held-out measurement, spread over pictures and noise
MEASURED_TRAINING_PICTURES = 8  # when nothing is held out
FEW_STEPS = 300
FEW_VIEWS = 15


class DiffusionTask:
    """Learns the pictures of a folder as a LoRA on a text-to-image model."""

    def __init__(self, config: ImageConfig, family: ImageFamily, data: Gathered) -> None:
        _check_sample_sizes(config, family.pixel_multiple)
        self.config = config
        self.batch = config.micro_batch
        self.family = family
        self.train_set = PictureSet.repeated(data.train, data.regularisation)
        self.held_out = len(data.validation) > 0
        measured = data.validation if self.held_out else data.train[:MEASURED_TRAINING_PICTURES]
        self.validation_set = PictureSet.measured(measured, MEASURED_VIEWS)
        self.reader = ViewReader(config, family)
        self.fingerprint: Mapping[str, str] = {
            "data": _data_id(self.train_set, self.validation_set),
            "base_model": _base_id(family),
            **noted(lora_file.locate(config.init_lora) if config.init_lora else None),
        }

    @property
    def adapted(self) -> Mapping[str, nn.Module]:
        adapted = self.family.adapted
        if self.config.train_text_encoder:
            return adapted
        denoiser, *_ = adapted
        return {denoiser: adapted[denoiser]}

    @property
    def learning_rates(self) -> Mapping[str, float]:
        denoiser, *others = self.adapted
        of_others = dict.fromkeys(others, self.config.text_encoder_learning_rate)
        return {denoiser: self.config.learning_rate, **of_others}

    @property
    def items(self) -> int:
        """How many different pictures are learned from."""
        return len(self.train_set.pictures)

    def describe(self) -> str:
        """The data in a few words."""
        buckets = Counter(picture.bucket for picture in self.train_set.pictures)
        sizes = ", ".join(f"{w}×{h}: {count}" for (w, h), count in sorted(buckets.items()))
        held_out = len(self.validation_set.pictures) if self.held_out else "none"
        kept = len(np.unique(self.train_set.regularisation.numbers))
        beside = f", {kept} for regularisation" if kept else ""
        return f"{self.items} pictures ({sizes}){beside}, {held_out} held out"

    def inventory(self) -> Iterator[tuple[str, str]]:
        """Where each picture lies, and a hash of its part in the run."""
        shown = self.train_set.pictures.joined(self.train_set.regularisation)
        if self.held_out:
            shown = shown.joined(self.validation_set.pictures)
        return ((p.record.file, cache.key_of(_picture_id(p))) for p in shown)

    def advice(self, steps: int, views: float) -> str | None:
        """What a person with so few steps, or views of each picture, should know."""
        if steps >= FEW_STEPS and views >= FEW_VIEWS:
            return None
        return (
            f"That is little: a LoRA seldom takes shape in fewer than {FEW_STEPS} steps or "
            f"{FEW_VIEWS} views of each sample. Raise epochs or repeats, or lower batch_size."
        )

    def attach(self) -> None:
        """Freeze the model and put the LoRA on it."""
        targets = self.family.targets(self.config.lora_targets)
        _check_targets(self.adapted, targets, self.config.lora_targets)
        for component, module in self.adapted.items():
            lora.attach(
                module,
                targets[component],
                rank=self.config.lora_rank,
                alpha=self.config.lora_alpha,
                dropout=self.config.lora_dropout,
                seed=seed_of(self.config.seed, "lora", component),
                kind=self.config.lora_type,
            )
        if self.config.init_lora is not None:
            finished = lora_file.read(self.config.init_lora, self.family)
            start_from(self.config.init_lora, self.adapted, finished)
        if self.config.gradient_checkpointing:
            self.family.checkpoint_gradients()

    def shard(self, compute: Compute) -> None:
        for component, module in self.adapted.items():
            sharding.shard(module, self.family.units(component), compute)

    def encode(self, progress: Progress) -> None:
        """Encode every picture and caption that is to be cached and is not in the cache yet."""
        learned = self.train_set.pictures.joined(self.train_set.regularisation)
        self.reader.encode(learned, self.validation_set.pictures, progress)

    def plan(self, key: Key) -> Sequence[Indices]:
        size = self.batch
        return self._set_of(key).batches(size, key.seed, key.split, "order", epoch=key.epoch)

    def load(self, indices: Indices, key: Key) -> Batch:
        pictures = self._set_of(key)
        rows = [self.reader.read(pictures.at(index), index, key) for index in indices]
        batch: dict[str, Any] = {"indices": indices}
        for name in ("mean", "std", "pixels", "mask"):
            if name in rows[0]:
                batch[name] = torch.stack([row[name] for row in rows])
        told = [row["told"] for row in rows]
        if self.reader.prompts_are_cached:
            found = self.family.collate(told)
            batch |= {f"conditioning.{name}": tensor for name, tensor in found.items()}
        else:
            batch["tokens"] = told
        frames = [row["frame"] for row in rows]
        batch |= {f"conditioning.{n}": torch.stack([f[n] for f in frames]) for n in frames[0]}
        return batch

    def place(self, index: int, key: Key) -> str:
        return self._set_of(key).at(index).record.file

    def loss(self, batch: Batch, key: Key) -> Loss:
        """Squared error of noise or velocity: a mean over each latent, a weighted sum over B.

        With masks the error of each latent pixel is weighed by the mask, and so is the count: the
        loss is the mean over what is learned.
        """
        mean_BCHW, std_BCHW = self._latents(batch)
        device = mean_BCHW.device
        alphas_cumprod_T = self.family.alphas_cumprod_T.to(device)
        draws = [self._draw(index, key, mean_BCHW.shape[1:]) for index in batch["indices"]]
        spreads, noises, timesteps = zip(*draws, strict=True)
        spread_BCHW = torch.stack(spreads).to(device)
        noise_BCHW = torch.stack(noises).to(device)
        timesteps_B = torch.tensor(timesteps, device=device)
        latents_BCHW = mean_BCHW + std_BCHW * spread_BCHW
        signal_B = alphas_cumprod_T[timesteps_B]
        noisy_BCHW, target_BCHW = diffuse(
            latents_BCHW, noise_BCHW, signal_B, self.family.prediction
        )
        output_BCHW = self.family.predict(
            noisy_BCHW, timesteps_B, self._conditioning(batch, device)
        )
        error_BCHW = (output_BCHW.float() - target_BCHW).square()
        weight_B = share_B = self._weights(batch["indices"], key)
        if "mask" in batch:
            height, width = error_BCHW.shape[-2:]
            mask_B1HW = functional.adaptive_avg_pool2d(batch["mask"], (height, width))
            error_BCHW = error_BCHW * mask_B1HW
            share_B = weight_B * mask_B1HW.mean(dim=(1, 2, 3)).cpu()
        error_B = error_BCHW.mean(dim=(1, 2, 3))
        if self.config.min_snr_gamma is not None:
            error_B = error_B * min_snr_weight(
                signal_B, self.config.min_snr_gamma, self.family.prediction
            )
        return Loss(total=(weight_B.to(device) * error_B).sum(), count=float(share_B.sum()))

    def _latents(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the latents, from the cache or from the pixels, one by one."""
        if "mean" in batch:
            return batch["mean"], batch["std"]
        with torch.no_grad(), torch.autocast(batch["pixels"].device.type, enabled=False):
            encoded = [self.family.encode_image(pixels_CHW) for pixels_CHW in batch["pixels"]]
        device = batch["pixels"].device
        means, deviations = zip(*encoded, strict=True)
        return torch.stack(means).to(device), torch.stack(deviations).to(device)

    def _conditioning(self, batch: Batch, device: torch.device) -> Conditioning:
        """What the denoiser is told: cached, or encoded now, with gradients where it is trained."""
        conditioning = {
            name.removeprefix("conditioning."): tensor
            for name, tensor in batch.items()
            if name.startswith("conditioning.")
        }
        if "tokens" not in batch:
            return conditioning
        if self.config.train_text_encoder:
            return {**self.family.encode_tokens(batch["tokens"]), **conditioning}
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return {**self.family.encode_tokens(batch["tokens"]), **conditioning}

    def _weights(self, indices: Indices, key: Key) -> torch.Tensor:
        """The weight of each view's loss, shape B, on the CPU."""
        pictures = self._set_of(key)
        prior = self.config.prior_loss_weight
        return torch.tensor([prior if pictures.is_regularisation(i) else 1.0 for i in indices])

    def release(self) -> None:
        """Let go of the model, so that another fits into memory."""
        del self.family, self.reader

    def sample(self, key: Key) -> Mapping[str, Image | str]:
        return {
            f"{number:02d}": self.family.draw(self._request(prompt, key))
            for number, prompt in enumerate(self.config.sample_prompts)
        }

    def metadata(self) -> dict[str, str]:
        return {
            **self.family.metadata(),
            **image_metadata.describe(self.config, self.train_set),
            "lora_scripts.base_model_hash": self.fingerprint["base_model"],
            "lora_scripts.trigger_word": self.config.trigger_word or "",
        }

    def _set_of(self, key: Key) -> PictureSet:
        return self.train_set if key.split == "train" else self.validation_set

    def _draw(
        self, index: int, key: Key, shape: torch.Size
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Spread within the latent's distribution, noise, and timestep of one view."""
        source = generator(*parts_of(key), index, "noise")
        spread_CHW = torch.randn(shape, generator=source)
        noise_CHW = torch.randn(shape, generator=source)
        if self.config.noise_offset:
            shift = generator(*parts_of(key), index, "noise offset")
            noise_CHW += self.config.noise_offset * torch.randn(shape[0], 1, 1, generator=shift)
        count = len(self.family.alphas_cumprod_T)
        if key.split == "train":
            timestep = int(torch.randint(count, (), generator=source))
        else:  # evenly spread, the same every time
            timestep = int((index + 0.5) / len(self.validation_set) * count)
        return spread_CHW, noise_CHW, timestep

    def _request(self, prompt: SamplePrompt, key: Key) -> DrawRequest:
        return DrawRequest(
            prompt=prompt.prompt,
            negative_prompt=prompt.negative_prompt,
            guidance_scale=prompt.guidance_scale,
            steps=prompt.steps,
            width=prompt.width or self.config.resolution,
            height=prompt.height or self.config.resolution,
            seed=key.seed if prompt.seed is None else prompt.seed,
        )


def _check_sample_sizes(config: ImageConfig, multiple: int) -> None:
    """Sides of sample pictures that the model cannot draw would fail in the middle of a run."""
    problems = [
        Problem(
            "sample_prompts", f"found the {side} {value}; this model needs a multiple of {multiple}"
        )
        for prompt in config.sample_prompts
        for side, value in (("width", prompt.width), ("height", prompt.height))
        if value is not None and value % multiple
    ]
    if problems:
        raise UserError(problems)


def _check_targets(
    adapted: Collection[str], targets: Mapping[str, Sequence[str]], chosen: object
) -> None:
    """Names of layers that leave out a module which is to be trained."""
    for component in adapted:
        if not targets[component]:
            what = f"found {chosen}; none of these is a layer of {component}, which is trained"
            raise user_error("lora_targets", what)


def _data_id(*sets: PictureSet) -> str:
    """A hash of everything that is learned from or measured."""
    shown = (_picture_id(picture) for part in sets for picture in part.pictures)
    kept = (("kept", *_picture_id(picture)) for part in sets for picture in part.regularisation)
    return cache.key_of(itertools.chain(shown, kept))


def _picture_id(picture: Picture) -> tuple[object, ...]:
    """What a picture's part in the run depends on; for plain ones as in earlier versions."""
    captions = picture.captions if len(picture.captions) > 1 else picture.captions[0]
    weight = int(picture.weight) if picture.weight.is_integer() else picture.weight
    if picture.mask is None:
        return picture.content, captions, picture.bucket, weight
    return picture.content, captions, picture.bucket, weight, file_hash(picture.mask)


def _base_id(family: ImageFamily) -> str:
    """A hash of the base model's weights as they are held in memory."""
    return cache.key_of(family.denoiser_id, family.image_encoder_id, family.text_encoder_id)
