"""What is known of pictures that were looked at before, in a small database in `cache_dir`.

Two tables: which bytes (SHA-256) a path of this size and time of change held; and what was found
out about those bytes. So a file that was only moved or touched is read again, but not decoded.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lora_scripts.files import AnyPath

logger = logging.getLogger(__name__)

FILE_NAME = "pictures-v1.sqlite"
_WAIT_SECONDS = 30.0  # for another process that writes
_AT_ONCE = 500  # parameters of one query
# A file changed less than so long ago may change again and keep the same time: file systems count
# it in steps of up to two seconds.
_SETTLED_SECONDS = 2.0
_TABLES = """
CREATE TABLE IF NOT EXISTS files (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, changed_ns INTEGER NOT NULL, content TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS looks (
    content TEXT NOT NULL, decoder TEXT NOT NULL, look TEXT NOT NULL, PRIMARY KEY (content, decoder)
) WITHOUT ROWID;
"""


class Mark(NamedTuple):
    """What tells that a file is still the one that was read: its size, and when it was changed."""

    size: int
    changed_ns: int


class PictureMemory:
    """The database. Without a connection nothing is remembered, and nothing fails."""

    def __init__(self, connection: sqlite3.Connection | None) -> None:
        self._connection = connection

    def mark(self, path: AnyPath) -> Mark | None:
        """The mark of a file; None where it could still change unseen, or cannot be looked at."""
        try:
            found = os.stat(path)
        except OSError:
            return None
        if time.time() - found.st_mtime_ns / 1e9 < _SETTLED_SECONDS:
            return None
        return Mark(found.st_size, found.st_mtime_ns)

    def contents(self, paths: Sequence[AnyPath]) -> dict[AnyPath, str]:
        """The hashes of those files that have not changed since they were read."""
        keys = {_key(path): path for path in paths}
        query = "SELECT path, size, changed_ns, content FROM files WHERE path IN"
        found = {}
        for key, size, changed_ns, content in self._select(query, list(keys)):
            if self.mark(keys[key]) == (size, changed_ns):
                found[keys[key]] = content
        return found

    def looks(self, contents: Collection[str], decoder: str) -> dict[str, str]:
        """What is known of these bytes, by their hashes."""
        query = "SELECT content, look, decoder FROM looks WHERE content IN"
        rows = self._select(query, list(contents))
        return {content: look for content, look, by in rows if by == decoder}

    def keep_contents(self, found: Mapping[AnyPath, tuple[Mark | None, str]]) -> None:
        """Remember which bytes files held when they had these marks; those without are left out."""
        rows = [
            (_key(path), *mark, content)
            for path, (mark, content) in found.items()
            if mark is not None
        ]
        self._write("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)

    def keep_looks(self, looks: Mapping[str, str], decoder: str) -> None:
        """Remember what was found out about bytes, by their hashes."""
        rows = [(content, decoder, look) for content, look in looks.items()]
        self._write("INSERT OR REPLACE INTO looks VALUES (?, ?, ?)", rows)

    def _select(self, query: str, values: Sequence[str | bytes]) -> Iterator[tuple[Any, ...]]:
        if self._connection is None:
            return
        for start in range(0, len(values), _AT_ONCE):
            some = values[start : start + _AT_ONCE]
            try:
                marks = ", ".join("?" * len(some))
                rows = self._connection.execute(f"{query} ({marks})", some).fetchall()
            except sqlite3.Error as error:
                self._give_up(error)
                return
            yield from rows

    def _write(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if self._connection is None or not rows:
            return
        try:
            with self._connection:  # commits
                self._connection.executemany(statement, rows)
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: sqlite3.Error) -> None:
        self._connection = None
        _say_lost(str(error))


@contextmanager
def opened(cache_dir: Path) -> Iterator[PictureMemory]:
    """The memory in this folder, made if it is not there.

    A damaged one is said and made anew; one that cannot be used is said and done without.
    """
    connection = _connect(cache_dir)
    if connection is None:
        yield PictureMemory(None)
        return
    with closing(connection):
        yield PictureMemory(connection)


def _connect(cache_dir: Path) -> sqlite3.Connection | None:
    path = cache_dir / FILE_NAME
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        try:
            return _open(path)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            what = "%s: the memory of pictures is damaged (%s); it is made anew"
            logger.warning(what, path, error)
            for end in ("", "-wal", "-shm"):
                path.with_name(path.name + end).unlink(missing_ok=True)
            return _open(path)
    except (OSError, sqlite3.Error) as error:
        _say_lost(f"{path}: {error}")
        return None


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_WAIT_SECONDS)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        connection.executescript(_TABLES)
    except BaseException:
        connection.close()
        raise
    return connection


def _say_lost(why: str) -> None:
    logger.warning("What is found out about pictures cannot be remembered (%s)", why)


def _key(path: AnyPath) -> bytes:
    return os.fsencode(os.path.join(os.getcwd(), path))
