"""Rows of a table that is too large, or too rarely needed whole, to be computed beforehand: each is computed once and kept."""

import torch


class KeptRows:
    """A table [R, W] whose rows are computed when they are first asked for, and kept as far as there is room.

    Args:
        n_rows: R; compute: int64 [n] row numbers -> their rows [n, W].
        most: rows to keep; then the table is begun anew. What one call asks for is always held.
    """

    def __init__(self, n_rows, compute, most):
        self._compute, self._most = compute, most
        self._place = torch.full((n_rows,), -1)
        self._table, self._used = torch.empty(0, 0), 0

    def __call__(self, rows):
        """A table [U, W] and the places in it, int64 [n], of rows int64 [n]; both are valid until the next call."""
        self._place = self._place.to(rows.device)
        missing = torch.unique(rows[self._place[rows] < 0])
        if self._used + len(missing) > self._most and self._used:
            self._place.fill_(-1)
            self._used, missing = 0, torch.unique(rows)
        if len(missing):
            self._add(missing)
        return self._table, self._place[rows]

    def _add(self, missing):
        found, end = self._compute(missing), self._used + len(missing)
        if end > len(self._table):
            table = found.new_empty(max(end, min(2 * len(self._table), self._most)), found.shape[1])
            if self._used:
                table[: self._used] = self._table[: self._used]
            self._table = table
        self._table[self._used : end] = found
        self._place[missing] = torch.arange(self._used, end, device=missing.device)
        self._used = end
