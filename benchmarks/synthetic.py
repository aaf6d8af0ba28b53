"""A dataset drawn at random that looks like a news or film log, of any size, as RecBole's atomic files.

    python benchmarks/synthetic.py FOLDER [--name=synthetic] [--users=365000] [--items=22000] [--interactions=21800000]
                                   [--categories=60] [--seed=2026]

Writes FOLDER/NAME/NAME.inter, in the order of time, and NAME.item. Items and categories have a long tail; the lengths
of users are log-normal; a user comes in sessions, each of mostly one category, and moves between a few of them. Nobody
has an item twice, so that there are a third fewer interactions than asked for. The defaults are, after 20-core
filtering, of about MIND's size in the paper: 265,000 users, 22,000 items, 12.4 million interactions.

Legend: U users, I interactions, V items, S sessions, C categories.
"""

import sys
import time
from pathlib import Path

import numpy as np

from recbole_dpr.cli import parse_settings

SETTINGS = {  # what a run needs to know of these files
    "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title", "category"]},
    **{"CATEGORY_FIELD": "category", "TITLE_FIELD": "title", "windows": [3, 5]},
}
_START, _SPAN = 1_573_000_000, 42 * 86_400  # six weeks, seconds
_WORDS = ("late", "old", "quiet", "great", "last", "open", "small", "strange", "river", "house", "match", "storm", "vote", "winter", "road", "star")


def write(folder, name="synthetic", users=365_000, items=22_000, interactions=21_800_000, categories=60, seed=2026):
    """Write the dataset; returns its folder, a Path, and the number of interactions."""
    rng, where = np.random.default_rng(seed), Path(folder) / name
    where.mkdir(parents=True, exist_ok=True)
    category_of = rng.choice(categories, size=items, p=_long_tail(rng, categories, 1.0))
    user, item, timestamp = _interactions(rng, users, interactions, category_of)
    _write_fixed(where / f"{name}.inter", "user_id:token\titem_id:token\ttimestamp:float\n", (b"u", user), (b"\ti", item), (b"\t", timestamp))
    _write_items(where / f"{name}.item", rng, category_of)
    return where, len(item)


def _interactions(rng, n_users, n_interactions, category_of):
    """user, item, timestamp of every interaction, int [I] each, in the order of time."""
    n_items, n_categories = len(category_of), category_of.max() + 1
    popularity = _long_tail(rng, n_items, 1.25)
    lengths = rng.lognormal(0.0, 0.7, n_users)
    lengths = np.maximum(3, lengths * n_interactions / lengths.sum()).astype(np.int64)
    user = np.repeat(np.arange(n_users), lengths)
    starts_session = rng.random(len(user)) < 1 / 6
    starts_session[np.cumsum(lengths) - lengths] = True
    session = np.cumsum(starts_session) - 1  # [I]
    session_user = user[starts_session]  # [S]
    # a category of three that are the user's own, more often the first; one of all at every fifth session
    weight = np.bincount(category_of, popularity, n_categories)
    own = rng.choice(n_categories, size=(n_users, 3), p=weight / weight.sum())
    theirs = own[session_user, rng.choice(3, size=len(session_user), p=[0.6, 0.3, 0.1])]
    other = rng.choice(n_categories, size=len(session_user), p=weight / weight.sum())
    session_category = np.where(rng.random(len(session_user)) < 0.8, theirs, other)
    item = _items_of(rng, session_category[session], category_of, popularity)
    stray = rng.random(len(item)) < 0.15
    item[stray] = rng.choice(n_items, size=stray.sum(), p=popularity)
    timestamp = _START + rng.integers(_SPAN, size=len(session_user))[session] + rng.integers(1800, size=len(item))
    order = np.argsort(user * n_items + item, kind="stable")
    pair = (user * n_items + item)[order]
    first = np.sort(order[np.append(True, pair[1:] != pair[:-1])])  # of each user and item
    first = first[np.argsort(timestamp[first], kind="stable")]
    return user[first], item[first], timestamp[first]


def _items_of(rng, category, category_of, popularity):
    """An item of each of these categories, by popularity: int64 [I]."""
    order = np.argsort(category_of, kind="stable")
    below = np.concatenate([[0.0], np.cumsum(popularity[order])])
    bounds = np.searchsorted(category_of[order], np.arange(category_of.max() + 2))
    low, high = below[bounds[category]], below[bounds[category + 1]]
    place = np.searchsorted(below, low + rng.random(len(category)) * (high - low), side="right") - 1
    return order[np.clip(place, bounds[category], bounds[category + 1] - 1)]


def _long_tail(rng, n, exponent):
    """Shares of n things, in random order, that fall with a power of their rank."""
    weight = (np.arange(n) + 30.0) ** -exponent
    return rng.permutation(weight / weight.sum())


def _write_items(path, rng, category_of):
    words = rng.integers(len(_WORDS), size=(len(category_of), 3))
    width = len(str(len(category_of) - 1))
    with open(path, "w", encoding="utf-8") as file:
        file.write("item_id:token\ttitle:token_seq\tcategory:token_seq\n")
        for item, (category, title) in enumerate(zip(category_of.tolist(), words.tolist())):
            file.write(f"i{item:0{width}}\tThe {' '.join(_WORDS[w] for w in title)} {item}\tcategory{category}\n")


def _write_fixed(path, head, *columns):
    """Rows of whole numbers, each behind its prefix and as wide as its column's largest: all digits at once."""
    blocks = []
    for prefix, values in columns:
        width = len(str(values.max()))
        digits = [(values // 10**place % 10 + ord("0")).astype(np.uint8) for place in reversed(range(width))]
        blocks += [np.full(len(values), byte, dtype=np.uint8) for byte in prefix] + digits
    blocks.append(np.full(len(blocks[0]), ord("\n"), dtype=np.uint8))
    with open(path, "wb") as file:
        file.write(head.encode())
        np.stack(blocks, axis=1).tofile(file)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("--"):
        sys.exit(__doc__)
    started = time.perf_counter()
    written, count = write(sys.argv[1], **parse_settings(sys.argv[2:]))
    print(f"{written}: {count:,} interactions in {time.perf_counter() - started:.1f} s")
