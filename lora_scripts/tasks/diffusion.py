"""Text-to-image: a family's denoiser, its noise schedule, and the weighting of the loss.

Tensor suffixes: B batch, C channels, H height, W width (latent), T training timesteps.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from PIL.Image import Image
from torch import nn

from lora_scripts.data import cache
from lora_scripts.data.images import Gathered, Picture, PictureSet, pixels_of
from lora_scripts.errors import Problem, UserError
from lora_scripts.models import lora
from lora_scripts.models.family import DrawRequest, ImageFamily, Prediction
from lora_scripts.randomness import generator, seed_of
from lora_scripts.schema import ImageConfig, SamplePrompt
from lora_scripts.tasks.task import Batch, Indices, Key, Loss

MEASURED_VIEWS = 16  # forward passes of one held-out measurement, spread over pictures and noise
MEASURED_TRAINING_PICTURES = 8  # when nothing is held out
FEW_STEPS = 300
FEW_VIEWS = 15

Progress = Callable[[str, int, int], None]


class DiffusionTask:
    """Learns the pictures of a folder as a LoRA on a text-to-image model."""

    def __init__(self, config: ImageConfig, family: ImageFamily, data: Gathered) -> None:
        _check_sample_sizes(config, family.pixel_multiple)
        self.config = config
        self.family = family
        self.train_set = PictureSet.repeated(data.train)
        self.held_out = bool(data.validation)
        measured = data.validation or data.train[:MEASURED_TRAINING_PICTURES]
        self.validation_set = PictureSet.measured(measured, MEASURED_VIEWS)
        self.latents = cache.Cache(config.cache_dir, "latents")
        self.prompts = cache.Cache(config.cache_dir, "prompts")
        self.fingerprint: Mapping[str, str] = {
            "data": _data_id(self.train_set, self.validation_set),
            "base_model": _base_id(family),
        }

    @property
    def adapted(self) -> Mapping[str, nn.Module]:
        trained = self.family.adapted if self.config.train_text_encoder else ("unet",)
        return {name: self.family.adapted[name] for name in trained}

    @property
    def items(self) -> int:
        """How many different pictures are learned from."""
        return len(self.train_set.pictures)

    def describe(self) -> str:
        """The data in a few words."""
        buckets = Counter(picture.bucket for picture in self.train_set.pictures)
        sizes = ", ".join(f"{w}×{h}: {count}" for (w, h), count in sorted(buckets.items()))
        held_out = len(self.validation_set.pictures) if self.held_out else "none"
        return f"{self.items} pictures ({sizes}), {held_out} held out"

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
        for component, module in self.adapted.items():
            lora.attach(
                module,
                targets[component],
                rank=self.config.lora_rank,
                alpha=self.config.lora_alpha,
                dropout=self.config.lora_dropout,
                seed=seed_of(self.config.seed, "lora", component),
            )
        if self.config.gradient_checkpointing:
            self.family.checkpoint_gradients()

    def encode(self, progress: Progress) -> None:
        """Encode every picture and caption that is not in the cache yet."""
        pictures = (*self.train_set.pictures, *self.validation_set.pictures)
        mirrors = (False, True) if self.config.random_flip else (False,)
        jobs = {self._latent_key(p, mirrored=m): (p, m) for p in pictures for m in mirrors}

        def encode_picture(key: str) -> Mapping[str, torch.Tensor]:
            picture, mirrored = jobs[key]
            mean_CHW, std_CHW = self.family.encode_image(pixels_of(picture, mirrored=mirrored))
            return {"mean": mean_CHW, "std": std_CHW}

        with self.family.visiting("image"):
            cache.fill(self.latents, jobs, encode_picture, _named("pictures", progress))

        texts = {self._prompt_key(text): text for text in ("", *(p.caption for p in pictures))}
        with self.family.visiting("text"):
            cache.fill(
                self.prompts,
                texts,
                lambda key: self.family.encode_prompt(texts[key]),
                _named("captions", progress),
            )

    def plan(self, key: Key) -> Sequence[Indices]:
        batch_size = self.config.batch_size
        return self._set_of(key).batches(batch_size, key.seed, key.split, "order", key.epoch)

    def load(self, indices: Indices, key: Key) -> Batch:
        rows = [self._load_view(index, key) for index in indices]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | {
            "indices": indices
        }

    def _load_view(self, index: int, key: Key) -> dict[str, torch.Tensor]:
        """One view's latent distribution and conditioning; flip and dropout follow from `key`."""
        picture = self._set_of(key).at(index)
        mirrored, dropped = False, False
        if key.split == "train":
            choice = torch.rand(2, generator=generator(*_parts(key), index, "view"))
            mirrored = self.config.random_flip and bool(choice[0] < 0.5)
            dropped = bool(choice[1] < self.config.caption_dropout)
        latent = self.latents.read(self._latent_key(picture, mirrored=mirrored))
        prompt = self.prompts.read(self._prompt_key("" if dropped else picture.caption))
        return {**latent, **{f"conditioning.{name}": t for name, t in prompt.items()}}

    def loss(self, batch: Batch, key: Key) -> Loss:
        """Squared error of the noise or the velocity, averaged over each latent, summed over B."""
        mean_BCHW, std_BCHW = batch["mean"], batch["std"]
        alphas_cumprod_T = self.family.alphas_cumprod_T.to(mean_BCHW.device)
        draws = [self._draw(index, key, mean_BCHW.shape[1:]) for index in batch["indices"]]
        spreads, noises, timesteps = zip(*draws, strict=True)
        spread_BCHW = torch.stack(spreads).to(mean_BCHW.device)
        noise_BCHW = torch.stack(noises).to(mean_BCHW.device)
        timesteps_B = torch.tensor(timesteps, device=mean_BCHW.device)
        latents_BCHW = mean_BCHW + std_BCHW * spread_BCHW
        signal_B = alphas_cumprod_T[timesteps_B]
        noisy_BCHW, target_BCHW = diffuse(
            latents_BCHW, noise_BCHW, signal_B, self.family.prediction
        )
        conditioning = {
            name.removeprefix("conditioning."): tensor
            for name, tensor in batch.items()
            if name.startswith("conditioning.")
        }
        output_BCHW = self.family.predict(noisy_BCHW, timesteps_B, conditioning)
        error_B = (output_BCHW.float() - target_BCHW).square().mean(dim=(1, 2, 3))
        if self.config.min_snr_gamma is not None:
            error_B = error_B * min_snr_weight(
                signal_B, self.config.min_snr_gamma, self.family.prediction
            )
        return Loss(total=error_B.sum(), count=len(batch["indices"]))

    def release(self) -> None:
        """Let go of the model, so that another fits into memory."""
        del self.family

    def sample(self, key: Key) -> Mapping[str, Image | str]:
        return {
            f"{number:02d}": self.family.draw(self._request(prompt, key))
            for number, prompt in enumerate(self.config.sample_prompts)
        }

    def metadata(self) -> dict[str, str]:
        buckets = Counter(self.train_set.at(view).bucket for view in range(len(self.train_set)))
        tags: dict[str, Counter[str]] = {}
        for picture in self.train_set.pictures:
            folder = tags.setdefault(picture.record.path.parent.name, Counter())
            folder.update(tag.strip() for tag in picture.caption.split(",") if tag.strip())
        folders = Counter(p.record.path.parent.name for p in self.train_set.pictures)
        return {
            **self.family.metadata(),
            "ss_sd_model_name": self.config.base_model,
            "ss_resolution": f"({self.config.resolution}, {self.config.resolution})",
            "ss_num_train_images": str(len(self.train_set)),
            "ss_dataset_dirs": json.dumps(
                {name: {"n_repeats": 1, "img_count": count} for name, count in folders.items()}
            ),
            "ss_bucket_info": json.dumps(
                {
                    "buckets": {
                        str(i): {"resolution": list(size), "count": count}
                        for i, (size, count) in enumerate(sorted(buckets.items()))
                    }
                }
            ),
            "ss_tag_frequency": json.dumps(tags, ensure_ascii=False),
            "lora_scripts.base_model_hash": self.fingerprint["base_model"],
            "lora_scripts.trigger_word": self.config.trigger_word or "",
        }

    def _set_of(self, key: Key) -> PictureSet:
        return self.train_set if key.split == "train" else self.validation_set

    def _draw(
        self, index: int, key: Key, shape: torch.Size
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Spread within the latent's distribution, noise, and timestep of one view."""
        source = generator(*_parts(key), index, "noise")
        spread_CHW = torch.randn(shape, generator=source)
        noise_CHW = torch.randn(shape, generator=source)
        count = len(self.family.alphas_cumprod_T)
        if key.split == "train":
            timestep = int(torch.randint(count, (), generator=source))
        else:  # evenly spread, the same every time
            timestep = int((index + 0.5) / len(self.validation_set) * count)
        return spread_CHW, noise_CHW, timestep

    def _latent_key(self, picture: Picture, *, mirrored: bool) -> str:
        return cache.key_of(picture.content, picture.bucket, mirrored, self.family.image_encoder_id)

    def _prompt_key(self, text: str) -> str:
        return cache.key_of(text, self.family.text_encoder_id)

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


def diffuse(
    latents_BCHW: torch.Tensor,
    noise_BCHW: torch.Tensor,
    signal_B: torch.Tensor,
    prediction: Prediction,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The noisy latent and the training target at signal level ᾱ = `signal_B`.

    x_t = √ᾱ x₀ + √(1−ᾱ) ε (Ho et al. 2020, arXiv 2006.11239, eq. 4); the target is ε, or the
    velocity √ᾱ ε − √(1−ᾱ) x₀ (Salimans & Ho 2022, arXiv 2202.00512, appendix D).
    """
    signal_B111 = signal_B.sqrt()[:, None, None, None]
    noise_B111 = (1 - signal_B).sqrt()[:, None, None, None]
    noisy_BCHW = signal_B111 * latents_BCHW + noise_B111 * noise_BCHW
    if prediction == "epsilon":
        return noisy_BCHW, noise_BCHW
    return noisy_BCHW, signal_B111 * noise_BCHW - noise_B111 * latents_BCHW


def min_snr_weight(signal_B: torch.Tensor, gamma: float, prediction: Prediction) -> torch.Tensor:
    """Min-SNR-γ weights, shape B (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    min(snr, γ) / snr for ε and min(snr, γ) / (snr + 1) for v, with snr = ᾱ / (1 − ᾱ). At zero
    signal the weight for ε is its limit, 1.
    """
    snr_B = signal_B / (1 - signal_B)
    if prediction == "epsilon":
        return (gamma / snr_B).clamp(max=1)
    return snr_B.clamp(max=gamma) / (snr_B + 1)


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


def _data_id(*sets: PictureSet) -> str:
    """A hash of everything that is learned from or measured."""
    return cache.key_of(
        [(p.content, p.caption, p.bucket, p.repeats) for part in sets for p in part.pictures]
    )


def _base_id(family: ImageFamily) -> str:
    """A hash of the base model's weights as they are held in memory."""
    return cache.key_of(family.denoiser_id, family.image_encoder_id, family.text_encoder_id)


def _parts(key: Key) -> tuple[int | str, ...]:
    return key.seed, key.split, key.epoch


def _named(what: str, progress: Progress) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)
