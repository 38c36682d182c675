"""The heaviest micro-batch of a run, found from its data and its plan."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from lora_scripts.data import images, text
from lora_scripts.data.chat import ChatFormat
from lora_scripts.data.samples import batches
from lora_scripts.data.views import PictureSet
from lora_scripts.models import causal_lm, head
from lora_scripts.models.caption_parts import TOKENS_A_PART
from lora_scripts.schema import ImageConfig, TextConfig
from lora_scripts.tasks import build
from lora_scripts.tasks.task import Indices

LOGIT_WEIGHT = 12  # bytes of a logit at the peak: 16 bits, float32, and the gradient of both
TOKEN_WEIGHT = 40  # bytes of a token's activations, for each layer and unit of width
_AT_ONCE = 4096  # micro-batches weighed
EPOCHS_LOOKED_AT = 10  # each deals the rows out anew


@dataclass(frozen=True)
class Pictures:
    """So many pictures of one bucket, each with captions of so many parts of 75 tokens."""

    count: int
    width: int
    height: int
    parts: int

    def __str__(self) -> str:
        return f"{self.count} × {self.width}×{self.height} pixels"

    def fits_into(self, other: Pictures) -> bool:
        """Whether none of its numbers is above the other's."""
        own, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return all(number <= limit for number, limit in zip(own, others, strict=True))


@dataclass(frozen=True)
class Rows:
    """Rows of these lengths, of whose tokens so many are learned."""

    lengths: tuple[int, ...]
    learned: int

    def __str__(self) -> str:
        return f"{len(self.lengths)} rows, {sum(self.lengths):,} tokens"


def of_pictures(
    rows: Sequence[tuple[Any, Any]], config: ImageConfig, pixel_multiple: int
) -> tuple[Pictures, Pictures]:
    """The heaviest micro-batch, and the largest picture alone."""
    data = images.gather(rows, config, pixel_multiple)
    learned = PictureSet.repeated(data.train, data.regularisation)
    parts = config.max_caption_tokens // TOKENS_A_PART
    epochs = (  # weights below 1 may leave an epoch empty
        learned.batches(config.micro_batch, config.seed, "train", "order", epoch=epoch)
        for epoch in range(config.epochs)
    )
    batch = most_pixels(learned, next(batches for batches in epochs if batches))
    every = chain(data.train, data.regularisation, data.validation)
    sides = max((picture.bucket for picture in every), key=lambda side: side[0] * side[1])
    return Pictures(len(batch), *learned.at(batch[0]).bucket, parts), Pictures(1, *sides, parts)


def most_pixels(learned: PictureSet, batches: Sequence[Indices]) -> Indices:
    """The micro-batch with most pixels."""

    def pixels(batch: Indices) -> int:
        width, height = learned.at(batch[0]).bucket
        return len(batch) * width * height

    return max(batches, key=pixels)


def dealt(rows: text.TextRows, config: TextConfig) -> text.Dealt:
    """The rows as the run deals them out; they are tokenised if no earlier run has done so."""
    found = build.find_text_base(config.base_model, with_code=config.trust_remote_code)
    tokenizer = causal_lm.load_tokenizer(found, trust_remote_code=config.trust_remote_code)
    format = ChatFormat(tokenizer, config.chat_template, config.system_prompt)
    return text.deal(rows, format, config, lambda done, total: None)


def of_rows(data: text.Dealt, config: TextConfig, model: Any, *, packed: bool) -> Rows:
    """The micro-batch that takes most."""
    lengths, learned = data.encoding.lengths(), data.encoding.learned

    def planned() -> Iterator[Indices]:
        for epoch in epochs(config):
            views = data.train.views(config.seed, "train", "order", epoch=epoch)
            key = (config.seed, "train", "batches", epoch)
            yield from batches(views, config.micro_batch, None if packed else lengths, *key)

    heaviest = list(most_tokens(data, planned(), model, packed=packed))
    return Rows(tuple(int(n) for n in lengths[heaviest]), int(np.sum(learned[heaviest])))


def most_tokens(
    data: text.Dealt, batches: Iterable[Indices], model: Any, *, packed: bool
) -> Indices:
    """The micro-batch with most tokens, learned ones weighed by the vocabulary."""
    settings = model.config.get_text_config()
    by_token = TOKEN_WEIGHT * settings.num_hidden_layers * settings.hidden_size
    by_logit = LOGIT_WEIGHT * settings.vocab_size
    lengths, learned = data.encoding.lengths(), data.encoding.learned
    most_logits = head.alive_at_once(model, sys.maxsize)
    most, left = -1.0, iter(batches)
    heaviest: Indices = ()
    while some := list(islice(left, _AT_ONCE)):
        sizes = np.array([len(batch) for batch in some])
        samples, starts = np.concatenate(some), np.cumsum(sizes) - sizes
        own = lengths[samples].astype(np.int64)
        tokens = (
            np.add.reduceat(own, starts) if packed else np.maximum.reduceat(own, starts) * sizes
        )
        logits = np.minimum(np.add.reduceat(learned[samples], starts), most_logits)
        weights = by_token * tokens + by_logit * logits
        first = int(np.argmax(weights))
        if weights[first] > most:
            most, heaviest = weights[first], some[first]
    return heaviest


def epochs(config: TextConfig) -> range:
    """The epochs whose micro-batches are looked at."""
    return range(min(config.epochs, EPOCHS_LOOKED_AT))
