"""A process of its own in which chat templates are run; `template_process` starts it.

Templates come with models of strangers. transformers' sandbox keeps them from Python's objects;
that they end, and do not fill the memory, is seen to here: each has a few seconds and a gigabyte,
else the process ends. Requests and answers are lines of JSON. Nothing of this package is imported.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 10.0  # for one conversation; a template takes a few thousandths
MEMORY = 1 << 30  # bytes beyond what the process has when it begins
LONGEST = 1 << 26  # characters of a conversation as the template writes it


def main() -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        with _ended_after(request["seconds"]):
            answer = json.dumps(_answer(request, render_jinja_template))
        answers.write(answer.encode("ascii") + b"\n")
        answers.flush()


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End the whole process if this context takes longer, whatever code runs in it.

    By the alarm's own effect, which no Python code can hold up; where there is none (Windows), by a
    thread of C, which takes longer to set up.
    """
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)
        return
    faulthandler.dump_traceback_later(seconds, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def _answer(request: dict[str, Any], render: Any) -> dict[str, Any]:
    """The text, or what the template or Jinja said against it."""
    from jinja2 import TemplateSyntaxError

    try:
        (text,), _ = render(
            conversations=[request["messages"]],
            tools=request["tools"],
            chat_template=request["template"],
            add_generation_prompt=request["prompt"],
            **request["tokens"],
        )
    except MemoryError:
        return {"refused": "it takes more than a gigabyte of memory"}
    except TemplateSyntaxError as error:
        return {"refused": error.message or "", "line": error.lineno}
    except Exception as error:  # noqa: BLE001 a template can raise anything
        return {"refused": str(error)[:2000] or type(error).__name__}
    if len(text) > LONGEST:
        return {"refused": f"it writes {len(text):,} characters"}
    return {"text": text}


def _limit_memory() -> None:
    """Where the system can: Linux."""
    if sys.platform != "linux":
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    size = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


if __name__ == "__main__":
    main()
