"""A config and its data looked at without training, and one example as the model will see it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts import config as config_file
from lora_scripts import preflight
from lora_scripts.errors import UserError, user_error
from lora_scripts.schema import ImageConfig, TextConfig

if TYPE_CHECKING:
    from lora_scripts.data.chat import ChatFormat, Encoded
    from lora_scripts.data.conversations import TextRecord
    from lora_scripts.data.records import Record

logger = logging.getLogger(__name__)

LEARNED, OPEN, CLOSE = "bold green", "«", "»"
SHOWN = 3  # samples of one row; a raw text may have thousands


def run(path: Path, overrides: Sequence[str], row: int) -> None:
    """Say everything that is wrong; if nothing is, show row number `row` (from 1).

    The base model's weights are not read, nor fetched.

    Raises:
        UserError: with all problems.
    """
    draft = config_file.read(path, overrides)
    rows, problems = preflight.inputs(draft)
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise UserError(errors)
    for warning in problems:
        logger.warning("%s", warning)
    if not 1 <= row <= len(rows):
        raise user_error(f"--row {row}", f"there are {len(rows):,} rows")
    match draft.checked():
        case ImageConfig() as config:
            _say_ready(path, f"{len(rows):,} pictures with captions")
            _show_picture(config, rows[row - 1][0], row)
        case TextConfig() as config:
            tokenizer, format = _format(config)
            _say_ready(path, _encode_all(rows, format, config))
            _show_text(config, tokenizer, format, rows[row - 1][0], row)


def _say_ready(path: Path, found: str) -> None:
    logger.info("%s is in order: %s.", path, found)


def _show_picture(config: ImageConfig, record: Record, row: int) -> None:
    from PIL import Image

    from lora_scripts.data.images import composed

    with Image.open(record.path) as picture:
        width, height = picture.size
    logger.info("Row %d: %s (%d × %d), captioned as the model will read it:", row, record.path,
                width, height)  # fmt: skip
    for caption in record.captions:
        logger.info("%s", composed(caption, config) or "(an empty caption)")
    if len(record.captions) > 1:
        logger.info("One of these is drawn each time.")
    if config.shuffle_tags or config.tag_dropout:
        logger.info("Its tags are varied each time.")


def _format(config: TextConfig) -> tuple[Any, ChatFormat]:
    """The tokenizer and the template."""
    from lora_scripts.data.chat import ChatFormat
    from lora_scripts.logs import quiet_libraries
    from lora_scripts.models import causal_lm, hub
    from lora_scripts.models.text_signature import (
        UNWANTED,
        WANTED_WITHOUT_WEIGHTS,
        read_text_signature,
    )

    quiet_libraries()
    path = hub.local_path(config.base_model)
    is_here = path is not None
    if path is None:
        path = hub.fetch(config.base_model, WANTED_WITHOUT_WEIGHTS, UNWANTED)
    found = read_text_signature(path, with_weights=is_here)
    tokenizer = causal_lm.load_tokenizer(found, trust_remote_code=config.trust_remote_code)
    format = ChatFormat(tokenizer, config.chat_template, config.system_prompt)
    logger.info("Chat template: %s", format.name)
    return tokenizer, format


def _encode_all(rows: Sequence[tuple[Any, Any]], format: ChatFormat, config: TextConfig) -> str:
    """Tokenise all rows into the cache, where the training will find them. What came of it.

    Raises:
        UserError: naming every row that the template refuses or of which nothing is learned.
    """
    from lora_scripts.data import text

    encoding = text.encode(rows, format, config, lambda done, total: None)
    for remark in text.remarks(format, encoding, config):
        logger.warning("%s", remark)
    lengths, learned = encoding.lengths(), int(encoding.learned.sum())
    return (
        f"{_number(len(rows), 'row')} in {_number(len(encoding), 'sample')}, "
        f"{int(lengths.sum()):,} tokens, {learned:,} of them learned; the longest sample has "
        f"{int(lengths.max()):,} (max_seq_length: {config.max_seq_length:,})"
    )


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _show_text(
    config: TextConfig, tokenizer: Any, format: ChatFormat, record: TextRecord, row: int
) -> None:
    from rich.console import Console

    from lora_scripts.data import text

    console = Console(soft_wrap=True, highlight=False)
    meaning = "green" if console.is_terminal else f"between {OPEN} and {CLOSE}"
    samples = text.samples_of(record, format, config)
    place = "" if len(samples) == 1 else f" in {len(samples):,} samples"
    logger.info("Row %d (%s)%s; what is learned is %s.", row, record.where, place, meaning)
    for number, sample in enumerate(samples[:SHOWN], start=1):
        learned = int(sample.supervised.sum())
        name = "Sample" if len(samples) == 1 else f"Sample {number}"
        logger.info("%s: %d tokens, %d of them learned:", name, len(sample.ids), learned)
        console.print(_marked(sample, tokenizer, coloured=console.is_terminal))
    if len(samples) > SHOWN:
        logger.info("… and %s more.", _number(len(samples) - SHOWN, "sample"))


def _marked(sample: Encoded, tokenizer: Any, *, coloured: bool) -> Any:
    """A sample's text with what is learned of it marked, in colour where there is any."""
    from rich.text import Text

    from lora_scripts.data import text

    shown = Text()
    for part, is_learned in text.pieces(sample, tokenizer):
        if is_learned and not coloured:
            part = f"{OPEN}{part}{CLOSE}"
        shown.append(part, style=LEARNED if is_learned else "")
    return shown
