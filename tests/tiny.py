"""A tiny dataset as RecBole's atomic files, for tests of whole runs.

60 users, 80 items, 4 categories; each user has one or two favourite categories, so there is something to learn.
"""

from pathlib import Path

import numpy as np

from recbole_dpr.config import known_keys

CATEGORIES = ("comedy", "drama", "horror", "western")
_SMALL = {
    **{"hidden_size": 16, "inner_size": 32, "embedding_size": 16, "n_heads": 2, "n_layers": 1, "fusion_heads": 2},
    **{"fusion_inner_size": 32, "MAX_ITEM_LIST_LENGTH": 10, "windows": [2, 3], "valid_window": 2, "train_windows": [2, 3]},
}
PHRASES = {
    **{"narrative": "a rider crosses plain {}", "atmosphere": "dusty and slow like {}", "appeal": "worth it for scene {}"},
    **{"eval_narrative": "horseman travels over steppe {}", "eval_atmosphere": "arid, unhurried as {}", "eval_appeal": "see moment {}"},
}
WISHES = {"wish_1": "I want ride {}", "wish_2": "Give me plain {}", "wish_3": "Show {}", "valid_wish": "Is there one with {}?", "eval_wish": "Tonight {}, please"}

MEANINGS = {"comedy": "laughing out loud", "drama": "a family falls apart", "horror": "blood on the stairs", "western": "a stagecoach"}


def write(folder, name="tiny", seed=0, n_users=60, n_items=80):
    """Write `folder`/`name`/`name`.inter and .item; returns that folder as a Path."""
    rng = np.random.default_rng(seed)
    where = Path(folder) / name
    where.mkdir(parents=True, exist_ok=True)
    first = rng.integers(len(CATEGORIES), size=n_items)
    second = rng.integers(len(CATEGORIES), size=n_items)  # the same as the first for a quarter: one category
    with open(where / f"{name}.item", "w", encoding="utf-8") as f:
        f.write("item_id:token\ttitle:token_seq\tcategory:token_seq\n")
        for item, pair in enumerate(zip(first, second)):
            categories = " ".join(CATEGORIES[c] for c in dict.fromkeys(pair))
            f.write(f"i{item}\tFilm number {item}\t{categories}\n")
    with open(where / f"{name}.inter", "w", encoding="utf-8") as f:
        f.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user in range(n_users):
            liked = (first == rng.integers(len(CATEGORIES))) | (second == rng.integers(len(CATEGORIES)))
            weight = np.where(liked, 5.0, 1.0)
            items = rng.choice(n_items, size=rng.integers(30, 50), replace=False, p=weight / weight.sum())
            for step, item in enumerate(items):
                f.write(f"u{user}\ti{item}\t{1_000_000_000 + 1000 * user + step}\n")
    return where


def write_texts(folder):
    """Write tags.tsv, wishes.tsv and meanings.tsv for the tiny dataset, the key item_texts; returns the folder."""
    for name, columns in (("tags.tsv", PHRASES), ("wishes.tsv", WISHES)):
        rows = ["\t".join(["item_id", "title", *columns])]
        rows += ["\t".join([f"i{i}", f"Film number {i}", *(c.format(i) for c in columns.values())]) for i in range(80)]
        (folder / name).write_text("\n".join(rows) + "\n")
    told = [f"{text}\t{category}" for category, text in MEANINGS.items()]
    (folder / "meanings.tsv").write_text("\n".join(["text\tcategories", *told, "a Tuesday\t-"]) + "\n")
    return folder


def settings(folder, model="DPR_SASRec", **more):
    """Overrides for a run of this model on what `write(folder)` wrote; everything that a run writes stays below `folder`.

    Args:
        folder: as given to `write`; model: its size keys are set where it has them; more: keys that win.
    """
    known = known_keys(model)
    return {
        "data_path": str(folder),
        "checkpoint_dir": str(Path(folder) / "saved"),
        "prompt_cache_dir": str(Path(folder) / "cache"),
        "data_cache_dir": str(Path(folder) / "cache" / "data"),
        "CATEGORY_FIELD": "category",
        "TITLE_FIELD": "title",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title", "category"]},
        "prompt_templates": "neutral",
        "read_prompts": False,  # a tagger takes longer than the rest of such a run
        "show_progress": False,
        **{key: value for key, value in _SMALL.items() if key in known},
        **more,
    }
