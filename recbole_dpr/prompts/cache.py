"""Bytes by text on disk."""

import sqlite3
from pathlib import Path

from recbole_dpr.errors import UserError


class TextCache:
    """What was computed of texts, in one SQLite file for each way to compute it; every write is whole or not at all.

    Args:
        folder: where the file lies; None for ~/.cache/recbole_dpr.
        key: the file's name: whatever changes the results has to change it.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder, key):
        self.folder = Path(folder or "~/.cache/recbole_dpr").expanduser()
        self.path = self.folder / f"{key}.sqlite"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._connect() as db:
                db.execute("CREATE TABLE IF NOT EXISTS vectors (text TEXT PRIMARY KEY, vector BLOB) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            raise self._failure(error) from error

    def _connect(self):
        return sqlite3.connect(self.path, timeout=60)

    def _failure(self, error):
        return UserError(f"embedding cache {self.path}: {error}; name a writable folder with --prompt_cache_dir=")

    def get(self, texts):
        """dict text -> bytes, of those that are there."""
        found = {}
        try:
            db = self._connect()
            for start in range(0, len(texts), 500):  # SQLite limits the parameters of a statement
                part = texts[start : start + 500]
                marks = ",".join("?" * len(part))
                found.update(db.execute(f"SELECT text, vector FROM vectors WHERE text IN ({marks})", part))
            db.close()
        except sqlite3.Error as error:
            raise self._failure(error) from error
        return found

    def put(self, texts, values):
        """Keep the bytes of texts, all of them in one transaction."""
        try:
            db = self._connect()
            with db:
                db.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", zip(texts, values))
            db.close()
        except sqlite3.Error as error:
            raise self._failure(error) from error
