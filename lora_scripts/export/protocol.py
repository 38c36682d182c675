"""What every kind of export offers to the pipeline and the model card, and how it is proved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from lora_scripts.errors import WorkError
from lora_scripts.training.checkpoint import Position


@dataclass(frozen=True)
class Finished:
    """The files of a finished run, and how far a freshly read model with them is from the trained.

    `difference` is the largest one between two outputs; `reader` the library that read the files.
    """

    paths: Sequence[Path]
    difference: float
    reader: str


def proved(
    reference: torch.Tensor, found: torch.Tensor, tolerance: float, folder: Path, reader: str
) -> float:
    """The largest difference of the outputs of a freshly read model from the trained one's.

    Args:
        reference: What the trained model gives.
        found: What the fresh one gives with the files of `folder`, read by `reader`.
        tolerance: Of the largest value of `reference`.

    Raises:
        WorkError: if they differ by more.
    """
    difference = (found - reference).abs().max().item()
    if not difference <= tolerance * reference.abs().max().item():
        raise WorkError(
            f"{folder}: read back by {reader} it does not give the trained model (outputs differ "
            f"by {difference:.3g})"
        )
    return difference


class Export(Protocol):
    """Writes the adapters of one task in the layout of its kind."""

    def checkpoint_files(self, folder: Path, position: Position) -> list[Path]:
        """The adapter as it is, as ready files in a checkpoint's folder."""

    def finish(self, position: Position) -> Finished:
        """Write the finished files and prove them on a freshly read model; frees the trained one.

        Raises:
            WorkError: if the files do not give the trained model back.
        """

    def follow(self) -> None:
        """What another process does while the first one finishes: its part of the proof's passes.

        Only where the base is spread over the processes.
        """

    def card_usage(self) -> str:
        """How the files are used: Markdown for the model card."""

    def hints(self) -> list[str]:
        """How the files are used: lines for the console."""
