"""All checks of a run's pictures and captions, before anything is trained on. Needs no torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from lora_scripts.config import Draft
from lora_scripts.data import caption_checks, fitting, looking, masks, picture_memory, validate
from lora_scripts.data.looking import Look, Looks, Progress
from lora_scripts.data.validate import Row
from lora_scripts.errors import Problem, UserError
from lora_scripts.models import caption_parts, hub
from lora_scripts.models.signature import read_signature
from lora_scripts.schema import ImageConfig


def check(rows: Sequence[Row], draft: Draft, cache_dir: Path) -> tuple[list[Problem], Looks]:
    """Decode what is not known yet, check all.

    Returns:
        Every problem, and what each picture is, in the order of the rows.
    """
    # that a picture is large is a problem of ours, with its name
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    with picture_memory.opened(cache_dir) as memory, _bar() as progress:
        paths = (record.file for record, _ in rows)
        looks = looking.look_at_all(paths, len(rows), memory, progress, cache_dir)
    problems = validate.check(rows, looks, cache_dir)
    if draft.values.get("masked_loss") is True:
        problems += [draft.source.locate(problem) for problem in masks.check(rows)]
    if not isinstance(draft.config, ImageConfig):
        return problems, looks
    problems += _fits(rows, looks, draft.config)
    problems += caption_checks.check(rows, draft.config, reader(draft.config))
    return problems, looks


def reader(config: ImageConfig) -> caption_checks.Read:
    """How the base model reads prompts. A base that cannot be used is told elsewhere."""

    def read(prompts: Iterable[str]) -> Iterator[caption_checks.Reading]:
        try:
            path = hub.local_path(config.base_model)
            family = "sd1" if path is None else read_signature(path).family
            tokenizer = caption_parts.tokenizer_of(path, family)
        except UserError:
            return (caption_checks.Reading(0, None) for _ in prompts)
        found = caption_parts.readings(tokenizer, prompts, config.max_caption_tokens)
        return (caption_checks.Reading(*each) for each in found)

    return read


def _fits(rows: Sequence[Row], looks: Sequence[Look], config: ImageConfig) -> list[Problem]:
    found = (
        (record.file, record.where, look.size)
        for (record, _), look in zip(rows, looks, strict=True)
        if look.error is None
    )
    return fitting.check(found, config)


@contextmanager
def _bar() -> Iterator[Progress]:
    """A progress bar, on a terminal; it goes when the work is done."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console()
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Looking at pictures", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
