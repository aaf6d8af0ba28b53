"""The users that a model knows by id: their histories, in a file of their own beside the model.

The file holds what people did: leave it out of a folder that you hand on, and everything but `user=` still works.
"""

import json

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from recbole_dpr.errors import UserError
from recbole_dpr.train.checkpoints import replacing

FILE = "users.safetensors"


class KnownUsers:
    """All interactions of the users that a model was made with, in time order.

    Args:
        ids: U external ids.
        items: int [I], rows of the model's item table; offsets: int64 [U + 1], user u has items[offsets[u]:offsets[u + 1]].
    """

    def __init__(self, ids, items, offsets):
        self.ids, self._items, self._offsets = list(ids), items, offsets
        self._index = {user: row for row, user in enumerate(self.ids)}

    def rows(self, user):
        """A user's history as rows of the item table, oldest first; None for an unknown one."""
        at = self._index.get(str(user))
        return None if at is None else self._items[self._offsets[at] : self._offsets[at + 1]].tolist()


def save(folder, sequences):
    """Write the users of Sequences."""
    items = sequences.items.astype(np.min_scalar_type(sequences.n_items))
    with replacing(folder / FILE) as temporary:
        save_file({"items": items, "offsets": sequences.offsets}, temporary, {"users": json.dumps(sequences.user_tokens.tolist())})


def read(folder, n_items):
    """The KnownUsers of a run's folder, None where it has no such file; n_items: V with padding.

    Raises:
        UserError: the file is damaged, or belongs to a model with fewer items.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            ids, items, offsets = json.loads(file.metadata()["users"]), file.get_tensor("items"), file.get_tensor("offsets")
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); delete it to do without known users") from error
    if len(offsets) != len(ids) + 1 or offsets[-1] != len(items) or items.max(initial=0) >= n_items:
        raise UserError(f"{path} does not belong to the model beside it; delete it to do without known users")
    return KnownUsers(ids, items, offsets)
