"""The protocol between the training loop and what it trains, and the one place that chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from PIL.Image import Image
from torch import nn

from lora_scripts.device import Compute

Split = Literal["train", "validation"]
Indices = tuple[int, ...]  # the samples of one micro-batch
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Loss:
    """`total`: weighted sum of the items' losses (scalar). `count`: the sum of the weights.

    Sums, not means: gradients of several micro-batches (or processes) are added and divided once
    by the global count, so that accumulation changes nothing but memory. `tallies` are counted up
    over the run and noted in the metrics: {"tokens": …}.
    """

    total: torch.Tensor
    count: float
    tallies: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Key:
    """What the random choices in a loss follow from, together with each sample's index.

    A training position (`split="train"`, its epoch) or a fixed evaluation (`"validation"`, 0).
    """

    seed: int
    split: Split
    epoch: int


class Task(Protocol):
    """What the loop knows of images or texts: nothing but this.

    Attributes:
        batch: Samples of a micro-batch; may be changed before the first step.
    """

    batch: int

    @property
    def adapted(self) -> Mapping[str, nn.Module]:
        """The modules that carry adapters, by name: {"unet": …}."""

    @property
    def learning_rates(self) -> Mapping[str, float]:
        """The peak learning rate of each of them, in the same order."""

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Hashes of what a run must find unchanged to go on: {"data": …, "base_model": …}."""

    @property
    def held_out(self) -> bool:
        """Whether the validation split is data that is not learned from."""

    def shard(self, compute: Compute) -> None:
        """Leave each process its share of the frozen weights; every loss takes all of them then."""

    def plan(self, key: Key) -> Sequence[Indices]:
        """The order of all micro-batches of an epoch. Pure, cheap; its length gives the steps."""

    def load(self, indices: Indices, key: Key) -> Batch:
        """The data of one micro-batch on the CPU. Stateless: may run in another thread."""

    def place(self, index: int, key: Key) -> str:
        """Where a person finds a sample: its file, or its file and line."""

    def loss(self, batch: Batch, key: Key) -> Loss:
        """The loss of a micro-batch; its noise follows from `key` and the samples' indices."""

    def sample(self, key: Key) -> Mapping[str, Image | str]:
        """Something to look at, by name: the configured prompts, drawn with the model as it is."""

    def metadata(self) -> dict[str, str]:
        """What goes into every exported file: base model, targets, trigger word, data."""
