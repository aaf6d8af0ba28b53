"""`recbole-dpr recommend`: the lists without and with a prompt side by side."""

import warnings

from tabulate import tabulate

_TITLE_WIDTH, _CATEGORIES_WIDTH = 42, 28


def mark(move, plain_rank):
    """How an item moved: "▲ 12 (from 13)", "▼ 1 (from 2)", or "" where it stayed."""
    return "" if not move else f"{'▲' if move > 0 else '▼'} {abs(move)} (from {plain_rank})"


def comparison(rec, history, prompt, k, strength):
    """A table for people.

    Args:
        rec: Recommender; the others as for `Recommender.recommend`.

    Returns:
        several lines of text: warnings, how the prompt was understood, and the table.
    """
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        plain = rec.recommend(history, k=k)
        found = rec.recommend(history, prompt, k=k, strength=strength, explain=True)
    lines = [f"note: {message}" for message in dict.fromkeys(str(w.message) for w in warned)]
    if not found.clauses:
        rows = [[rank, _name(rec, item), _categories(names)] for rank, (item, names) in enumerate(zip(plain.items, plain.categories), start=1)]
        return "\n".join([*lines, tabulate(rows, headers=["", "without a prompt", "categories"], disable_numparse=True)])
    lines += [f"understood: {'wanted' if clause.intent == 'positive' else 'avoided'}: {clause.text}" for clause in found.clauses]
    rows = [
        [rank, _name(rec, before), _name(rec, item), mark(move, plain_rank), _categories(names)]
        for rank, (before, item, move, plain_rank, names) in enumerate(
            zip(plain.items, found.items, found.moves, found.plain_ranks, found.categories), start=1
        )
    ]
    head = ["", "without the prompt", "with it", "moved", "categories"]
    return "\n".join([*lines, "", tabulate(rows, headers=head, disable_numparse=True)])


def _name(rec, item):
    title = rec.title(item)
    return item if title == item else f"{_cut(title, _TITLE_WIDTH)} [{item}]"


def _categories(names):
    return _cut(", ".join(names), _CATEGORIES_WIDTH)


def _cut(text, width):
    return text if len(text) <= width else f"{text[: width - 1]}…"
