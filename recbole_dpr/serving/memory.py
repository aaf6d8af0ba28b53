"""The latest results by what they are of, shared by many threads."""

from collections import OrderedDict
from threading import Lock


class Memory:
    """Keeps the `most` entries that were used last."""

    def __init__(self, most):
        self._most, self._entries, self._lock = most, OrderedDict(), Lock()

    def found(self, keys):
        """dict of those of some keys that are there."""
        with self._lock:
            return {key: self._entries[key] for key in keys if key in self._entries}

    def keep(self, entries):
        """Keep a dict's entries, as the latest."""
        with self._lock:
            for key, value in entries.items():
                self._entries[key] = value
                self._entries.move_to_end(key)
            while len(self._entries) > self._most:
                self._entries.popitem(last=False)
