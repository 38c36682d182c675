"""Python's search for objects that hold each other, kept away from those that stay anyway."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Within this context libraries are imported.

    PyTorch, transformers and diffusers make about a million objects that live as long as the
    process. Searching them for garbage again and again takes a third of the time of the imports,
    and 0.3 s at each search later; here they are not searched then, nor ever after.
    """
    known, was_on = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if was_on:
            gc.enable()
