"""What a run was given, sample by sample, so that a later start can say what changed."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_scripts.files import replace
from lora_scripts.run_files import INVENTORY

logger = logging.getLogger(__name__)

MOST = 200_000  # samples; of more only the hash of all is kept
NAMED = 3

Sample = tuple[str, str]  # where it stands, and a hash of what it says


def write(folder: Path, samples: Iterable[Sample]) -> None:
    """Note the samples of a run that begins: `data.jsonl.gz`, a line each."""
    path = folder / INVENTORY
    temporary = path.with_name(f"{path.name}.tmp")
    left = iter(samples)
    with gzip.GzipFile(temporary, "wb", mtime=0) as stream:
        for sample in itertools.islice(left, MOST):
            stream.write(json.dumps(sample, ensure_ascii=False).encode("utf-8") + b"\n")
    if next(left, None) is None:
        replace(temporary, path)
    else:
        temporary.unlink()
        path.unlink(missing_ok=True)


def changes(folder: Path, samples: Iterable[Sample]) -> str:
    """What differs from the samples noted: `2 changed (a.png, b.png), 1 new (c.png)`; "" unknown.

    A sample that only moved is the same.
    """
    try:
        with gzip.open(folder / INVENTORY, "rt", encoding="utf-8") as stream:
            before = [(str(where), str(content)) for where, content in map(json.loads, stream)]
    except (OSError, EOFError, ValueError, TypeError, RecursionError, zlib.error):
        before = []
    if not before:
        return ""  # an older run, or a damaged file: the hash of all has told that they differ
    now = list(samples)
    known, there = {content for _, content in before}, {content for _, content in now}
    gone = {where: content for where, content in before if content not in there}
    new = {where: content for where, content in now if content not in known}
    changed = gone.keys() & new.keys()
    found = {"changed": changed, "new": new.keys() - changed, "gone": gone.keys() - changed}
    said = [_count(word, sorted(places)) for word, places in found.items() if places]
    if not said and len(now) != len(before):
        said = [f"{len(before)} then, {len(now)} now"]
    return ", ".join(said) or "the same samples, in another order or otherwise dealt"


def _count(word: str, places: Sequence[str]) -> str:
    more = ", …" if len(places) > NAMED else ""
    return f"{len(places)} {word} ({', '.join(places[:NAMED])}{more})"
