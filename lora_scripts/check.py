"""A config and its data looked at without training, and one example as the model will see it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts import config as config_file
from lora_scripts import picture_checks, preflight, report
from lora_scripts.data.caption_checks import composed
from lora_scripts.data.rows import AnyRows
from lora_scripts.errors import UserError, user_error
from lora_scripts.logs import quiet_libraries, silent
from lora_scripts.schema import ImageConfig, TextConfig

if TYPE_CHECKING:
    from lora_scripts.data.chat import ChatFormat, Encoded
    from lora_scripts.data.conversations import TextRecord
    from lora_scripts.data.looking import Look
    from lora_scripts.data.records import Record

logger = logging.getLogger(__name__)

LEARNED, OPEN, CLOSE = "bold green", "«", "»"
SHOWN = 3  # samples of one row; a raw text may have thousands


def run(
    path: Path,
    overrides: Sequence[str],
    row: int = 1,
    *,
    as_json: bool = False,
    contact_sheet: Path | None = None,
) -> int:
    """Say everything that is found, what the data are like, and show row number `row` (from 1).

    The base model's weights are not read, nor fetched. `as_json` prints all of it but the row, and
    no more; `contact_sheet` is a PNG to write.

    Returns:
        The exit code: 0, or with `as_json` that of the error that else is raised.

    Raises:
        UserError: with all problems, warnings included; a `DataError` if the config is right.
    """
    draft = config_file.read(path, overrides)
    if as_json:
        with silent():
            return _run_for_machines(draft, contact_sheet)
    found = preflight.look(draft)
    _refuse(found, draft)
    preflight.say(found.problems)
    if not 1 <= row <= len(found.rows):
        raise user_error(f"--row {row}", f"there are {len(found.rows):,} rows")
    match draft.checked():
        case ImageConfig() as config:
            _say_ready(path, f"{len(found.rows):,} pictures with captions")
            for line in _report(found, config).lines():
                logger.info("%s", line)
            record, dataset = found.rows[row - 1]
            _show_picture(config, record, dataset.role, found.looks[row - 1], row)
            _write_sheet(found, contact_sheet)
        case TextConfig() as config:
            _refuse_sheet(contact_sheet)
            tokenizer, format = _format(config)
            _say_ready(path, _said(_encode_all(found.rows, format, config), config))
            _show_text(config, tokenizer, format, found.rows[row - 1][0], row)
    return 0


def _refuse(found: preflight.Inputs, draft: config_file.Draft) -> None:
    """As `preflight.refuse`, and the warnings are told with the errors."""
    try:
        preflight.refuse(found.problems, draft)
    except UserError as error:
        told = [p for p in found.problems if p.severity == "warning" and p not in error.problems]
        raise type(error)([*error.problems, *told]) from None


def _run_for_machines(draft: config_file.Draft, contact_sheet: Path | None) -> int:
    found = preflight.look(draft)
    problems, figures, code = list(found.problems), None, 0
    try:
        preflight.refuse(found.problems, draft)
        match draft.checked():
            case ImageConfig() as config:
                figures = _report(found, config).values()
                _write_sheet(found, contact_sheet)
            case TextConfig() as config:
                _refuse_sheet(contact_sheet)
                _, format = _format(config)
                figures = _encode_all(found.rows, format, config)
    except UserError as error:
        problems += [problem for problem in error.problems if problem not in problems]
        code = error.exit_code
    print(report.as_json(problems, figures))  # noqa: T201
    return code


def _report(found: preflight.Inputs, config: ImageConfig) -> report.Report:
    return report.of_pictures(found.rows, found.looks, config, picture_checks.reader(config))


def _write_sheet(found: preflight.Inputs, path: Path | None) -> None:
    if path is not None:
        number = report.contact_sheet(found.rows, found.looks, path)
        logger.info("Contact sheet of %d pictures: %s", number, path)


def _refuse_sheet(path: Path | None) -> None:
    if path is not None:
        raise user_error(f"--contact-sheet {path}", "is for pictures; this config is for texts")


def _say_ready(path: Path, found: str) -> None:
    logger.info("%s is in order: %s.", path, found)


def _show_picture(config: ImageConfig, record: Record, role: str, look: Look, row: int) -> None:
    width, height = look.size
    logger.info("Row %d: %s (%d × %d), captioned as the model will read it:", row, record.file,
                width, height)  # fmt: skip
    for caption in record.captions:
        logger.info("%s", composed(caption, config, role) or "(an empty caption)")
    if len(record.captions) > 1:
        logger.info("One of these is drawn each time.")
    if config.shuffle_tags or config.tag_dropout:
        logger.info("Its tags are varied each time.")


def _format(config: TextConfig) -> tuple[Any, ChatFormat]:
    """The tokenizer and the template."""
    quiet_libraries()
    from lora_scripts.data.chat import ChatFormat
    from lora_scripts.models import causal_lm, hub
    from lora_scripts.models.text_signature import (
        UNWANTED,
        WANTED_WITHOUT_WEIGHTS,
        read_text_signature,
    )

    path = hub.local_path(config.base_model)
    is_here = path is not None
    if path is None:
        path = hub.fetch(config.base_model, WANTED_WITHOUT_WEIGHTS, UNWANTED)
    found = read_text_signature(path, with_weights=is_here)
    tokenizer = causal_lm.load_tokenizer(found, trust_remote_code=config.trust_remote_code)
    format = ChatFormat(tokenizer, config.chat_template, config.system_prompt)
    logger.info("Chat template: %s", format.name)
    return tokenizer, format


def _encode_all(rows: AnyRows, format: ChatFormat, config: TextConfig) -> dict[str, int]:
    """Tokenise all rows into the cache, where the training will find them. Figures of it.

    Raises:
        UserError: naming every row that the template refuses or of which nothing is learned.
    """
    from lora_scripts.data import text

    encoding = text.encode(rows, format, config, lambda done, total: None)
    for remark in text.remarks(format, encoding, rows, config):
        logger.warning("%s", remark)
    lengths, learned = encoding.lengths(), int(encoding.learned.sum())
    return {
        "rows": len(rows),
        "samples": len(encoding),
        "tokens": int(lengths.sum()),
        "learned": learned,
        "longest": int(lengths.max()),
    }


def _said(figures: Mapping[str, int], config: TextConfig) -> str:
    rows, samples = _number(figures["rows"], "row"), _number(figures["samples"], "sample")
    return (
        f"{rows} in {samples}, {figures['tokens']:,} tokens, {figures['learned']:,} of them "
        f"learned; the longest sample has {figures['longest']:,} "
        f"(max_seq_length: {config.max_seq_length:,})"
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
