"""Commands as they are typed, for messages that say what to do next."""

from __future__ import annotations

import os
import shlex
import subprocess


def typed(*arguments: str) -> str:
    """A command line for this system's shell, with quotes where they are needed."""
    return subprocess.list2cmdline(arguments) if os.name == "nt" else shlex.join(arguments)
