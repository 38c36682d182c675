"""Chat templates run in a process of their own, which can be ended when one does not end."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_scripts.data import template_child
from lora_scripts.errors import WorkError

# Threads of number libraries are of no use there, and their stacks count as memory.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Refusal(Exception):
    """What a template or Jinja said against a conversation. `line`: of an error in the template."""

    def __init__(self, said: str, line: int | None = None) -> None:
        super().__init__(said)
        self.line = line


def write(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    tokens: Mapping[str, str],
    *,
    prompt: bool,
) -> str:
    """The conversation as the template writes it, by transformers' own renderer.

    Args:
        template: Its text.
        messages: At least one, in OpenAI's form.
        tools: The functions on offer.
        tokens: The tokenizer's special tokens by name, as templates know them: `eos_token`.
        prompt: Whether what opens an answer follows.

    Raises:
        Refusal: if it is no valid Jinja, refuses the conversation, or takes too much time or
            memory.
    """
    # as the tokenizers do: templates know a missing key, but write null as "None"
    present = [{k: v for k, v in message.items() if v is not None} for message in messages]
    request = {
        "template": template,
        "messages": present,
        "tools": [dict(tool) for tool in tools] or None,
        "tokens": dict(tokens),
        "prompt": prompt,
        "seconds": template_child.SECONDS,
    }
    answer = _answered(json.dumps(request), os.getpid())
    if answer is None:
        _answered.cache_clear()
        _child.cache_clear()
        limit = f"{template_child.SECONDS:.0f} seconds"
        raise Refusal(f"it does not end within {limit}, or takes too much memory")
    if "text" in answer:
        return str(answer["text"])
    raise Refusal(str(answer["refused"]), answer.get("line"))


@functools.lru_cache(maxsize=4)  # of one conversation several callers ask for the same
def _answered(request: str, parent: int) -> dict[str, Any] | None:
    return _child(parent).ask(request)


class _Child:
    """The process, for one request at a time."""

    def __init__(self) -> None:
        # -P: no module is taken from the script's folder or from where the user stands
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(template_child.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_ONE_THREAD},
            start_new_session=True,  # Ctrl-C in a terminal is not for it
        )
        self._lock = threading.Lock()
        atexit.register(self._end)

    def ask(self, request: str) -> dict[str, Any] | None:
        """The answer; None if the process ended over it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            try:
                self._process.stdin.write(request.encode("ascii") + b"\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except OSError:
                line = b""
        if not line.endswith(b"\n"):
            self._end()
            return None
        found: dict[str, Any] = json.loads(line)
        return found

    def _end(self) -> None:
        atexit.unregister(self._end)
        self._process.kill()
        self._process.communicate()


@functools.cache
def _child(parent: int) -> _Child:
    """The process of this process: one that was forked has none of its parent's.

    Raises:
        WorkError: if none can be started.
    """
    try:
        return _Child()
    except OSError as error:
        raise WorkError(f"no process for chat templates can be started: {error}") from None
