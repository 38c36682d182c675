"""What the loss needs of one view: latent or pixels, mask, prompt, frame; cached where it can be.

Tensor suffixes: C channels, H height, W width (of pixels or latent).
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from lora_scripts.data import cache, captions
from lora_scripts.data.caption_checks import composed
from lora_scripts.data.images import View, mask_of, pixels_of, view_of
from lora_scripts.data.pictures import Picture, Pictures
from lora_scripts.errors import Problem, UserError
from lora_scripts.models.family import Encoder, Framing, ImageFamily
from lora_scripts.randomness import generator, numpy_generator
from lora_scripts.schema import ImageConfig
from lora_scripts.tasks.task import Key

logger = logging.getLogger(__name__)


Progress = Callable[[str, int, int], None]


class ViewReader:
    """Encodes pictures and captions beforehand where they are finitely many, and reads views."""

    def __init__(self, config: ImageConfig, family: ImageFamily) -> None:
        self.config = config
        self.family = family
        self.latents = cache.Cache(config.cache_dir, "latents")
        self.prompts = cache.Cache(config.cache_dir, "prompts")
        self.latents_are_cached = config.cache_latents is True or (
            config.cache_latents == "auto" and not config.random_crop
        )
        self.varies_tags = config.shuffle_tags or config.tag_dropout > 0
        self.prompts_are_cached = not (self.varies_tags or config.train_text_encoder)

    def encode(self, learned: Pictures, measured: Pictures, progress: Progress) -> None:
        """Encode what is to be cached and is not yet; keep the other encoders on the device.

        Raises:
            UserError: if a mask leaves nothing of its picture's cut.
        """
        pictures = learned.joined(measured)
        if self.config.masked_loss:
            self._refuse_empty_masks(pictures, measured)
        if self.latents_are_cached:
            self._encode_pictures(pictures, progress)
        else:
            self.family.keep_on_device("image")
        if self.prompts_are_cached:
            self._encode_prompts(pictures, progress)
        else:
            self.family.keep_on_device("text")

    def read(self, picture: Picture, index: int, key: Key) -> dict[str, Any]:
        """The view `index` of a picture; all choices follow from `key` and `index`.

        Returns:
            "mean" and "std" of the latent, or "pixels"; "mask" with `masked_loss`; "told": a
            prompt's conditioning or its tokens; "frame": the conditioning by the cut.
        """
        mirrored, dropped, chance = False, False, None
        if key.split == "train":
            choice = torch.rand(2, generator=generator(*parts_of(key), index, "view"))
            mirrored = self.config.random_flip and bool(choice[0] < 0.5)
            dropped = bool(choice[1] < self.config.caption_dropout)
            if self.config.random_crop:
                chance = numpy_generator(*parts_of(key), index, "crop")
        view = view_of(picture, chance, mirrored=mirrored)
        row: dict[str, Any] = {"frame": self.family.frame(_framing(view))}
        if self.latents_are_cached:
            row |= self.latents.read(self.latent_key(picture, mirrored=mirrored))
        else:
            row["pixels"] = pixels_of(view)
        if self.config.masked_loss:
            row["mask"] = mask_of(view)
        prompt = "" if dropped else self.prompt(picture, index, key)
        if self.prompts_are_cached:
            row["told"] = self.prompts.read(self.prompt_key(prompt))
        else:
            row["told"] = self.family.tokenize(prompt)
        return row

    def prompt(self, picture: Picture, index: int, key: Key) -> str:
        """The caption of a view: one of the picture's, its tags varied where that is configured.

        Measurements take the captions in turn and vary nothing.
        """
        if key.split == "validation":
            return picture.captions[index % len(picture.captions)]
        if len(picture.captions) == 1 and not self.varies_tags:
            return picture.captions[0]
        chance = numpy_generator(*parts_of(key), index, "caption")
        chosen = int(chance.integers(len(picture.captions)))
        if not self.varies_tags:
            return picture.captions[chosen]
        plain = picture.record.captions[chosen]
        trigger_word = self.config.trigger_word
        learned = picture.role != "regularisation"
        leads = (
            learned
            and trigger_word is not None
            and not captions.holds_word(
                self.config.caption_prefix + plain + self.config.caption_suffix, trigger_word
            )
        )
        varied = captions.vary(
            plain,
            keep=max(0, self.config.keep_tokens - leads),
            shuffle=self.config.shuffle_tags,
            dropout=self.config.tag_dropout,
            chance=chance,
        )
        return composed(varied, self.config, picture.role)

    def latent_key(self, picture: Picture, *, mirrored: bool) -> str:
        """The cache entry of a picture cut from its middle."""
        return cache.key_of(picture.content, picture.bucket, mirrored, self.family.image_encoder_id)

    def prompt_key(self, text: str) -> str:
        """The cache entry of a prompt."""
        return cache.key_of(text, self.family.text_encoder_id)

    def _encode_pictures(self, pictures: Pictures, progress: Progress) -> None:
        mirrors = (False, True) if self.config.random_flip else (False,)

        def encoded(picture: Picture, mirrored: bool) -> Mapping[str, torch.Tensor]:
            visit()
            view = view_of(picture, None, mirrored=mirrored)
            mean_CHW, std_CHW = self.family.encode_image(pixels_of(view))
            return {"mean": mean_CHW, "std": std_CHW}

        def jobs() -> Iterator[cache.Job]:
            for picture in pictures:
                for mirrored in mirrors:
                    key = self.latent_key(picture, mirrored=mirrored)
                    yield key, partial(encoded, picture, mirrored)

        with self._visit("image") as visit:
            cache.fill(self.latents, jobs, _named("pictures", progress))

    def _encode_prompts(self, pictures: Pictures, progress: Progress) -> None:
        def encoded(text: str) -> Mapping[str, torch.Tensor]:
            visit()
            return self.family.encode_prompt(text)

        def jobs() -> Iterator[cache.Job]:
            texts = (text for picture in pictures for text in picture.captions)
            for text in itertools.chain(("",), texts):
                yield self.prompt_key(text), partial(encoded, text)

        with self._visit("text") as visit:
            cache.fill(self.prompts, jobs, _named("captions", progress))

    @contextmanager
    def _visit(self, encoder: Encoder) -> Iterator[Callable[[], None]]:
        """What brings an encoder to the device when it is first called, until this context ends.

        Where all is in the cache none is read."""
        with ExitStack() as visits:
            yield functools.cache(lambda: visits.enter_context(self.family.visiting(encoder)))

    def _refuse_empty_masks(self, pictures: Pictures, measured: Pictures) -> None:
        """A mask that is black where the picture is cut would leave nothing to divide by.

        Random cuts are moved to where the mask is bright; those that are measured never are.
        """
        cut_in_the_middle = measured.joined(measured) if self.config.random_crop else pictures
        dark = [picture for picture in cut_in_the_middle if _is_dark(picture)]
        if not dark or (self.config.random_crop and not all(map(_is_dark, measured))):
            return
        raise UserError(
            [
                Problem(str(p.mask), f"is black where {p.record.name} is cut to {_size(p.bucket)}")
                for p in dark
            ]
        )


def parts_of(key: Key) -> tuple[int | str, ...]:
    """A key as parts of a generator's."""
    return key.seed, key.split, key.epoch


def _is_dark(picture: Picture) -> bool:
    """Whether a mask leaves nothing of the picture's middle."""
    middle = view_of(picture, None, mirrored=False)
    return picture.mask is not None and not mask_of(middle).any()


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _framing(view: View) -> Framing:
    return Framing(view.picture.size, view.shown_corner, view.picture.bucket)


def _named(what: str, progress: Progress) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)
