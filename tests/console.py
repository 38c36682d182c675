"""A command typed in the test's own process: its exit code, and everything it said."""

from __future__ import annotations

import contextlib
import io
import logging

from lora_scripts import cli


def command(*arguments: str) -> tuple[int, str]:
    """Runs `lora-scripts …`. The console that it sets up is taken down again."""
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    logger = logging.getLogger("lora_scripts")
    before = list(logger.handlers), logger.level, logger.propagate
    logger.handlers = []
    code = 0
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            cli.main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        logger.handlers, level, logger.propagate = before
        logger.setLevel(level)
    text = said.buffer.getvalue().decode("utf-8")  # type: ignore[attr-defined]
    assert "Traceback" not in text, text
    return code, text
