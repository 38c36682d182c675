"""A labeller in a process of its own, which may be killed at any moment.

Imported before the processes are forked (see `start`), so that each is soon at its work. It is the
real command with a real toy BLIP; only a log of what BLIP was shown is added.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import diffusers  # noqa: F401
import torch
import transformers.models.blip.modeling_blip  # noqa: F401
import transformers.models.blip.processing_blip  # noqa: F401
from PIL import Image

from lora_scripts import cli
from lora_scripts.label import blip, captioner, rows, run  # noqa: F401
from lora_scripts.label.journal import Journal

HAS_FORKS = "forkserver" in multiprocessing.get_all_start_methods()


def save_numbered(folder: Path, count: int) -> list[str]:
    """Pictures of one colour each, in which a picture's number can be read. Their names."""
    folder.mkdir(parents=True)
    names = [f"图{number:04d}.png" for number in range(count)]
    for number, name in enumerate(names):
        Image.new("RGB", (40, 40), (number % 256, number // 256, 99)).save(folder / name)
    return names


def start(log: Path, arguments: Sequence[str], dies: str = "") -> BaseProcess:
    """Begin `lora-scripts label …`; each picture that BLIP has captioned is a line of `log`."""
    context: Any = multiprocessing.get_context("forkserver" if HAS_FORKS else "spawn")
    if HAS_FORKS:
        context.set_forkserver_preload([__name__])
    process: BaseProcess = context.Process(target=_label, args=(log, list(arguments), dies))
    process.start()
    return process


def _label(log: Path, arguments: list[str], dies: str) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = log.with_suffix(".out").open("a", encoding="utf-8")
    original = captioner.load

    def load(*values: Any) -> captioner.Caption:
        caption = original(*values)

        def logged(images: Sequence[Image.Image]) -> list[str]:
            said = caption(images)
            numbers = [red + 256 * green for red, green, _ in (i.getpixel((0, 0)) for i in images)]
            with log.open("a", encoding="utf-8") as stream:
                stream.write("".join(f"{number}\n" for number in numbers))
            return said

        return logged

    captioner.load = load
    DEATHS.get(dies, lambda: None)()
    cli.main(["label", *arguments])


# --- deaths at a certain place --------------------------------------------------------------------


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL if HAS_FORKS else signal.SIGTERM)


def _after(original: Callable[..., Any], calls: int = 1) -> Callable[..., Any]:
    """The function, and death when it has been called so often."""
    done = 0

    def lethal(*values: Any, **named: Any) -> Any:
        nonlocal done
        result = original(*values, **named)
        done += 1
        if done == calls:
            _die()
        return result

    return lethal


def _at_loading() -> None:
    captioner.load = _die  # type: ignore[assignment]


def _before_writing() -> None:
    rows.CsvFile.write = rows.JsonLinesFile.write = _die  # type: ignore[method-assign]


def _in_writing_txt() -> None:
    rows.write_text = _after(rows.write_text, calls=3)


def _before_removing() -> None:
    Journal.remove = _die  # type: ignore[method-assign]


def _after_removing() -> None:
    Journal.remove = _after(Journal.remove)  # type: ignore[method-assign]


def _in_appending() -> None:
    """The third batch stands half in the journal, as after a power cut."""
    original = Journal.append
    done = 0

    def torn(self: Journal, made: Any) -> None:
        nonlocal done
        original(self, made)
        done += 1
        if done == 3:
            with self.path.open("r+b") as stream:
                stream.truncate(self.path.stat().st_size - 17)
            _die()

    Journal.append = torn  # type: ignore[method-assign]


DEATHS: dict[str, Callable[[], None]] = {
    "at loading": _at_loading,
    "in appending": _in_appending,
    "before writing": _before_writing,
    "in writing txt": _in_writing_txt,
    "before removing": _before_removing,
    "after removing": _after_removing,
}
