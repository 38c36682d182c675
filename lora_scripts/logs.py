"""Where log lines go: the console, and a run's run.log. Set up by the command line."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_scripts.errors import shown

PACKAGE = "lora_scripts"


class _Format(logging.Formatter):
    """What is said, without what nobody should see in a log or a terminal would act on."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


class _ConsoleFormat(logging.Formatter):
    """The bare message; a warning says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        message = shown(super().format(record))
        return f"Warning: {message}" if record.levelno >= logging.WARNING else message


def set_up_console() -> None:
    """Show this package's messages. A console that cannot write a character shows `?` for it."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    logger = logging.getLogger(PACKAGE)
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_ConsoleFormat("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    _quiet_threads()


def _quiet_threads() -> None:
    """A file that a thread cannot write (TensorBoard's) is told once, by who waits for it."""
    usual = threading.excepthook

    def show(thread: threading.ExceptHookArgs) -> None:
        if not issubclass(thread.exc_type, OSError):
            usual(thread)

    threading.excepthook = show


def quiet() -> None:
    """Show errors only: another process tells the rest."""
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """No progress bars and chatter of the libraries between our own lines."""
    import diffusers
    import transformers

    # peft asks transformers for something under its old name
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # and says what it mends itself for GPT-2's layers
    warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but", UserWarning)
    # bitsandbytes, of a kernel for 4 bits on CPUs that is not used
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


@contextmanager
def silent() -> Iterator[None]:
    """Within this context nothing is said: what is printed is for machines."""
    logger = logging.getLogger(PACKAGE)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def file_log(path: Path) -> Iterator[None]:
    """Within this context everything said is also written to `path`, with time and level."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_Format("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger(PACKAGE)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
