"""A config and its data looked at without training, and one example as the model will see it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from lora_scripts import config as config_file
from lora_scripts import preflight
from lora_scripts.errors import UserError, user_error
from lora_scripts.schema import Config, ImageConfig, TextConfig

logger = logging.getLogger(__name__)
LEARNED, OPEN, CLOSE = "bold green", "«", "»"


def run(path: Path, overrides: Sequence[str], row: int) -> None:
    """Say everything that is wrong; if nothing is, show row number `row` (from 1).

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
        raise user_error(f"--row {row}", f"there are {len(rows)} rows")
    config = draft.checked()
    logger.info("%s is in order: %d rows of data", path, len(rows))
    show(config, rows[row - 1][0])


def show(config: Config, record: object) -> None:
    """One example: of a picture its file and caption, of a text what the model reads and learns."""
    from lora_scripts.data.conversations import TextRecord
    from lora_scripts.data.records import Record

    match config, record:
        case ImageConfig(), Record():
            logger.info("%s: %s", record.path, record.caption)
        case TextConfig(), TextRecord():
            _show_text(config, record)


def _show_text(config: TextConfig, record: object) -> None:
    from rich.console import Console
    from rich.text import Text

    from lora_scripts.data import text
    from lora_scripts.data.chat import ChatFormat
    from lora_scripts.data.conversations import TextRecord
    from lora_scripts.logs import quiet_libraries
    from lora_scripts.models import causal_lm
    from lora_scripts.tasks import build

    assert isinstance(record, TextRecord)
    quiet_libraries()
    found = build.find_text_base(config.base_model, with_code=config.trust_remote_code)
    tokenizer = causal_lm.load_tokenizer(found, trust_remote_code=config.trust_remote_code)
    format = ChatFormat(tokenizer, config.chat_template, config.system_prompt)
    logger.info("Chat template: %s", format.name)
    console = Console(soft_wrap=True, highlight=False)
    coloured = console.is_terminal
    meaning = "green" if coloured else f"between {OPEN} and {CLOSE}"
    for number, sample in enumerate(text.samples_of(record, format, config), start=1):
        learned = int(sample.supervised.sum())
        logger.info(
            "%s, sample %d: %d tokens, %d of them learned (%s):",
            record.where, number, len(sample.ids), learned, meaning,
        )  # fmt: skip
        shown = Text()
        for part, is_learned in text.pieces(sample, tokenizer):
            if is_learned and not coloured:
                part = f"{OPEN}{part}{CLOSE}"
            shown.append(part, style=LEARNED if is_learned else "")
        console.print(shown)
