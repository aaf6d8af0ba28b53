"""Rows that are computed once are the rows computed directly, whatever memory is granted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_dpr.model.kept_rows import KeptRows

R, W = 40, 3
TABLE = torch.randn(R, W)


@given(st.lists(st.lists(st.integers(0, R - 1), max_size=12), max_size=12), st.sampled_from([0, 1, 5, 13, R]))
def test_rows_are_those_computed_directly(calls, most):
    kept = KeptRows(R, lambda rows: TABLE[rows], most)
    for rows in map(lambda rows: torch.tensor(rows, dtype=torch.int64), filter(None, calls)):
        table, place = kept(rows)
        torch.testing.assert_close(table[place], TABLE[rows])
        assert len(table) <= max(most, max(len(set(rows)) for rows in calls))


@pytest.mark.parametrize("most, computed", [(R, [4, 2, 0]), (4, [4, 2, 4])])
def test_each_is_computed_once_as_far_as_memory_goes(most, computed):
    counts = []

    def compute(rows):
        counts.append(len(rows))
        return TABLE[rows]

    kept = KeptRows(R, compute, most)
    for rows, wanted in zip(([1, 2, 3, 4, 4], [8, 9, 8], [4, 3, 2, 1]), computed):
        before = sum(counts)
        kept(torch.tensor(rows))
        assert sum(counts) - before == wanted
