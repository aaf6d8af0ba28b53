"""POS and NEG targets: properties, and a brute force that agrees."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_dpr.data import targets
from recbole_dpr.data.dataset import NO_ITEM, TEST, TRAIN, VALID, Sequences, part_sizes


@st.composite
def sequences(draw):
    n_items, n_categories = draw(st.integers(2, 12)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = np.array(draw(st.lists(st.integers(1, 25), min_size=1, max_size=6)))
    categories = rng.random((n_items + 1, n_categories)) < draw(st.sampled_from([0.1, 0.4, 0.8]))
    categories[0] = False
    offsets = np.append(0, np.cumsum(lengths))
    sizes = part_sizes(lengths - 1, {"RS": [0.6, 0.2, 0.2]})
    train_end = offsets[:-1] + 1 + sizes[:, TRAIN]
    return Sequences(
        items=rng.integers(1, n_items + 1, offsets[-1]),
        offsets=offsets,
        train_end=train_end,
        valid_end=train_end + sizes[:, VALID],
        categories=categories,
        category_names=tuple(f"c{i}" for i in range(n_categories)),
        item_tokens=np.array(["[PAD]", *(f"i{i}" for i in range(n_items))]),
        titles=np.full(n_items + 1, "", dtype=object),
        years=np.full(n_items + 1, "", dtype=object),
        user_tokens=np.array([f"u{i}" for i in range(len(lengths))]),
    )


def part_of(data, position):
    user = np.searchsorted(data.offsets, position, side="right") - 1
    for part in (TRAIN, VALID, TEST):
        start, end = data.bounds(part)
        if start[user] <= position < end[user]:
            return user, part, end[user]
    raise AssertionError("a position lies in some part")


def rest(data, position):
    """F: the items from a position to the end of its part, by loops."""
    return data.items[position : part_of(data, position)[2]].tolist()


everywhere = settings(max_examples=150, deadline=None)


@everywhere
@given(sequences(), st.integers(1, 8), st.integers(0, 1000))
def test_positive_in_window(data, n, seed):
    position = np.arange(len(data.items))
    found = targets.positive_in_window(data, position, n, np.random.default_rng(seed))
    possible = {}
    for p in position:
        has = data.categories[data.items[p]]
        pairs = {(i, c) for i in rest(data, p)[:n] for c in np.flatnonzero(data.categories[i] & ~has)}
        if pairs:
            possible[p] = pairs
    assert found.rows.tolist() == sorted(possible)
    for row, item, category in zip(found.rows, found.items[:, 0], found.category):
        assert (item, category) in possible[row]


@everywhere
@given(sequences(), st.integers(1, 8), st.integers(0, 1000), st.booleans())
def test_negative(data, n, seed, nearest):
    position = np.arange(len(data.items))
    found = targets.negative(data, position, n, np.random.default_rng(seed), nearest)
    categories = dict(zip(found.rows, found.category))
    for p in position:
        has = data.categories[data.items[p]]
        future = rest(data, p)
        options = {
            c: ([i for i in future if not data.categories[i, c]][:n] if nearest else [i for i in future[:n] if not data.categories[i, c]])
            for c in np.flatnonzero(has)
        }
        if p in categories:
            row = found.items[np.searchsorted(found.rows, p)]
            assert row[row != NO_ITEM].tolist() == options[categories[p]]
            assert (row[: len(options[categories[p]])] != NO_ITEM).all()  # padding comes last
        else:  # left out: the category drawn left no target
            assert not options or any(not items for items in options.values())


@everywhere
@given(sequences(), st.integers(1, 6), st.integers(0, 1000))
def test_positive_from_compliance_list(data, n, seed):
    position = np.arange(len(data.items))
    found = targets.positive_from_compliance_list(data, position, n, np.random.default_rng(seed))
    for row, item, category in zip(found.rows, found.items[:, 0], found.category):
        assert item in [i for i in rest(data, row) if data.categories[i, category]][:n]
    uncategorised = [p for p in position if not data.categories[rest(data, p)].any()]
    assert not set(uncategorised) & set(found.rows)


@everywhere
@given(sequences(), st.integers(1, 5), st.booleans(), st.integers(0, 1000))
def test_nearest_compliant(data, n, wanted, seed):
    position = np.arange(len(data.items))
    category = np.random.default_rng(seed).integers(0, data.categories.shape[1], len(position))
    found = targets.nearest_compliant(data, position, category, wanted, n)
    for p, c, row in zip(position, category, found):
        expected = [i for i in rest(data, p) if data.categories[i, c] == wanted][:n]
        assert row.tolist() == expected + [NO_ITEM] * (n - len(expected))


@everywhere
@given(sequences(), st.integers(1, 9))
def test_window_stays_in_its_part(data, n):
    found = targets.window(data, np.arange(len(data.items)), n)
    for p, row in enumerate(found):
        expected = rest(data, p)[:n]
        assert row.tolist() == expected + [NO_ITEM] * (n - len(expected))


def test_window_may_differ_by_row():
    data = _fixed()
    position = np.arange(30)
    n = np.random.default_rng(1).integers(1, 9, len(position))
    found = targets.negative(data, position, n, np.random.default_rng(2), nearest=False)
    assert found.items.shape[1] == n.max()
    for row, items, category in zip(found.rows, found.items, found.category):
        expected = [i for i in data.items[row : min(row + n[row], 30)] if not data.categories[i, category]]
        assert items[items != NO_ITEM].tolist() == expected


def test_same_generator_same_targets():
    data = _fixed()
    draw = lambda: targets.positive_in_window(data, np.arange(len(data.items)), 5, np.random.default_rng(3))  # noqa: E731
    assert np.array_equal(draw().items, draw().items)
    assert np.array_equal(draw().category, draw().category)


def _fixed():
    rng = np.random.default_rng(0)
    return Sequences(
        items=rng.integers(1, 9, 40),
        offsets=np.array([0, 40]),
        train_end=np.array([30]),
        valid_end=np.array([35]),
        categories=np.vstack([np.zeros((1, 3), bool), rng.random((8, 3)) < 0.5]),
        category_names=("a", "b", "c"),
        item_tokens=np.array([str(i) for i in range(9)]),
        titles=np.full(9, "", dtype=object),
        years=np.full(9, "", dtype=object),
        user_tokens=np.array(["u"]),
    )


def test_draw_is_uniform():
    mask = np.array([[True, False, True, True]] * 30000)
    counts = np.bincount(targets.draw(np.random.default_rng(0), mask), minlength=4) / 30000
    assert counts[1] == 0
    assert counts[[0, 2, 3]] == pytest.approx(1 / 3, abs=0.015)
