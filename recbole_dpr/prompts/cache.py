"""What was computed once, on disk: bytes by text, and the weights of small networks."""

import hashlib
import logging
import sqlite3
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from recbole_dpr.errors import UserError

logger = logging.getLogger(__name__)


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


def fitted_once(folder, key, recipe, module, fit):
    """A module with the weights that `fit` gives it, in eval mode; those of the same recipe come from the disk.

    Args:
        folder, key: as for `TextCache`; recipe: bytes, of all that the weights depend on; fit: module -> None.
    """
    cache, name = TextCache(folder, key), digest(recipe)
    kept = cache.get([name])
    if kept:
        try:
            module.load_state_dict(safetensors.torch.load(kept[name]))
            return module.eval()
        except (SafetensorError, RuntimeError) as error:
            logger.warning("cache %s is damaged (%s); fitted anew", cache.path, type(error).__name__)
    fit(module)
    cache.put([name], [weights(module)])
    return module.eval()


def weights(module):
    """Those of a module as bytes."""
    return safetensors.torch.save({name: tensor.cpu() for name, tensor in module.state_dict().items()})


def digest(content):
    """A name for bytes."""
    return hashlib.sha256(content).hexdigest()[:20]
