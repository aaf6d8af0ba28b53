"""Targets of the promptable tasks for any positions of the flat item array, without a loop over them.

A position is the index of the immediate next item i_{t+1}; the history is what lies before it. Everything
drawn comes from the generator handed in, so the same generator state gives the same targets.

Legend: P positions, N window, K targets, C categories.
Source: "Give Users the Wheel" (arXiv:2602.18929), sections on the compliance list and the three tasks.
"""

from dataclasses import dataclass

import numpy as np

from recbole_dpr.data.dataset import NO_ITEM

_BLOCK = 65536  # positions looked at together: bounds what is [P, N, C / 8]


@dataclass(frozen=True, eq=False)
class Targets:
    """Targets for those of the positions asked about that have any.

    Attributes:
        rows: int64 [P'], which of the positions asked about, ascending.
        items: int64 [P', K], nearest first, padded with `NO_ITEM`; K is 1 for POS.
        category: int64 [P'], the category asked for (POS) or to be avoided (NEG).
    """

    rows: np.ndarray
    items: np.ndarray
    category: np.ndarray

    def __len__(self):
        return len(self.rows)


def window(sequences, positions, n):
    """The next `n` items from each position, within its split part.

    Args:
        positions: int [P].
        n: window size, an int or int [P].

    Returns:
        int64 [P, N], padded with `NO_ITEM` past the window or the part; N = the largest window.
    """
    n = np.broadcast_to(n, len(positions))
    end = np.minimum(positions + n, sequences.part_end[positions])
    return items_between(sequences, positions, end, n.max(initial=1))


def draw(rng, mask):
    """One true column of each row, uniformly.

    Args:
        mask: bool [P, K], at least one true in each row.

    Returns:
        int64 [P].
    """
    return np.where(mask, rng.random(mask.shape), -1.0).argmax(axis=1)


def positive_in_window(sequences, positions, n, rng):
    """POS as the task draws it: one item of the window that has a category which the next item lacks.

    Args:
        positions: int [P].
        n: window size, an int or int [P].
        rng: numpy Generator.

    Returns:
        Targets with K = 1; the category is one that the target has and the next item lacks.
    """
    n = np.broadcast_to(n, len(positions))

    def one_block(positions, n):
        items = window(sequences, positions, n)  # [P, N]
        following, bits = sequences.items[positions], sequences.category_bits
        new = bits[items] & ~bits[following][:, None]  # [P, N, C / 8]
        candidate = new.any(axis=2) & (items != NO_ITEM)  # [P, N]; NO_ITEM has indexed the last row
        rows = np.flatnonzero(candidate.any(axis=1))
        chosen = items[rows, draw(rng, candidate[rows])]
        category = draw(rng, sequences.categories[chosen] & ~sequences.categories[following[rows]])
        return Targets(rows, chosen[:, None], category)

    return _in_blocks(one_block, positions, n)


def positive_from_compliance_list(sequences, positions, n, rng):
    """POS as the paper trains it: one of the n nearest items of F that have the category asked for.

    F is the rest of the user's split part. The paper leaves open how the category is drawn: here it is a
    category of an item drawn uniformly from F.

    Returns:
        Targets with K = 1.
    """

    def one_block(positions):
        end = sequences.part_end[positions]
        some = sequences.items[positions + (rng.random(len(positions)) * (end - positions)).astype(np.int64)]
        rows = np.flatnonzero(sequences.categories[some].any(axis=1))
        category = draw(rng, sequences.categories[some[rows]])
        items = nearest_compliant(sequences, positions[rows], category, True, n)
        choice = draw(rng, items != NO_ITEM)
        return Targets(rows, items[np.arange(len(rows)), choice][:, None], category)

    return _in_blocks(one_block, positions)


def negative(sequences, positions, n, rng, nearest):
    """NEG: avoid one category of the next item; every compliant item is a target.

    Args:
        positions: int [P].
        n: the window, an int or int [P]; with `nearest` an int, the length of the compliance list.
        rng: numpy Generator.
        nearest: True: the n nearest items of F without the category (C^(n) of the paper);
            False: all items of the window without it.

    Returns:
        Targets with K = the largest n.
    """
    width = int(np.max(n))

    def one_block(positions, n):
        has = sequences.categories[sequences.items[positions]]  # [P, C]
        rows = np.flatnonzero(has.any(axis=1))
        category = draw(rng, has[rows])
        if nearest:
            items = nearest_compliant(sequences, positions[rows], category, False, width)
        else:
            end = np.minimum(positions + n, sequences.part_end[positions])[rows]
            items = items_between(sequences, positions[rows], end, width)
            avoided = sequences.categories[items, category[:, None]]
            items = _push_left(np.where(avoided, NO_ITEM, items))
        found = items[:, 0] != NO_ITEM
        return Targets(rows[found], items[found], category[found])

    return _in_blocks(one_block, positions, np.broadcast_to(n, len(positions)))


def nearest_compliant(sequences, positions, category, wanted, n):
    """The compliance list C^(n): the n nearest items of F that have (or lack) a category.

    Args:
        positions, category: int [P].
        wanted: True for items that have the category, False for items that lack it.
        n: length of the list.

    Returns:
        int64 [P, n] items, nearest first, padded with `NO_ITEM` where F holds fewer.
    """
    found = np.full((len(positions), n), NO_ITEM)
    count = np.zeros(len(positions), dtype=np.int64)
    open_rows = np.arange(len(positions))
    start, end = positions.copy(), sequences.part_end[positions]
    while len(open_rows):
        # a stretch of 4 n items completes most lists; the others look at the next stretch
        items = items_between(sequences, start[open_rows], end[open_rows], 4 * n)
        has = sequences.categories[items, category[open_rows, None]]
        complies = (items != NO_ITEM) & (has == wanted)  # [P', 4n]
        slot = count[open_rows, None] + np.cumsum(complies, axis=1) - 1
        row, column = np.nonzero(complies & (slot < n))
        found[open_rows[row], slot[row, column]] = items[row, column]
        count[open_rows] += complies.sum(axis=1)
        start[open_rows] += 4 * n
        open_rows = open_rows[(count[open_rows] < n) & (start[open_rows] < end[open_rows])]
    return found


def items_between(sequences, start, end, n):
    """Items `start … start + n - 1` of each row, `NO_ITEM` from `end` on: int64 [P, n]."""
    index = start[:, None] + np.arange(n)
    return np.where(index < end[:, None], sequences.items[np.minimum(index, len(sequences.items) - 1)], NO_ITEM)


def _push_left(items):
    """Each row's items before its padding, in their order."""
    order = np.argsort(items == NO_ITEM, axis=1, kind="stable")
    return np.take_along_axis(items, order, axis=1)


def _in_blocks(one_block, positions, *columns):
    """`one_block` over stretches of the positions, joined: memory does not grow with their number."""
    parts = []
    for start in range(0, max(1, len(positions)), _BLOCK):
        stop = start + _BLOCK
        part = one_block(np.asarray(positions[start:stop]), *(c[start:stop] for c in columns))
        parts.append((part.rows + start, part.items, part.category))
    return Targets(*map(np.concatenate, zip(*parts)))
